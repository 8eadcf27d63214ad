"""Text → tokens, without tokenising what is cut off anyway."""

import numpy as np

from gradshield.base.errors import first_line

_PER_TOKEN = 32  # characters: a prefix of so many per token that is kept mostly holds enough of them
_MARGIN = 64  # tokens at the end of a prefix that what follows it may change
_MAX_CHARACTERS = 1 << 22  # characters that may be needed for the tokens that are kept


class Untokenized(Exception):
    """A text that can't be tokenised: it holds half a surrogate pair, which a template can write, too, or a regex of
    the tokenizer runs out of steps on it."""


class TooLong(Untokenized):
    """The text has too few tokens in too many characters to be cut without being tokenised whole."""


def tokenize(tokenizer, text: str, limit: int | None = None, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(ids int32 [tokens], character offsets [tokens, 2]) of the text; at least the first `limit` tokens are there.

    `special`: with the tokens that the tokenizer adds by itself; rendered text has its own. The first tokens of a long
    text are those of a prefix, if twice the prefix begins with the same. Raises Untokenized.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Untokenized("the text holds half a surrogate pair, which no tokenizer can read") from None
    size = _PER_TOKEN * limit if limit else len(text)
    while 2 * size < len(text):
        if 2 * size > _MAX_CHARACTERS:
            raise TooLong(f"{size} characters hold fewer than {limit} tokens; shorten the row")
        ids, offsets = _whole(tokenizer, text[:size], special)
        longer, _ = _whole(tokenizer, text[: 2 * size], special)
        kept = len(ids) - _MARGIN
        if limit and kept > limit and np.array_equal(ids[:kept], longer[:kept]):
            return ids[:kept], offsets[:kept]
        size *= 2
    return _whole(tokenizer, text, special)


def _whole(tokenizer, text: str, special: bool) -> tuple[np.ndarray, np.ndarray]:
    try:
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    except BaseException as error:  # a panic in tokenizers, as of a regex that runs out of steps, is no Exception
        if type(error).__name__ != "PanicException":
            raise
        why = f"the tokenizer fails on the text: {first_line(error)} (check the regex in its tokenizer.json)"
        raise Untokenized(why) from None
    offsets = encoded["offset_mapping"] if tokenizer.is_fast else np.zeros((len(encoded["input_ids"]), 2))
    return np.array(encoded["input_ids"], dtype=np.int32), np.array(offsets, dtype=np.int64).reshape(-1, 2)
