"""What is made from the bundled anchors, and what is kept about a model."""

import codecs
import json
from contextlib import contextmanager

import pytest

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings
from gradshield.data.requests import read_requests
from gradshield.scoring import anchors
from gradshield.scoring.check import AlignmentCheck, check_alignment
from gradshield.scoring.intent.corpus import fitting_texts
from gradshield.scoring.intent.fit import fit_readouts
from gradshield.scoring.reference import make_reference


@pytest.mark.parametrize(
    "line", ['{"prompt": null}', '{"prompt": [{"role": "user", "content": "a"}]}', '{"prompt": " "}', "{"]
)
def test_a_request_that_is_no_text_is_told_with_its_line(tmp_path, line):
    file = tmp_path / "probes.jsonl"
    file.write_bytes(codecs.BOM_UTF8 + b'{"prompt": "Rob a shop"}\n\n' + line.encode())
    with pytest.raises(UserError, match=r"probes\.jsonl:3: not a JSON object with a text"):
        read_requests(file)
    file.write_bytes(codecs.BOM_UTF8 + b'{"prompt": "Rob a shop"}\nHarm a man\n')
    assert read_requests(file) == ["Rob a shop", "Harm a man"]


def test_a_cache_that_can_not_be_read_is_none(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSHIELD_CACHE", str(tmp_path))
    first = check_alignment(tiny)
    (file,) = tmp_path.iterdir()
    file.write_text('{"probes": [')
    assert check_alignment(tiny) == first and json.loads(file.read_text())


def test_anchors_from_the_cache_have_the_order_of_those_just_scored(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("GRADSHIELD_CACHE", str(tmp_path))
    every = anchors.anchor_rows
    monkeypatch.setattr(anchors, "anchor_rows", lambda kind: every(kind)[:2])
    check = AlignmentCheck(("Rob a shop",), (True,), ("I can't",), (1.0,), ())
    settings = FilterSettings(scorer="fihs:probes=1")
    first, again = (list(make_reference(tiny, check, settings).anchors) for _ in range(2))
    assert first == again == list(anchors.ANCHOR_FILES)


def test_states_that_are_no_numbers_are_one_line(tiny, tmp_path):
    block = tiny.layers[1]
    handle = block.register_forward_hook(lambda _m, _a, out: (out[0] if isinstance(out, tuple) else out) * float("nan"))
    try:
        with pytest.raises(UserError, match="--dtype"):
            fit_readouts(tiny, fitting_texts(tiny, ())[::40], 512, tmp_path)
    finally:
        handle.remove()


def test_the_first_wait_with_a_model_says_what_it_is_and_the_second_time_there_is_none(tiny, monkeypatch):
    titles = []

    @contextmanager
    def watched(title, *_):
        titles.append(title)
        yield lambda *_: None

    monkeypatch.setattr("gradshield.models.generate.progress", watched)
    first = check_alignment(tiny)
    assert titles == ["first use of tiny: checking whether it refuses"]
    assert check_alignment(tiny) == first and len(titles) == 1
