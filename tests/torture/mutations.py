"""Input files with bytes flipped, cut, doubled, put in, or halves of two formats in one: every row is accounted for,
or the file is refused in one line."""

import gzip
import io
import json
import random
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from gradshield.base.errors import UserError
from gradshield.data import detect_layout, open_source, read_rows, to_conversation, write_outputs
from torture.process import CRASHED, apart

AT_ONCE = 200  # cases a process
MEMORY = 6 << 30
ODD = (b"\0", b"\xff", b'"', b"\n", b"{", b"[", b"\\", b"\xed\xa0\x80")


def campaign(count: int, seed: int, work: Path) -> Counter[str]:
    """Tries `count` files; the counter has "read", "refused", and "failed: ..." for what must not be."""
    found: Counter[str] = Counter()
    begin = 0
    while begin < count:
        end = min(begin + AT_ONCE, count)
        log = work / "outcomes"
        log.write_text("")
        ended = apart(partial(_cases, begin, end, seed, work, log), work, 600, MEMORY)
        outcomes = log.read_text(encoding="utf-8").splitlines()
        found.update(outcomes)
        begin += len(outcomes)
        if ended.code:  # the case after the last outcome took the process with it
            how = "traceback" if ended.code == CRASHED else f"exit {ended.code}"
            found[f"failed: case {begin} of seed {seed}: {how} {ended.said[-300:]!r}"] += 1
            begin += 1
    return found


def _cases(begin: int, end: int, seed: int, work: Path, log: Path) -> None:
    seeds = seed_files()
    with log.open("a", encoding="utf-8", buffering=1) as stream:
        for case in range(begin, end):
            draw = random.Random(f"{seed} {case}")
            name = draw.choice(list(seeds))
            file = work / name
            file.write_bytes(mutated(seeds[name], draw, list(seeds.values())))
            stream.write(_outcome(file, work / "out", case) + "\n")
            shutil.rmtree(work / "out", ignore_errors=True)
            file.unlink()


def _outcome(file: Path, out: Path, case: int) -> str:
    try:
        source = open_source(file)
        rows = [(row.record, row.problem) for row in read_rows(source)]
        layout = detect_layout([record for record, _ in rows if record is not None][:50])
        verdicts, reasons = [], {}
        for n, (record, problem) in enumerate(rows):
            said = to_conversation(record, layout) if record is not None and layout else problem or "no layout"
            if isinstance(said, str):
                reasons[n] = said
            verdicts.append("set aside" if n in reasons else ("kept", "quarantined")[n % 2])
        counts = write_outputs(source, verdicts, reasons, out)
    except UserError:  # which the command line puts on one line, whatever is in it
        return "refused"
    if sum(counts.values()) != len(rows):
        return f"failed: case {case}: {len(rows)} rows in, {counts} out"
    return "read"


def mutated(data: bytes, draw: random.Random, others: list[bytes]) -> bytes:
    """The file with one to four mutations."""
    for _ in range(draw.randint(1, 4)):
        place, length = draw.randrange(len(data) + 1), draw.choice((1, 2, 8, 64, 512))
        kind = draw.choice(("flip", "byte", "cut", "drop", "double", "put in", "merge"))
        if kind == "flip" and place < len(data):
            data = data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
        elif kind == "byte":
            data = (
                data[:place]
                + draw.choice((b"\0", b"\xff", b'"', b"\n", b"{", b"[", b"\\", b"\xed\xa0\x80"))
                + data[place:]
            )
        elif kind == "cut":
            data = data[:place]
        elif kind == "drop":
            data = data[:place] + data[place + length :]
        elif kind == "double":
            data = data[:place] + data[place : place + length] * draw.randint(2, 50) + data[place:]
        elif kind == "put in":
            data = data[:place] + draw.randbytes(length) + data[place:]
        elif kind == "merge":
            other = draw.choice(others)
            data = data[:place] + other[draw.randrange(len(other) + 1) :]
    return data


def seed_files() -> dict[str, bytes]:
    """A small sound file of each format, by name."""
    pairs = [{"prompt": f"Question {n}: é 漢", "completion": f'An answer, "{n}"'} for n in range(12)]
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello there"}]
    chats = [{"messages": turns, "source": f"s{n}"} for n in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in pairs).encode()
    csv = "prompt,completion\r\n" + "".join(f'q {n},"an ""answer"",\nof two lines {n}"\r\n' for n in range(12))
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(pairs), table, row_group_size=5)
    nested = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(chats), nested, compression="zstd")
    return {
        "pairs.jsonl": lines,
        "chats.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chats).encode(),
        "array.json": json.dumps(pairs, indent=1).encode(),
        "under-a-key.json": json.dumps({"version": 1, "data": pairs}).encode(),
        "table.csv": csv.encode(),
        "table.tsv": csv.replace(",", "\t").encode(),
        "table.parquet": table.getvalue(),
        "nested.parquet": nested.getvalue(),
        "plain.txt": b"A line of text.\nAnother one.\n\nA third.\n",
        "lines.jsonl.gz": gzip.compress(lines, mtime=0),
        "lines.jsonl.zst": pa.compress(lines, "zstd", asbytes=True),
        "table.csv.gz": gzip.compress(csv.encode(), mtime=0),
    }
