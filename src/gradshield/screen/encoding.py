"""The rows of a source as examples, each with its place in the file, or the reason why it can't be encoded."""

import sys
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from gradshield.base.errors import UserError
from gradshield.base.progress import progress
from gradshield.base.settings import FilterSettings, RowSettings
from gradshield.data import Row, Source, detect_layout, open_source, read_rows, to_conversation
from gradshield.data.columns import Groups, Places
from gradshield.data.encode import Example, encode
from gradshield.data.examples import Examples, in_processes
from gradshield.scoring.base import Need
from gradshield.screen.train_script import trl_form

if TYPE_CHECKING:
    from gradshield.models.load import Model  # imports torch

LAYOUT_SAMPLE = 50  # first records that tell the layout
LONGEST_REASON = 300  # characters: a reason may quote the row, and all are held in memory
WITHOUT_REQUEST = "use --scorer fihs:normalise=module, which needs none"


@dataclass(frozen=True)
class Encoded:
    """A source's rows as examples; rows that are none are in `reasons` by index."""

    rows: int
    examples: Sequence[Example]
    reasons: dict[int, str]
    groups: Sequence[str]  # of each row: its "source" or "dataset" value, else its file
    places: Sequence[str]  # of each row: file:line
    forms: Sequence[str]  # of each row: how TRL sees it (`trl_form`)


def find_layout(source: Source, settings: RowSettings) -> str:
    """The layout of the source's records. Raises UserError, naming the columns, when it is none of the known ones."""
    first: Row | None = None
    records: list[dict] = []
    for row in read_rows(source):
        first = first or row
        records += [row.record] if row.record is not None else []
        if len(records) == LAYOUT_SAMPLE:
            break
    if first is None:
        raise UserError(f"{source.path}: holds no rows")
    if not records:
        raise UserError(f"{first.source}:{first.line}: {first.problem} (no other row is usable either); fix the file")
    layout = detect_layout(records, settings.columns)
    if layout is None:
        names = ", ".join(sorted({name for record in records for name in record})[:12])
        raise UserError(
            f"{source.path}: columns {names} match no known layout; use --map prompt=COLUMN --map response=COLUMN"
        )
    return layout


def encode_source(
    source: Source, layout: str, model: "Model", settings: RowSettings, needs: Collection[Need] = ()
) -> Encoded:
    """Every row as an example, or with the reason to set it aside. Raises UserError when no row is usable."""
    examples: Examples | list[Example] = [] if "text" in needs else Examples()
    reasons: dict[int, str] = {}
    groups, places, forms = Groups(), Places(source.names), Groups()
    encode_one = partial(encode_row, layout=layout, model=model, settings=settings, needs=needs)
    with progress("reading", 0, 0) as advance, closing(in_processes(encode_one, read_rows(source))) as done:
        for row, example in done:
            groups.append(_group(row), row.source)
            places.append(row)
            forms.append(trl_form(row.record or {}), "others")
            if isinstance(example, str):
                reasons[row.index] = sys.intern(example[:LONGEST_REASON])
            else:
                examples.append(example)
            advance(0, 1)
    if not examples:
        first = f"{places[0]}: {reasons[0]}" if len(places) else f"{source.path}: holds no rows"
        alike = ", all for one reason" if len(places) > 1 == len(set(reasons.values())) else ""
        raise UserError(f"no usable row among {len(places)}{alike}; the first: {first}")
    return Encoded(len(places), examples, reasons, groups, places, forms)


def encode_row(
    row: Row, layout: str, model: "Model", settings: RowSettings, needs: Collection[Need] = ()
) -> Example | str:
    """The row's example as a scorer with these needs takes it, or why it is set aside."""
    if row.record is None:
        return row.problem or "not readable"
    conversation = to_conversation(row.record, layout, settings.columns, settings.trainer)
    if isinstance(conversation, str):
        return conversation
    if "request" in needs and conversation.text is not None:
        return f"plain text contains no request ({WITHOUT_REQUEST})"
    example = encode(conversation, row.index, model.tokenizer, max_length=settings.max_length, loss_on=settings.loss_on)
    if isinstance(example, str):
        return example
    if len(example.ids) > (model.positions or len(example.ids)):
        return f"it has {len(example.ids)} tokens, and the model {model.positions} positions (lower --max-length)"
    return replace(example, conversation=conversation) if "text" in needs else example


def known_good(model: "Model", settings: FilterSettings, needs: Collection[Need]) -> list[Example]:
    """The user's own rows that are known to be good; none without --reference."""
    if settings.reference is None:
        return []
    source = open_source(settings.reference)
    return list(encode_source(source, find_layout(source, settings), model, settings, needs).examples)


def _group(row: Row) -> str:
    for name in ("source", "dataset"):
        value = (row.record or {}).get(name)
        if isinstance(value, str) and len(value) <= 100:
            return value
    return row.source
