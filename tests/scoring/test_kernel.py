"""The kernel readout tells what combinations of words are about, and what it has not seen is out of fold."""

import numpy as np
import pytest
import torch

from gradshield.data.encode import Example
from gradshield.scoring.intent import fit
from gradshield.scoring.intent.corpus import Text
from gradshield.scoring.intent.kernel import STRIDE, WINDOW, kernel_log_odds, window_means, windows
from gradshield.scoring.intent.spans import Response

ASKED, SAID = 10, 12  # tokens


def made(kind: str, harmful: bool, number: int, turn: int = 0):
    example = Example(0, np.arange(ASKED + SAID, dtype=np.int32), np.arange(ASKED + SAID) >= ASKED)
    response = Response(np.arange(ASKED), ASKED, ASKED + SAID)
    return fit._Row(Text(example, kind, harmful, (f"{number}",), turn), example, response)


@pytest.fixture(scope="module")
def crossed():
    """Requests about two things each: harmful where both are there or neither is, so that no line separates them."""
    rng = np.random.default_rng(0)
    rows, states = [], []
    for n in range(160):
        one, other = rng.choice([-1.0, 1.0], 2)
        about = np.array([one, other, 0, 0, 0, 0])
        rows.append(made("request", one == other, n))
        states.append((about + 0.3 * rng.normal(size=(ASKED + SAID, 6))).astype(np.float16))
    return rows, states, np.arange(160) % fit.FOLDS


def test_it_tells_what_no_line_tells_and_so_on_what_it_has_not_seen(crossed):
    rows, states, fold = crossed
    kernel, asked = fit._fit_kernel(rows, states, fold)
    harmful = np.array([row.text.harmful for row in rows])
    assert asked[harmful].min() > asked[~harmful].max()
    line = fit._fits(fit._topic_bags(rows, states, fold), soft=True, c=1.0).mean(0)
    linear = np.array([(held[:ASKED] @ line[:-1]).mean() for held in states])
    assert linear[harmful].min() < np.median(linear[~harmful])
    means = [window_means(torch.from_numpy(held), windows(np.arange(ASKED))) for held in states]
    whole = np.array([kernel_log_odds(kernel, each).max() for each in means])
    assert np.corrcoef(whole, asked)[0, 1] > 0.95 and whole[harmful].min() > whole[~harmful].max()


def test_a_row_is_read_by_the_fit_that_has_not_seen_it(crossed):
    rows, states, fold = crossed
    away = [*states[:9], states[9] + np.float16([0, 0, 6, 6, 0, 0]), *states[10:]]  # unlike every other
    found = []
    for harmful in (True, False):
        labelled = [*rows[:9], made("request", harmful, 9), *rows[10:]]
        found.append(fit._fit_kernel(labelled, away, fold))
    assert found[0][1][9] == pytest.approx(found[1][1][9], abs=0.05)
    mean = window_means(torch.from_numpy(away[9]), windows(np.arange(ASKED)))
    known = [kernel_log_odds(kernel, mean).max() for kernel, _ in found]  # by the mean of fits, most of which have
    assert known[0] > known[1] + 0.2


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, WINDOW + STRIDE, 41])
def test_windows_cover_every_token_and_are_whole(length):
    places = windows(np.arange(5, 5 + length))
    assert set(np.concatenate(places)) == set(range(5, 5 + length))
    assert all(len(each) == min(WINDOW, length) for each in places) and len({int(p[0]) for p in places}) == len(places)
    states = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    slow = torch.stack([states[each].mean(0) for each in places])
    torch.testing.assert_close(window_means(states, places), slow)


def test_of_every_second_harmless_answer_the_first_window_counts_as_an_answer():
    kinds = ["good"] * 6 + ["refusal"] * 2 + ["harmful"] * 2
    rows = [made(kind, kind != "good", n) for n, kind in enumerate(kinds)]
    states = [np.full((ASKED + SAID, 2), n, dtype=np.float16) for n in range(len(rows))]
    bags = fit._answer_bags(rows, states, np.zeros(len(rows), dtype=int))
    read = [(int(x[0]), bool(label)) for x, label in zip(bags.x, bags.label[bags.of])]
    each = len(range(0, SAID - fit.ANSWER_WINDOW + 1, fit.ANSWER_WINDOW // 2))
    assert each > 1 and len(read) == 3 + 4 * each
    assert [n for n, _ in read if n < 6] == [1, 3, 5] and all(label == (n not in (6, 7)) for n, label in read)
