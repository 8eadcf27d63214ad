"""The requests of a final figure are none that a decision, a scorer or an alignment has seen."""

import json
import re

import pytest

from gradshield.base.assets import ASSETS
from gradshield.evaluation.sources import harmful_requests, unseen_requests


def words(text: str) -> set[str]:
    return set(re.findall("[a-z]{4,}", text.lower()))


def bundled_texts() -> set[str]:
    records = [json.loads(line) for file in ASSETS.glob("*.jsonl") for line in file.read_text("utf-8").splitlines()]
    return {r[key] for r in records for key in ("prompt", "harmful") if isinstance(r.get(key), str)}


def test_no_bundled_text_says_what_an_unseen_request_says():
    known = [words(text) for text in bundled_texts()]
    for request in unseen_requests("bundled", 1000):
        own = words(request)
        assert max(len(own & other) / len(own | other) for other in known if other) <= 0.5, request


def test_the_unseen_requests_of_a_file_are_those_that_are_not_asked(tmp_path):
    file = tmp_path / "requests.jsonl"
    everything = [f"Request number {n}" for n in range(10)]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in everything), encoding="utf-8")
    asked, unseen = harmful_requests(str(file), 6, seed=1), unseen_requests(str(file), 6, seed=1)
    assert len(asked) == 6 and sorted(asked + unseen) == everything
    assert unseen_requests(str(file), 6, seed=1) == unseen
    assert unseen_requests(str(file), 10, seed=1) == []


@pytest.mark.parametrize("count", [3, 100])
def test_bundled_requests_are_as_many_as_asked_for(count):
    found = unseen_requests("bundled", count)
    assert len(set(found)) == count
    assert not set(found) & set(harmful_requests("bundled", 1000))
