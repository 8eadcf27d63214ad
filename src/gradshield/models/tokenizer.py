"""A model's tokenizer and chat template, checked before they are used on rows: they end, and they fit the network."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gradshield.base.errors import UserError, first_line
from gradshield.data.encode import encode_request
from gradshield.data.templates import LONGEST, Refused, form_of, render_template
from gradshield.data.turns import Message
from gradshield.models import tokenizer_trial
from gradshield.models.files import read_config, shown
from gradshield.models.network import check_computes, quiet_loading

PROCESS_SECONDS = (
    60  # seconds for the process that tries them, which stops itself after tokenizer_trial.LIMIT of computing
)
ANSWER = 16  # tokens that must have a place behind a request


@dataclass(frozen=True)
class NamedTokenizer:
    """A tokenizer, with the names that errors use for it and its chat template."""

    tokenizer: Any
    name: str
    template_name: str


def load_tokenizer(
    name: str,
    source: dict[str, Any],
    adapters: Sequence[Path],
    chat_template: str | None,
    rows: int,
    *,
    bundled: bool = False,
) -> NamedTokenizer:
    """The tokenizer that `source` (the keywords of from_pretrained) names, or the uppermost adapter's own.

    An adapter's folder may hold a tokenizer, a chat template, or both, and those count. A `bundled` one is not
    tried first. Raises UserError where it can't be loaded, has no end-of-sequence token, or where it or its template
    does not end.
    """
    given = Path(chat_template) if chat_template else None
    for folder in reversed(adapters):
        if (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file():
            name, source = str(folder), {"pretrained_model_name_or_path": str(folder), "trust_remote_code": False}
            break
        if given is None and (folder / "chat_template.jinja").is_file():
            given = folder / "chat_template.jinja"
    words, template = f"the tokenizer of {name}", f"the chat template of {given or name}"
    tokenizer = read_tokenizer(words, source)
    if "gguf_file" in source:
        _drop_invented(tokenizer, rows)
    if given is not None:
        tokenizer.chat_template = _read(given, template)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{words} has no end-of-sequence token; set eos_token in tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if not bundled or given is not None:
        special = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        _check_ends(template, None, 0, _templates(template, tokenizer), json.dumps(special))
    tokenizer.template_name = template  # for errors about rows
    return NamedTokenizer(tokenizer, words, template)


def read_tokenizer(what: str, source: dict[str, Any]) -> Any:
    """The tokenizer that `source` (the keywords of from_pretrained) names. Its tokenizer.json is tried first.

    Raises UserError where it can't be loaded, does not end, draws at random, or names another file, which nothing has
    tried.
    """
    from transformers import AutoTokenizer

    folder = Path(source["pretrained_model_name_or_path"])
    config, own = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if config.is_file() and read_config(config).get("fast_tokenizer_files"):
        raise UserError(f"{config}: names another tokenizer (fast_tokenizer_files); remove it")
    if own.is_file():
        _check_ends(what, str(own), own.stat().st_mtime_ns, (), "{}")
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(**{"trust_remote_code": False, **source})
    except Exception as error:  # what a file says can make any of transformers' lines fail
        kind = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
        raise UserError(f"{what} can't be loaded: {kind}{first_line(error)}") from error
    except BaseException as error:  # a panic in tokenizers is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what} can't be loaded: {first_line(error)}") from None
    if getattr(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None), "dropout", None):
        raise UserError(f"{what} draws at random how it reads a text (BPE dropout); set dropout to null in its model")
    return tokenizer


def _templates(what: str, tokenizer: Any) -> tuple[str, ...]:
    """The tokenizer's chat templates. Raises UserError for one that is no text, blank, or no Unicode."""
    templates = tokenizer.chat_template
    texts = templates.values() if isinstance(templates, dict) else () if templates is None else (templates,)
    if wrong := [each for each in texts if not isinstance(each, str) or not each.strip()]:
        kind = "empty" if isinstance(wrong[0], str) else f"{str(wrong[0])[:40]!r}, not a text"
        raise UserError(f"{what} is {kind}; pass another with --chat-template")
    if any(re.search("[\ud800-\udfff]", each) for each in texts):
        raise UserError(f"{what} holds half a surrogate pair, which is no text; pass another with --chat-template")
    return tuple(texts)


def _drop_invented(tokenizer: Any, rows: int) -> None:
    """Takes back special tokens that transformers adds to a GGUF's own, behind the last of the embedding's `rows`."""
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    own = [token for token in content["added_tokens"] if token["id"] < rows]
    if len(own) < len(content["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content | {"added_tokens": own}))


def check_fits(name: str, named: NamedTokenizer, net: Any) -> None:
    """Checks that the network can read what the tokenizer writes.

    Raises UserError if the network has no embedding for an id, has too few positions for a request and an answer's
    start, or can't compute the request's next token. Also if the chat template omits the request or the answer, or
    swaps them.
    """
    tokenizer = named.tokenizer
    check_ids(named.name, tokenizer, net)
    _check_text(named)
    eos = getattr(getattr(net, "generation_config", None), "eos_token_id", None)
    if not all(isinstance(each, int) for each in (eos if isinstance(eos, list) else [eos]) if each is not None):
        raise UserError(f"model {name}: eos_token_id in its generation config is {str(eos)[:40]!r}, not a token's id")
    ids = [tokenizer.eos_token_id]
    if tokenizer.chat_template and tokenizer.is_fast:  # rows of plain text need none
        _check_template(named)
        with suppress(UserError):  # it takes other forms of requests only, and each row will say so
            ids = encode_request(tokenizer_trial.QUESTION, tokenizer).tolist()
        positions = getattr(net.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(positions, int) and positions < len(ids) + ANSWER:
            needed = len(ids) + ANSWER
            raise UserError(f"model {name}: it has {positions} positions; a short request with its answer has {needed}")
    check_computes(name, net, ids)


def check_ids(what: str, tokenizer: Any, net: Any) -> None:
    """Raises UserError for a tokenizer with ids that the network has no embedding for."""
    rows = int(net.get_input_embeddings().weight.shape[0])
    if beyond := sorted((n, token) for token, n in tokenizer.get_vocab().items() if not 0 <= n < rows):
        raise UserError(
            f"{what} has {len(tokenizer)} tokens, the model's embedding {rows} rows "
            f"(no row for {shown([token for _, token in beyond])}); this tokenizer belongs to another model"
        )


def _check_text(named: NamedTokenizer) -> None:
    try:
        ids = named.tokenizer(tokenizer_trial.ANSWER, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # what a file says can make any of its lines fail
        raise UserError(f"{named.name} fails: {type(error).__name__}: {first_line(error)}") from error
    if not ids:
        raise UserError(
            f"{named.name} encodes {tokenizer_trial.ANSWER!r} to no tokens; use the model's original tokenizer"
        )


def _check_template(named: NamedTokenizer) -> None:
    turns = [Message("user", tokenizer_trial.QUESTION), Message("assistant", tokenizer_trial.ANSWER)]
    try:
        text, _ = render_template(named.tokenizer, form_of(named.tokenizer), turns)
    except Refused:
        return  # each row will say why
    if len(text) > LONGEST:
        raise UserError(
            f"{named.template_name} writes {len(text):,} characters for two short turns; set --chat-template"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{named.template_name} writes half a surrogate pair, which no tokenizer can read") from None
    for what, words in (("request", tokenizer_trial.QUESTION), ("answer", tokenizer_trial.ANSWER)):
        if words not in text:
            raise UserError(f"{named.template_name} leaves out the {what}; pass another with --chat-template")
    if text.index(tokenizer_trial.ANSWER) < text.index(tokenizer_trial.QUESTION):
        raise UserError(f"{named.template_name} puts the answer before its request; pass another with --chat-template")


@lru_cache(maxsize=64)
def _check_ends(what: str, tokenizer: str | None, _changed: int, templates: tuple[str, ...], variables: str) -> None:
    """Raises UserError if a tokenizer.json or a template fails, or does not finish within its limit."""
    job = {"tokenizer": tokenizer, "templates": templates, "variables": json.loads(variables)}
    if not tokenizer and not templates:
        return
    process = subprocess.Popen(
        [sys.executable, "-P", tokenizer_trial.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "2"},
        text=True,
    )
    try:
        output, _ = process.communicate(json.dumps(job), timeout=PROCESS_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
    done = [json.loads(line) for line in output.splitlines()]
    patterns = _patterns(tokenizer) if tokenizer else ""
    which = f" (regular expressions: {patterns})" if patterns else ""
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise UserError(f"{what}{which} does not end within {tokenizer_trial.LIMIT} s, so it can't be used on rows")
    if failed := next((each["error"] for each in done if each["error"]), None):
        raise UserError(f"{what}{which} fails: {failed}")
    if len(done) < len(templates) + bool(tokenizer):
        raise UserError(f"{what}{which} crashes the process that tests it (exit code {process.returncode})")


def _patterns(tokenizer: str) -> str:
    """The regular expressions in a tokenizer.json, cut."""
    found: list[str] = []
    pending: list[Any] = [{k: v for k, v in read_config(Path(tokenizer)).items() if k not in ("model", "added_tokens")}]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            found += [v for k, v in each.items() if k == "Regex" and isinstance(v, str)]
        pending += each.values() if isinstance(each, dict) else each if isinstance(each, list) else []
    return shown(found)


def _read(file: Path, what: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} can't be read: {first_line(error)}; pass another with --chat-template") from error
