"""What is cut off is not tokenised, and what is left is the same as if it had been."""

import pytest
from data.chat import BLUE, CHAIR, CHATML, HAT, TABLE, talk, tokenizer_for
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gradshield.data import Conversation
from gradshield.data import tokens as tokens_module
from gradshield.data.encode import encode
from gradshield.data.tokens import TooLong, tokenize

WORDS = [
    HAT,
    TABLE,
    BLUE,
    CHAIR,
    "a",
    "ab",
    "\n\n",
    "   ",
    "é",
    "e\u0301",
    "日本語",
    "1234567",
    "<|im_end|>",
    "aaaaaaaa",
]


def trained(model, trainer, pre=None, normalizer=None):
    backend = Tokenizer(model)
    if pre:
        backend.pre_tokenizer = pre
    if normalizer:
        backend.normalizer = normalizer
    backend.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<EOS>")


def small(kind):
    special = {"special_tokens": ["<EOS>", "<unk>"], "show_progress": False}
    if kind == "byte-level BPE":
        return tokenizer_for(CHATML)
    if kind == "BPE over the whole text":  # as in Llama-2 and Gemma, where no word is split off
        trainer = trainers.BpeTrainer(vocab_size=120, **special)
        return trained(models.BPE(unk_token="<unk>"), trainer, normalizer=normalizers.Replace(" ", "▁"))
    if kind == "Unigram":
        trainer = trainers.UnigramTrainer(vocab_size=100, unk_token="<unk>", **special)
        return trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), normalizers.NFKC())
    trainer = trainers.WordPieceTrainer(vocab_size=120, **special)
    return trained(models.WordPiece(unk_token="<unk>"), trainer, pre_tokenizers.BertPreTokenizer())


@pytest.fixture(scope="module", params=["byte-level BPE", "BPE over the whole text", "Unigram", "WordPiece"])
def tokenizer(request):
    return small(request.param)


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), times=st.integers(1, 300), limit=st.integers(1, 8)
)
def test_the_first_tokens_are_those_of_the_whole_text(tokenizer, words, times, limit):
    text = "".join(words) * times
    assume(len(set(text)) > 1)  # a run of one letter has several best pieces in a Unigram model; its length decides
    for special in (False, True):
        ids, offsets = tokenize(tokenizer, text, limit, special)
        whole, places = tokenize(tokenizer, text, None, special)
        assert ids[:limit].tolist() == whole[:limit].tolist()
        assert offsets[:limit].tolist() == places[:limit].tolist()


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer):
        self.inner, self.is_fast, self.characters = tokenizer, True, 0

    def __call__(self, text, **options):
        self.characters += len(text)
        return self.inner(text, **options)


def test_a_row_of_megabytes_is_not_tokenised_whole():
    counting = Counting(tokenizer_for(CHATML))
    tokenize(counting, f"{TABLE} " * 200_000, 64)
    assert counting.characters < 50_000


def test_a_long_row_is_the_same_example_as_its_cut():
    tokenizer = tokenizer_for(CHATML)
    for turns in ((HAT, f"{TABLE} " * 20_000), (HAT, TABLE, BLUE, f"{CHAIR} " * 20_000)):
        long, cut = (
            encode(talk(*turns[:-1], answer), 0, tokenizer, max_length=128) for answer in (turns[-1], turns[-1][:5000])
        )
        assert long.ids.tolist() == cut.ids.tolist() and long.mask.tolist() == cut.mask.tolist()
    text = Conversation((), text=f"{TABLE} " * 20_000)
    assert encode(text, 0, tokenizer, max_length=128).mask[1:].all()
    late = encode(talk(f"{HAT} " * 20_000, TABLE), 0, tokenizer, max_length=128)
    assert late == "the response starts after token 128 (raise --max-length)"


def test_few_tokens_in_too_many_characters_set_the_row_aside(monkeypatch):
    monkeypatch.setattr(tokens_module, "_MAX_CHARACTERS", 4000)
    blank = trained(models.BPE(), trainers.BpeTrainer(show_progress=False), normalizer=normalizers.Replace(" ", ""))
    with pytest.raises(TooLong, match="hold fewer than 32 tokens"):
        tokenize(blank, " " * 100_000, 32)


def test_a_regex_that_panics_on_a_text_sets_that_row_aside_and_no_other():
    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(a|aa)+$"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", name_or_path="mine")
    before = encode(Conversation((), text="b a"), 0, tokenizer)
    found = encode(Conversation((), text="a" * 60 + "b"), 1, tokenizer)
    assert isinstance(found, str) and "the tokenizer fails on the text: " in found and "check the regex" in found
    assert encode(Conversation((), text="b a"), 0, tokenizer).ids.tolist() == before.ids.tolist()
