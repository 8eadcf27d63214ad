"""What is made from the bundled anchors, and what is kept about a model."""

import codecs
import json

import numpy as np
import pytest

from gradshield.base.assets import ASSETS
from gradshield.base.errors import UserError
from gradshield.data.requests import read_requests
from gradshield.scoring.anchors import anchor_examples
from gradshield.scoring.check import check_alignment
from gradshield.scoring.intent.fit import fit_intent
from gradshield.scoring.intent.late import late_anchors, long_refusals


def bundled(kind: str) -> list[dict]:
    return [json.loads(line) for line in (ASSETS / f"anchors_{kind}.jsonl").read_text().split("\n") if line]


def test_harm_behind_a_refusal_begins_where_it_is_said_to(tiny):
    anchors, rows = anchor_examples(tiny), bundled("harmful")
    found = late_anchors(tiny, anchors["harmful"])
    assert [late.harmful for late in found] == list(range(len(anchors["harmful"])))
    for late in found:
        anchor, ids = anchors["harmful"][late.harmful], late.example.ids
        words = rows[anchor.row]["response"]
        rest = tiny.tokenizer.decode(ids[late.start :])
        assert rest.lower().lstrip().startswith(words.lower().strip()), (rest, words)
        start = int(np.argmax(late.example.mask))
        assert late.start - start > 2 and np.array_equal(ids[:start], anchor.ids[:start])
        before = tiny.tokenizer.decode(ids[start : late.start])
        assert before.startswith(bundled("refusal")[late.refusal]["response"].split(". ")[0].rstrip("."))


def test_long_refusals_go_on_behind_the_refusal_and_are_the_same_every_time(tiny):
    found = long_refusals(tiny)
    assert len(found) == len(bundled("refusal"))
    for example, row in zip(found, bundled("refusal")):
        said = tiny.tokenizer.decode(example.ids[example.mask])
        assert said.startswith(row["response"]) and len(said) > len(row["response"]) + 40
    again = long_refusals(tiny)
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(found, again))


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


def test_states_that_are_no_numbers_are_one_line(tiny):
    anchors = {kind: examples[:6] for kind, examples in anchor_examples(tiny).items()}
    block = tiny.layers[1]
    handle = block.register_forward_hook(lambda _m, _a, out: (out[0] if isinstance(out, tuple) else out) * float("nan"))
    try:
        with pytest.raises(UserError, match="--dtype"):
            fit_intent(tiny, anchors, [], ["Rob a shop"] * 5, ["Bake a cake"] * 5, 512)
    finally:
        handle.remove()
