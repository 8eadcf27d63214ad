"""What an explanation says is exact: the parts sum up to FIHS, the cosines are those of the dense gradients."""

import re
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import random_examples

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings
from gradshield.data import Row
from gradshield.models.batching import pad
from gradshield.models.hooks import gradients_from, linear_hooks, logits_at
from gradshield.scoring.fihs.contraction import contract
from gradshield.scoring.fihs.fihs import FihsOptions, harmless_part
from gradshield.scoring.fihs.parts import fihs_parts, shares, words
from gradshield.scoring.fihs.probe import Factors, ProbeGradient, inner, margin, minus, probe_gradient
from gradshield.scoring.fihs.scorer import fihs_scorer
from gradshield.scoring.reference import Reference
from gradshield.screen.explain import Explainer, _largest, explain, explain_row

PROBES = ("How do I pick a lock?", "Write a threat", "Name a poison")


@pytest.fixture(scope="module")
def gradients(tiny):
    score = margin([5], [9])
    each = [probe_gradient(tiny, [probe], score, tolerance=0) for probe in PROBES]
    return each, probe_gradient(tiny, PROBES, score, tolerance=0)


def dense(model, example) -> dict[str, torch.Tensor]:
    """∇_W L of every module, as matrices."""
    found = {}
    ids, rows, positions, targets, weights = pad([example], model.device)
    with (
        linear_hooks(model.linears, lambda _, x: x, lambda n, x, d: found.__setitem__(n, d[0].T @ x[0])),
        gradients_from(model),
    ):
        logits = logits_at(model, ids, rows, positions).float()
        (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum().backward()
    return found


def test_the_parts_sum_up_to_fihs_module_by_module(tiny, gradients):
    each, mean = gradients
    for example in random_examples(4, len(tiny.tokenizer)):
        parts, _ = fihs_parts(tiny, example, each)
        assert parts.shape == (len(PROBES), len(tiny.linears), len(example.ids))
        for part, gradient in zip(parts, each):
            torch.testing.assert_close(part, fihs_parts(tiny, example, [gradient])[0][0], rtol=1e-4, atol=1e-6)
        expected = contract(tiny, [example], mean).dots[0]
        torch.testing.assert_close(parts.mean(0).sum(1), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("contrast", ["minus", "orthogonal"])
def test_with_a_contrast_the_parts_sum_up_to_the_score_of_that_run(tiny, contrast):
    options = FihsOptions(contrast=contrast, probes=3)
    settings = FilterSettings(scorer=f"fihs:contrast={contrast},probes=3")
    s = margin([5], [9])
    each = [probe_gradient(tiny, [p], s, tolerance=0) for p in PROBES]
    plain = probe_gradient(tiny, PROBES, s, tolerance=0)
    harmless = harmless_part(tiny, each, s, options)
    mean = minus(plain, *harmless_part(tiny, [plain], s, options))
    reference = Reference(fihs_scorer(tiny, mean, "paper"), {})
    explainer = Explainer(settings, "messages", 0.0, tiny, reference, PROBES, tuple(each), harmless)
    assert harmless
    for example in random_examples(3, len(tiny.tokenizer)):
        score = reference.scorer([example])["score"][0]
        with (
            patch("gradshield.screen.explain.encode_row", lambda *_, example=example: example),
            patch("gradshield.screen.explain._refused", lambda *_: None),
        ):
            found = explain_row(explainer, Row(0, "a", 1, b"", {}, None))
        assert found.score == score
        contrasted = [minus(g, *harmless) for g in each]
        parts, norm = fihs_parts(tiny, example, contrasted)
        assert float(parts.mean(0).sum()) == pytest.approx(score, rel=1e-3)
        for (_, cosine), wanted in zip(
            sorted(found.probes),
            (c for _, c in sorted((p, float(part.sum()) / (norm * inner(g, g)) ** 0.5)
                                  for p, part, g in zip(PROBES, parts, contrasted))),
        ):  # fmt: skip
            assert cosine == pytest.approx(wanted, rel=1e-3)
        assert dict(found.modules) == pytest.approx(
            dict(_largest(list(each[0].factors), shares(parts.mean(0).sum(1)))), rel=1e-3, abs=1e-6
        )
        assert fihs_scorer(tiny, plain, "paper")([example])["score"][0] != pytest.approx(score, rel=1e-2)


def test_norm_and_products_are_those_of_the_dense_gradients(tiny, gradients):
    each, _ = gradients
    example = random_examples(1, len(tiny.tokenizer), seed=3)[0]
    parts, norm = fihs_parts(tiny, example, each)
    loss = dense(tiny, example)
    assert norm == pytest.approx(sum(float(g.square().sum()) for g in loss.values()), rel=1e-4)
    for part, gradient in zip(parts.sum((1, 2)), each):
        product = sum(float((loss[n] * f.dense()).sum()) for n, f in gradient.factors.items())
        assert float(part) == pytest.approx(product, rel=1e-3, abs=1e-6)
        assert abs(product) <= (norm * inner(gradient, gradient)) ** 0.5


def test_a_row_s_own_gradient_is_its_nearest_probe(tiny):
    example = random_examples(1, len(tiny.tokenizer), seed=5)[0]
    own = ProbeGradient({n: Factors(torch.eye(g.shape[1]), g.T) for n, g in dense(tiny, example).items()})
    parts, norm = fihs_parts(tiny, example, [own])
    assert float(parts.sum()) == pytest.approx(norm, rel=1e-4) == pytest.approx(inner(own, own), rel=1e-4)


def test_tokens_that_only_together_make_a_character_are_one_and_none_is_lost(tiny):
    from gradshield.data.encode import Example

    text = "Sure, 你好 👍 é"
    ids = np.array(tiny.tokenizer(text)["input_ids"], dtype=np.int32)
    shares = np.linspace(-1, 1, len(ids)).tolist()
    found = words(tiny.tokenizer, Example(0, ids, np.ones(len(ids), bool)), shares)
    assert "".join(word for word, _ in found) == text and "👍" in dict(found)
    assert sum(share for _, share in found) == pytest.approx(sum(shares))


def test_what_is_learnt_at_a_position_counts_for_the_token_that_is_said_next(tiny):
    from gradshield.data.encode import Example

    ids = np.array(tiny.tokenizer("a b c d e f")["input_ids"], dtype=np.int32)
    mask = np.zeros(len(ids), bool)
    mask[[3, 4]] = True
    shares = [0.0] * len(ids)
    shares[1], shares[2], shares[4] = 0.25, 0.5, -0.25  # of the prompt, for its first answer token, behind its last
    told = [share for _, share in words(tiny.tokenizer, Example(0, ids, mask), shares)]
    assert told[1:5] == [0.25, 0.0, 0.5, -0.25]
    only = words(tiny.tokenizer, Example(0, ids, mask), shares, responses_only=True)
    assert [share for _, share in only] == [0.5, -0.25]


def test_the_first_space_of_a_token_stays_where_the_decoder_drops_the_one_a_text_begins_with(tiny):
    from gradshield.data.encode import Example

    class WholeRuns:  # as byte fallback: all of a run of bytes is unreadable when a part of it is
        def __init__(self, tokenizer):
            self.tokenizer = tokenizer

        def decode(self, ids, **more):
            said = self.tokenizer.decode(ids, **more)
            bad = said.strip("\ufffd") != said and "\ufffd"
            return re.sub(r"[^\x00-\x7f]", bad, said) if bad else said

    class Stripping:  # as Llama 2's
        def decode(self, ids, **_):
            return "".join([" Sure", ",", " here", " is"][n] for n in ids).removeprefix(" ")

    text = "Hi 😀😁😂🤣é Hi"
    ids = np.array(tiny.tokenizer(text)["input_ids"], dtype=np.int32)
    found = words(WholeRuns(tiny.tokenizer), Example(0, ids, np.ones(len(ids), bool)), [0.0] * len(ids))
    assert "".join(word for word, _ in found) == text
    found = words(Stripping(), Example(0, np.arange(4, dtype=np.int32), np.ones(4, bool)), [0.0] * 4)
    assert [text for text, _ in found] == ["Sure", ",", " here", " is"]


def test_scores_of_fewer_rows_than_the_run_has_are_one_line(tmp_path, monkeypatch):
    run = SimpleNamespace(summary=SimpleNamespace(rows=3))
    monkeypatch.setattr("gradshield.screen.explain.row_of_run", lambda *_: (run, None))
    pq.write_table(pa.table({"verdict": ["kept"]}), tmp_path / "scores.parquet")
    with pytest.raises(UserError, match=r"not the scores of this run \(1 rows\)"):
        explain(tmp_path, 2)
