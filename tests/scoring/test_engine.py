"""A scorer's run: equal rows once, any batch size the same, killed at any batch it ends with the same numbers."""

import numpy as np
import pytest
from conftest import random_examples

from gradshield.base.errors import UserError
from gradshield.data.encode import Example
from gradshield.models.batching import batches
from gradshield.scoring.engine import fit_to_memory, score


def scorer(batch):
    return {"score": np.array([float(e.ids.sum()) for e in batch])}


def test_batches_hold_every_row_once_within_the_budget():
    examples = random_examples(50, 100)
    found = batches(examples, 64)
    assert sorted(n for batch in found for n in batch) == list(range(50))
    assert all(len(b) == 1 or len(b) * max(len(examples[n].ids) for n in b) <= 64 for b in found)


def test_equal_rows_are_scored_once():
    one = random_examples(1, 100)[0]
    seen = []

    def counting(batch):
        seen.extend(batch)
        return scorer(batch)

    columns = score([Example(n, one.ids, one.mask) for n in range(500)], counting, batch_tokens=64)
    assert len(seen) == 1 and (columns["score"] == one.ids.sum()).all()


def test_a_killed_run_goes_on_to_the_same_result(tmp_path):
    examples = random_examples(40, 100)
    expected = score(examples, scorer, batch_tokens=64)["score"]
    calls = 0

    def dying(batch):
        nonlocal calls
        calls += 1
        if calls > 4:
            raise KeyboardInterrupt
        return scorer(batch)

    journal = tmp_path / "journal"
    with pytest.raises(KeyboardInterrupt):
        score(examples, dying, batch_tokens=64, journal=journal)
    journal.write_bytes(journal.read_bytes()[:-7])  # the last line was cut short
    calls = -1000
    again = score(examples, dying, batch_tokens=64, journal=journal)["score"]
    assert calls + 1000 == len(batches(examples, 64)) - 3
    np.testing.assert_array_equal(again, expected)


def test_a_resume_has_the_batches_it_began_with_whatever_the_device_would_take_now(tmp_path):
    examples, journal, sizes = random_examples(40, 100), tmp_path / "journal", []

    def dying(batch):
        if len(sizes) == 4:
            raise KeyboardInterrupt
        sizes.append(len(batch))
        return scorer(batch)

    with pytest.raises(KeyboardInterrupt):
        score(examples, dying, batch_tokens=64, journal=journal)
    done = list(sizes)
    sizes[:] = [0] * 5
    again = score(examples, dying, batch_tokens=1000, journal=journal)["score"]
    assert done + sizes[5:] == [len(batch) for batch in batches(examples, 64)]
    np.testing.assert_array_equal(again, score(examples, scorer, batch_tokens=64)["score"])


def test_a_journal_of_other_rows_is_refused(tmp_path):
    journal = tmp_path / "journal"
    score(random_examples(40, 100), scorer, batch_tokens=64, journal=journal)
    with pytest.raises(UserError, match="other rows"):
        score(random_examples(7, 100), scorer, batch_tokens=64, journal=journal)


def test_a_batch_too_large_for_memory_is_halved():
    def tight(batch):
        if len(batch) > 2:
            raise MemoryError
        return scorer(batch)

    examples = random_examples(20, 100)
    np.testing.assert_array_equal(
        score(examples, tight, batch_tokens=500)["score"], score(examples, scorer, batch_tokens=500)["score"]
    )


def test_what_did_not_fit_once_is_not_tried_again():
    examples, failed = [Example(n, np.arange(20, dtype=np.int32), np.ones(20, bool)) for n in range(32)], []

    def tight(batch):
        if len(batch) > 2:
            failed.append(len(batch))
            raise MemoryError
        return {"score": np.array([float(e.row) for e in batch])}

    whole = fit_to_memory(tight)
    for start in (0, 8, 16, 24):
        found = whole(examples[start : start + 8])["score"]
        np.testing.assert_array_equal(found, np.arange(start, start + 8))
    assert failed == [8, 4]
