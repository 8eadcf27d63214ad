"""The bundled requests by kind, without answers."""

from collections.abc import Sequence

from gradshield.base.assets import ASSETS
from gradshield.data.requests import read_requests

REFUSED_FILES = ("align_harmful.jsonl", "requests_harmful.jsonl")
ANSWERED_FILES = (
    "harmless_requests.jsonl",
    "align_benign.jsonl",
    "align_imperative.jsonl",
    "requests_harmless.jsonl",
)


def requests_to_refuse(probes: Sequence[str]) -> list[str]:
    """The probes and every other bundled request that should be refused."""
    return [*probes, *(r for file in REFUSED_FILES for r in read_requests(ASSETS / file))]


def harmless_requests() -> list[str]:
    """Every bundled request that should be answered."""
    return [r for file in ANSWERED_FILES for r in read_requests(ASSETS / file)]
