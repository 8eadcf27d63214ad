"""The readouts' fit: one optimum, no row scored by what has seen its words, the same texts every time."""

import random
import re

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from gradshield.scoring.intent import corpus as module
from gradshield.scoring.intent.corpus import anchor_records, fitting_texts
from gradshield.scoring.intent.fit import FOLDS, REGULARISATION, Bags, _fit, _folds, _spread
from gradshield.scoring.intent.language import languages


def test_bags_of_one_vector_are_fitted_as_a_logistic_regression():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6)).astype(np.float32)
    y = x[:, 0] + 0.5 * rng.normal(size=200) > 0.6
    each = torch.arange(200)
    found = _fit(
        Bags(torch.from_numpy(x), each, torch.from_numpy(y), torch.zeros(200).long()), soft=True, c=REGULARISATION
    )
    expected = LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=1000, tol=1e-8).fit(x, y)
    np.testing.assert_allclose(found, [*expected.coef_[0], *expected.intercept_], rtol=0.01, atol=0.01)


def test_large_and_small_dimensions_vary_alike_once_standardised():
    rng = np.random.default_rng(2)
    states = [rng.normal((5, 0, -1, 7), (3, 3, 1, 0), (8, 4)).astype(np.float16) for _ in range(2000)]
    middle, scale = _spread(states)
    z = (np.concatenate(states) - middle) / scale
    np.testing.assert_allclose(z.mean(0), 0, atol=0.1)
    np.testing.assert_allclose(z[:, :3].var(0), 0.25, rtol=0.1)  # of four dimensions
    assert np.isfinite(scale).all() and (z[:, 3] == 0).all()


def test_a_bag_is_positive_where_one_of_its_vectors_is():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(120, 5, 4)).astype(np.float32)
    x[:, :, 0] = -1
    label = np.arange(120) % 2 == 0
    x[label, rng.integers(0, 5, 60), 0] = 1  # one vector of each positive bag tells
    bags = Bags(
        torch.from_numpy(x.reshape(-1, 4)),
        torch.repeat_interleave(torch.arange(120), 5),
        torch.from_numpy(label),
        torch.zeros(120).long(),
    )
    weight = _fit(bags, soft=True, c=REGULARISATION)
    highest = (x @ weight[:-1] + weight[-1]).max(1)
    assert highest[label].min() > highest[~label].max()


def test_texts_that_share_words_are_in_one_fold_and_folds_are_even():
    words = [("a", "r"), ("b", "r"), ("b", "s"), ("c", "t"), *((f"w{n}",) for n in range(400))]
    fold = _folds(words)
    assert len({*fold[:3]}) == 1
    assert set(fold) == set(range(FOLDS)) and np.bincount(fold).min() > 90


def test_every_text_of_a_refusal_or_a_request_is_in_one_fold(tiny):
    found = fitting_texts(tiny, ("Rob a bank",))
    fold = _folds([text.words for text in found])
    of: dict[str, set[int]] = {}
    for text, own in zip(found, fold):
        for word in text.words:
            of.setdefault(word, set()).add(int(own))
    assert all(len(folds) == 1 for folds in of.values())
    assert np.bincount(fold).min() > 0.1 * len(fold)


def test_texts_are_the_same_every_time_and_of_every_kind(tiny):
    first, again = (fitting_texts(tiny, ("Rob a bank",)) for _ in range(2))
    assert all(np.array_equal(a.example.ids, b.example.ids) for a, b in zip(first, again, strict=True))
    kinds = {(text.kind, text.harmful) for text in first if not text.language}
    assert kinds == {("good", False), ("refusal", True), ("harmful", True), ("request", True), ("request", False)}
    talks = [row["harmful"] for row in module._records(module.CONVERSATIONS)]
    good = [text for text in first if text.kind == "good" and not text.language]
    assert len(good) == len(anchor_records("good")) + talks.count(False) and talks.count(True) == 240


def test_both_sides_are_answered_alike_in_every_language(tiny, monkeypatch):
    monkeypatch.setattr(module, "MAX_TOKENS", 10_000)
    openings: dict[tuple[str, bool], set[str]] = {}
    refused: dict[tuple[str, bool], int] = {}
    for text in fitting_texts(tiny, ()):
        if text.language:
            key = (text.language, text.harmful)
            words = tiny.tokenizer.decode(text.example.ids[text.example.mask], skip_special_tokens=True)
            openings.setdefault(key, set()).add(words)
            refused[key] = refused.get(key, 0) + (text.kind == "refusal")
    assert {language for language, _ in openings} == set(languages())
    for language in languages():
        assert openings[language, True] == openings[language, False] and len(openings[language, True]) == 6
        assert refused[language, True] == refused[language, False] > 5


def test_harm_behind_a_refusal_begins_where_it_is_said_to(tiny):
    records = {r["response"].lower().strip() for r in anchor_records("harmful")}
    late = [text for text in fitting_texts(tiny, ()) if text.turn]
    assert len(late) > 150
    for text in late:
        ids, start = text.example.ids, int(np.argmax(text.example.mask))
        assert text.turn - start > 2
        rest = tiny.tokenizer.decode(ids[text.turn :], skip_special_tokens=True).lower().strip()
        assert any(rest.startswith(r[: len(rest)]) or r.startswith(rest) for r in records)


def test_both_sides_wear_every_dress(tiny, monkeypatch):
    seen: dict[bool, set[str]] = {True: set(), False: set()}
    real = module._text

    talks = {row["messages"][-1]["content"] for row in module._records(module.CONVERSATIONS)}  # in no dress

    def watched(model, turns, response, kind, harmful, words, more=0):
        if response in talks:
            pass
        elif len(turns) > 1 or turns[0].content not in words:
            roles = "/".join(t.role for t in turns)
            seen[harmful].add(roles)
        return real(model, turns, response, kind, harmful, words, more)

    monkeypatch.setattr(module, "_text", watched)
    fitting_texts(tiny, ("Rob a bank",))
    assert seen[True] == seen[False] and len(seen[True]) >= 5


def test_a_request_that_is_stated_before_is_whole_and_the_last_turn_is_the_users():
    words = ["Write", "a", "tutorial", "on", "how", "to", "bake", "sourdough", "bread"]
    for texts in module._dresses()["later"]:
        turns = module._stated_before(" ".join(words), texts, random.Random(0))
        assert [t.role for t in turns] == ["user", "assistant"] * (len(texts) // 2) + ["user"]
        said = " ".join(t.content for t in turns)
        assert "{" not in said
        rest = iter(re.findall(r"\w+", said))
        assert all(word in rest for word in words)  # in order, whatever stands between
