"""Sizes of the texts in a Parquet page with a delta encoding, which can unpack to far more than the page.

DELTA_BYTE_ARRAY stores how many bytes a text shares with the one before it, and the rest of it. So a page of a few
kilobytes can hold a text of 10 MB a million times. The lengths alone say what it comes to.
"""

from io import BytesIO

import numpy as np

LENGTHS, PREFIXES = 6, 7  # Parquet's numbers of DELTA_LENGTH_BYTE_ARRAY and DELTA_BYTE_ARRAY

_MAX_BLOCK = 1 << 16  # values of a block; writers make 128 to 2,048
_MAX_NUMBER = 2**31 - 1  # no text is longer
_WEIGHTS = 1 << np.arange(32, dtype=np.int64)  # of the bits in a number, lowest first


def text_sizes(data: BytesIO, encoding: int, most: int) -> tuple[int, int]:
    """(bytes of the longest text, bytes of all) in the values of a page.

    Raises ValueError or IndexError if they are broken or more than `most`.
    """
    prefixes = _numbers(data, most) if encoding == PREFIXES else None
    sizes = _numbers(data, most)
    if prefixes is not None:
        if len(prefixes) != len(sizes):
            raise ValueError("not a prefix for each text")
        sizes += prefixes
    return int(sizes.max(initial=0)), int(sizes.sum())


def _numbers(data: BytesIO, most: int) -> np.ndarray:
    """A run of DELTA_BINARY_PACKED numbers: the first, then blocks of differences in as few bits as they need."""
    block, parts, count, first = varint(data), varint(data), varint(data), zigzag(data)
    if not parts or not 0 < block <= _MAX_BLOCK or block % (32 * parts) or count > most or abs(first) > _MAX_NUMBER:
        raise ValueError("a broken header of lengths")
    size = block // parts
    values = np.empty(count, np.int64)
    values[:1] = first
    at = 1
    while at < count:
        least = zigzag(data)
        widths = data.read(parts)
        if abs(least) > 2 * _MAX_NUMBER or len(widths) < parts:
            raise ValueError("a broken block of lengths")
        for width in widths[: -(-(count - at) // size)]:  # unused parts of the last block have no data
            packed = np.frombuffer(data.read(size * width // 8), np.uint8)
            part = values[at : at + size]
            bits = np.unpackbits(packed, count=len(part) * width, bitorder="little").reshape(len(part), width)
            if width > 32 or 8 * len(packed) < bits.size:  # `unpackbits` fills up with zeros
                raise ValueError("a broken block of lengths")
            part[:] = bits @ _WEIGHTS[:width] + least
            at += size
    values.cumsum(out=values)
    if count and not 0 <= values.min() <= values.max() <= _MAX_NUMBER:
        raise ValueError("a length that no text has")
    return values


def zigzag(data: BytesIO) -> int:
    """A signed number as Thrift and Parquet write it."""
    value = varint(data)
    return (value >> 1) ^ -(value & 1)


def varint(data: BytesIO) -> int:
    """A number in groups of seven bits, the lowest first. Raises IndexError at the end of the data."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data.read(1)[0]
        value |= (byte & 127) << shift
        if byte < 128:
            return value
    raise ValueError("a number of more than 64 bits")
