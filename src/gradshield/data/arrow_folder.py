"""The Arrow files of a `datasets` folder: whether they can be mapped into memory as they are."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

_DICTIONARY, _BATCH = 2, 3  # kinds of a message that has columns (Message.fbs of Apache Arrow)


def compressed_file(folder: Path) -> Path | None:
    """The first Arrow file of a `save_to_disk` folder whose columns are compressed, found in the headers alone.

    `datasets` maps files into memory and never compresses them. Loading a compressed one would unpack all of it.
    """
    import pyarrow

    for file in _files(folder):
        with pyarrow.memory_map(str(file)) as mapped:
            for message in pyarrow.ipc.MessageReader.open_stream(mapped):
                if _is_compressed(message.metadata.to_pybytes()):
                    return file
    return None


def _files(folder: Path) -> Iterator[Path]:
    splits = folder / "dataset_dict.json"
    folders = [folder / name for name in json.loads(splits.read_bytes())["splits"]] if splits.exists() else []
    for each in (folder, *folders):
        if (each / "state.json").exists():
            yield from (
                each / part["filename"] for part in json.loads((each / "state.json").read_bytes())["_data_files"]
            )


def _is_compressed(message: bytes) -> bool:
    """Whether an Arrow message, which is a FlatBuffer, holds columns and names their codec."""

    def follow(at: int) -> int:
        return at + struct.unpack_from("<I", message, at)[0]

    def place(table: int, field: int) -> int | None:
        """Where the table has the field of this number."""
        fields = table - struct.unpack_from("<i", message, table)[0]
        size = struct.unpack_from("<H", message, fields)[0]
        at = struct.unpack_from("<H", message, fields + 4 + 2 * field)[0] if 4 + 2 * field < size else 0
        return table + at if at else None

    root = follow(0)
    kind, header = place(root, 1), place(root, 2)
    if kind is None or header is None or message[kind] not in (_DICTIONARY, _BATCH):
        return False
    batch: int | None = follow(header)
    if message[kind] == _DICTIONARY:
        inner = place(batch, 1)
        batch = None if inner is None else follow(inner)
    return batch is not None and place(batch, 3) is not None
