"""scores.parquet: one line for each row of the file."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gradshield.base.storage import write_whole
from gradshield.data.examples import row_numbers, token_counts
from gradshield.screen.encoding import Encoded

ROWS_PER_WRITE = 100_000  # rows that are made at once


def values_by_row(values: np.ndarray, encoded: Encoded) -> np.ndarray:
    """Values of the examples at their rows; NaN for rows set aside."""
    result = np.full(encoded.rows, np.nan)
    result[row_numbers(encoded.examples)] = values
    return result


def write_scores(out: Path, encoded: Encoded, columns: Mapping[str, np.ndarray], verdicts: np.ndarray) -> None:
    """Writes place, verdict, reason, every column of scores and the number of tokens of each row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {**columns, "tokens": values_by_row(token_counts(encoded.examples).astype(float), encoded)}
    text = ("place", "group", "verdict", "reason")
    schema = pa.schema([("row", pa.int64()), *((n, pa.string()) for n in text), *((n, pa.float64()) for n in columns)])
    with write_whole(out / "scores.parquet") as stream, pq.ParquetWriter(stream, schema) as writer:
        for start in range(0, encoded.rows, ROWS_PER_WRITE):
            part = slice(start, min(start + ROWS_PER_WRITE, encoded.rows))
            rows = range(part.start, part.stop)
            piece = {
                "row": np.arange(part.start, part.stop) + 1,
                "place": [_printable(place) for place in encoded.places[part]],
                "group": [_printable(group) for group in encoded.groups[part]],
                "verdict": verdicts[part].tolist(),
                "reason": [encoded.reasons.get(n) for n in rows],
                **{name: values[part] for name, values in columns.items()},
            }
            writer.write_table(pa.table(piece, schema=schema))


def _printable(name: str) -> str:
    """A file's name need not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()
