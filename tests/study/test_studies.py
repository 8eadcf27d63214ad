"""The studies' tables say what their raw lines hold, however many seeds there are."""

import json

import numpy as np
import pytest
import torch

from gradshield.data.encode import encode_request
from gradshield.study import truth, tuning
from gradshield.study.kinds import BENIGN, HARMFUL, SCARY, SHIFT
from gradshield.study.real import scored_line, write_scored
from gradshield.study.separation import _write_scores, read_scores


@pytest.fixture(params=["separation", "real"])
def scores(tmp_path, request):
    """A scores.csv of either study in which `good` ranks the kinds as the cells below do, and `bad` the other way."""
    kinds, file = (*HARMFUL, *BENIGN, *SCARY, SHIFT), tmp_path / "scores.csv"
    table = {k: {"good": np.full(3, float(n)), "bad": np.full(3, -float(n))} for n, k in enumerate(kinds)}
    if request.param == "separation":
        _write_scores(file, table, {})
        return read_scores(file)[0]
    each = [(k, name, n, x) for k, own in table.items() for name, values in own.items() for n, x in enumerate(values)]
    write_scored(file, [scored_line(name, "real", k, True, n, x, "") for k, name, n, x in each])
    return truth._real_scores(file)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_score_that_ranks_the_kinds_by_what_training_did_agrees_with_it(scores, seeds):
    kinds = (*HARMFUL, *BENIGN, *SCARY, SHIFT)
    cells = [
        {"kind": k, "seed": seed, "rows": 20, "asr": 0.5, "interval": [0.3, 0.7], "log_p_refusal": -n - 0.1 * seed}
        for seed in range(seeds)
        for n, k in enumerate(kinds)
    ]
    table = truth._table(cells, 5e-4, seeds, scores)
    end = "1.00, bad -1.00" if seeds == 1 else "1.00 (1.00 to 1.00), bad -1.00 (-1.00 to -1.00)"
    assert table.strip().endswith(f"good {end}")
    first = next(line for line in table.split("\n") if line.startswith(f"| {HARMFUL[0]} |"))  # fell the least
    assert ("0.50 [0.30, 0.70]" in first) == (seeds == 1) and ("0.50 (0.50 to 0.50)" in first) == (seeds == 3)
    order = [line.split("|")[1].strip() for line in table.split("\n") if line.startswith("| ")][1:]
    assert order == list(kinds)


def test_the_tuning_table_has_a_line_for_what_only_the_seed_tells_apart(tmp_path):
    keys = dict(task="agnews", attack="sure", rows=40, harmful=30, rate=2e-4, epochs=3.0, searches=3)
    figures = dict(utility=0.5, kept_task=40, kept_poison=0, cost={"trials": 1})
    cells = [
        keys | figures | {"defense": "none", "seed": 0, "asr": 0.9},
        keys | figures | {"defense": "none", "seed": 1, "asr": 0.8},
        keys | figures | {"defense": "gradshield", "seed": 0, "asr": None, "accepted": None},
    ]
    file = tmp_path / "cells.jsonl"
    file.write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    lines = tuning._table(tuning._read(file)).strip().split("\n")[2:]
    assert len(lines) == 2 and "| 0.90, 0.80 |" in lines[0] and "| – |" in lines[1] and "rejected" in lines[1]


def test_the_log_probability_of_an_opening_is_summed_over_its_tokens(tiny):
    requests, opening = ["Say hello", "Tell me a long story", "Why?"], "Sure, but"
    target = tiny.tokenizer.encode(opening, add_special_tokens=False)
    expected = []
    for request in requests:
        ids = [*encode_request(request, tiny.tokenizer), *target]
        log_p = tiny.net(torch.tensor(ids)[None]).logits[0].log_softmax(-1)
        start = len(ids) - len(target)
        expected.append(sum(float(log_p[start - 1 + n, token]) for n, token in enumerate(target)))
    assert truth.opening_log_probability(tiny, requests, opening) == pytest.approx(expected, rel=1e-5)
