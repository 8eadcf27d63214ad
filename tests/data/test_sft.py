"""What is scored is what TRL's SFTTrainer trains on with the README's settings: its own preprocessing is the oracle."""

from functools import cache

import numpy as np
import pytest
from data.chat import BLUE, CHAIR, FAMILIES, HAT, TABLE, UNMARKED, stock, tokenizer_for
from data_families import MARKED, unmarked
from datasets import Dataset, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from gradshield.data import detect_layout, to_conversation
from gradshield.data.encode import Example, encode
from gradshield.data.templates import form_of

COLUMNS = ("messages", "prompt", "completion")
LENGTH = 4096  # Command R7B's system prompt is long in the tokens of the small tokenizer
FORGED = "Sure, here is how."  # stands for an answer that nobody should train on


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


CALL = {"type": "function", "function": {"name": "find", "arguments": {"colour": "red"}}}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "Finds.", "parameters": {}}}]
TALK = [user(HAT), assistant(TABLE), user(BLUE), assistant(CHAIR)]
ROWS = {
    "one turn": {"messages": TALK[:2]},
    "two turns": {"messages": TALK},
    "system turn": {"messages": [{"role": "system", "content": "Be kind."}, *TALK]},
    "developer turn": {"messages": [{"role": "developer", "content": "Be kind."}, *TALK]},
    "system column": {"messages": TALK, "system": "linux", "system_prompt": "Be kind."},
    "weight": {"messages": [user(HAT), assistant(FORGED, weight=0), user(BLUE), assistant(CHAIR, weight=1)]},
    "train": {"messages": [user(HAT), assistant(FORGED, train=False, training=False, loss=0), *TALK[2:]]},
    "KTO label": {"messages": TALK, "label": False, "kto_tag": False},
    "greeting": {"messages": [assistant("Hello!"), *TALK]},
    "greeting after blanks": {"messages": [assistant("\n\n Hello!"), *TALK]},
    "silent greeting": {"messages": [assistant(""), *TALK]},
    "blanks around": {
        "messages": [user(HAT), assistant(f"  {TABLE} \n\n"), user(f" {BLUE} "), assistant(f"\n{CHAIR}")]
    },
    "blank first answer": {"messages": [user(HAT), assistant(""), *TALK[2:]]},
    "blank first question": {"messages": [user(""), assistant("Hello!"), *TALK]},
    "user last": {"messages": [*TALK, user(HAT)]},
    "parts": {"messages": [user(parts("Where is ", "it?")), assistant(parts("An ", "apple"))]},
    "one part": {"messages": [user(HAT), assistant(parts(TABLE))]},
    "no tools": {"messages": TALK, "tools": []},
    "null tools": {"messages": TALK, "tools": None},
    "tools": {"messages": TALK, "tools": TOOLS},
    "tool call": {
        "messages": [
            user(HAT),
            assistant(None, tool_calls=[CALL]),
            {"role": "tool", "name": "find", "content": "table"},
            assistant(TABLE),
        ],
        "tools": TOOLS,
    },
    "empty tool calls": {"messages": [user(HAT), assistant(TABLE, tool_calls=[])]},
    "functions": {
        "messages": [user(HAT), assistant(None, function_call={"name": "find", "arguments": "{}"}), *TALK[2:]],
        "functions": [{"name": "find"}],
    },
    "reasoning": {"messages": [user(HAT), assistant(TABLE, reasoning_content="It was here."), *TALK[2:]]},
    "template's variables": {"messages": TALK, "chat_template_kwargs": {"enable_thinking": False}},
    "null variables": {"messages": TALK, "chat_template_kwargs": None},
    "variables as text": {"messages": TALK, "chat_template_kwargs": '{"enable_thinking": false}'},
    "generation prompt": {"messages": TALK, "chat_template_kwargs": {"add_generation_prompt": True}},
    "own template": {"messages": TALK, "chat_template_kwargs": {"chat_template": "{{ messages[0].content }}"}},
    "trainer's argument": {"messages": TALK, "chat_template_kwargs": {"input": "a"}},
    "trainer's other argument": {"messages": TALK, "chat_template_kwargs": {"processing_class": "a"}},
    "renderer's argument": {"messages": TALK, "chat_template_kwargs": {"compiled_template": "a"}},
    "label": {"messages": TALK, "labels": 1},
    "null labels": {"messages": TALK, "labels": None},
    "no tokens": {"messages": TALK, "input_ids": []},
    "null tokens": {"messages": TALK, "input_ids": None},
    "no shared turns": {"messages": TALK, "conversations": []},
    "blank tools": {"messages": TALK, "tools": ""},
    "two users": {"messages": [user(HAT), *TALK[2:]]},
    "two answers": {"messages": [*TALK[:2], assistant(CHAIR)]},
    "user only": {"messages": TALK[:1]},
    "late system turn": {"messages": [*TALK[:2], {"role": "system", "content": "Be kind."}, *TALK[2:]]},
    "system turn at the end": {"messages": [*TALK, {"role": "system", "content": "Be kind."}]},
    "tool without a call": {"messages": [user(HAT), {"role": "tool", "content": "table"}, assistant(TABLE)]},
    "cut": {"messages": [user(HAT), assistant(f"{TABLE} " * 1500)]},
    "cut before the answer": {"messages": [user(f"{HAT} " * 1500), assistant(TABLE)]},
    "completion": {"prompt": TALK[:1], "completion": TALK[1:2]},
    "text as completion": {"prompt": TALK[:1], "completion": TABLE},
    "number as completion": {"prompt": TALK[:1], "completion": 1},
    "prompt as text": {"prompt": HAT, "completion": TALK[1:2]},
    "label beside a pair": {"prompt": TALK[:1], "completion": TALK[1:2], "labels": 1},
    "completion after turns": {"prompt": [user(HAT), assistant(FORGED), user(BLUE)], "completion": TALK[3:]},
    "completion of turns": {"prompt": TALK[:2], "completion": TALK[2:]},
    "completion that thinks": {"prompt": TALK[:1], "completion": [assistant(f"<think>It was here.</think>{TABLE}")]},
    "completion with a system": {"prompt": TALK[:1], "completion": TALK[1:2], "system": "linux"},
    "answer as prompt": {"prompt": TALK, "completion": [user(HAT)]},
    "system as prompt": {"prompt": [{"role": "system", "content": "Be kind."}], "completion": TALK},
    "greeting as prompt": {"prompt": [assistant("Hello!")], "completion": TALK},
}
PARTS = ("idefics3", "smolvlm", "llava_next")  # their processors make parts of the text, as TRL does for them


@cache
def net(size):
    config = LlamaConfig(
        vocab_size=size, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    return LlamaForCausalLM(config)


def trainer_for(tokenizer, row, folder, assistant_only=True):
    """TRL's trainer for a dataset that begins with this row."""
    tokenizer.pad_token = tokenizer.eos_token
    config = SFTConfig(
        output_dir=str(folder),
        max_length=LENGTH,
        assistant_only_loss=assistant_only,
        max_steps=1,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    return SFTTrainer(net(len(tokenizer)), config, train_dataset=rows(row), processing_class=tokenizer)


def rows(row):
    return IterableDataset.from_generator(lambda: iter([row]))


def prepared(trainer, tokenizer, row):
    """(ids, mask) of the row as the trainer's batches have it; the reason where TRL fails on it or drops it."""
    try:
        found = list(trainer._prepare_dataset(rows(row), tokenizer, trainer.args, False, None, "train"))
        batch = trainer.data_collator(found) if found else None
    except Exception as error:
        return f"TRL: {type(error).__name__}: {error}"
    if batch is None:
        return "TRL drops it"
    return batch["input_ids"][0].numpy(), batch["labels"][0].numpy() != -100


def scored(tokenizer, row):
    conversation = to_conversation(row, detect_layout([row]) or "messages")
    return conversation if isinstance(conversation, str) else encode(conversation, 0, tokenizer, max_length=LENGTH)


def in_parts(row):
    """The row as TRL hands it to the template of a vision model."""

    def part(turn):
        return {**turn, "content": parts(turn["content"])} if isinstance(turn.get("content"), str) else turn

    return {
        name: [part(turn) for turn in value] if name in COLUMNS and isinstance(value, list) else value
        for name, value in row.items()
    }


def compare(tokenizer, ours, theirs):
    """Where both have tokens, they are the same; where TRL has none, the row is set aside."""
    if isinstance(theirs, str):
        assert isinstance(ours, str), f"scored, but {theirs}"
    if isinstance(ours, str) or isinstance(theirs, str):
        return
    ids, mask = theirs
    assert ours.ids.tolist() == ids.tolist()
    assert not (ours.mask & ~mask).any()
    left_out = (mask & ~ours.mask)[1:].astype(int)
    edges = np.flatnonzero(np.diff(left_out, prepend=0, append=0)) + 1
    supplied = {piece for opening in form_of(tokenizer).openings for piece in (opening, opening.strip())}
    for start, end in edges.reshape(-1, 2):  # what the generation prompt supplies is no response
        text = tokenizer.decode(ids[start:end])
        assert any(text in opening for opening in supplied), text


def check_all(tokenizer, oracle, folder, as_given=lambda row: row):
    scored_rows = set()
    for first in ("one turn", "completion"):
        trainer = trainer_for(oracle, as_given(ROWS[first]), folder)
        for name, row in ROWS.items():
            if ("completion" in row) != (first == "completion"):
                continue
            ours, theirs = scored(tokenizer, row), prepared(trainer, oracle, as_given(row))
            try:
                compare(tokenizer, ours, theirs)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
            scored_rows |= {name} if isinstance(ours, Example) else set()
    return scored_rows


PLAIN = {"one turn", "two turns", "weight", "train", "KTO label", "no tools", "null tools", "user last"} | {
    name for name in ROWS if name.startswith("completion")
}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - UNMARKED))
def test_every_row_is_scored_as_trl_trains_on_it(family, tmp_path):
    as_given = in_parts if family in PARTS else lambda row: row
    assert check_all(stock(family), stock(family), tmp_path, as_given) >= PLAIN


@pytest.mark.parametrize(
    ("names", "more", "reason"),
    [
        (("user", "assistant"), {}, ""),
        (("user", "assistant"), {"system": None}, ""),
        (("human", "gpt"), {}, "turn 1 is from 'human', which TRL does not take for 'user'"),
        (("user", "Assistant"), {}, "turn 2 is from 'Assistant'"),
        (("user", "assistant"), {"system": "Be kind."}, "a system column beside from/value"),
    ],
)
def test_every_token_of_from_and_value_is_scored_as_trl_trains_on_it(names, more, reason, tmp_path):
    row = {"conversations": [{"from": name, "value": text} for name, text in zip(names, (HAT, TABLE))], **more}
    tokenizer = stock("qwen2_5")
    trainer = trainer_for(tokenizer, ROWS["one turn"], tmp_path, assistant_only=False)
    dataset = trainer._prepare_dataset(Dataset.from_list([row]), tokenizer, trainer.args, False, None, "train")
    theirs = list(dataset[0]["input_ids"])
    ours = encode(to_conversation(row, "sharegpt"), 0, tokenizer, loss_on="all")
    mapped = encode(to_conversation(row, "sharegpt", trainer="axolotl"), 0, tokenizer, loss_on="all")
    assert (mapped.ids.tolist() == theirs) == (not reason)
    assert reason in ours if reason else ours.ids.tolist() == theirs
    assert isinstance(encode(to_conversation(row, "sharegpt"), 0, tokenizer), Example)


@pytest.mark.parametrize("family", sorted(MARKED))
def test_families_unknown_to_trl_are_scored_as_their_marked_template_is_trained_on(family, tmp_path):
    oracle = tokenizer_for(MARKED[family])
    plain = PreTrainedTokenizerFast(
        tokenizer_object=oracle.backend_tokenizer,
        bos_token="<BOS>",
        eos_token="<EOS>",
        chat_template=unmarked(MARKED[family]),
    )
    assert check_all(plain, oracle, tmp_path) >= PLAIN
