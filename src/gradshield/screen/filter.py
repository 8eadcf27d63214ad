"""From a training file and an aligned model to the rows that are safe to train on: one run folder, resumable."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from gradshield import threshold as thresholds
from gradshield.base.errors import UserError
from gradshield.base.progress import followed_by
from gradshield.base.settings import FilterSettings
from gradshield.data import Source, open_source
from gradshield.data.encode import Example
from gradshield.data.examples import Examples, token_counts
from gradshield.data.run_folder import (
    JOURNAL,
    SavedRun,
    catch_write_errors,
    checksums,
    find_run,
    open_run,
    plan_of,
    write_run,
)
from gradshield.data.summaries import FilterSummary, ProbesSummary, ThresholdSummary
from gradshield.data.write import write_outputs
from gradshield.models.load import Model, load_settings_model, parked_on_cpu
from gradshield.models.memory import return_memory
from gradshield.models.on_disk import disk_fingerprint
from gradshield.report.filter_report import keep_for_report, report_run
from gradshield.scoring.base import Scores
from gradshield.scoring.check import check_cache_file, require_aligned
from gradshield.scoring.engine import score
from gradshield.scoring.reference import Reference, key_of, make_reference
from gradshield.screen.encoding import Encoded, encode_source, find_layout, known_good
from gradshield.screen.mark_tokens import COST, explain_highest
from gradshield.screen.rebuild import build_scorer, portable_settings
from gradshield.screen.scores_file import values_by_row, write_scores
from gradshield.screen.train_script import note_of_kept, write_script
from gradshield.screen.validate import find_checked
from gradshield.threshold import Threshold, is_kept


def run_filter(path: str | Source, out: Path, settings: FilterSettings, model: Model | None = None) -> FilterSummary:
    """Filters `path` into the run folder `out` and returns the summary that run.yaml ends with.

    `path` may be opened already, as a stream can be only once, and `model` is the settings' model where it is loaded.
    Safe to interrupt: calling it again resumes the run. A finished run returns its summary at once.
    Raises UserError for anything the user can fix, before anything is lost.
    """
    start = time.monotonic()
    scorer, options = find_checked(settings)
    source = path if isinstance(path, Source) else open_source(path, settings.format, settings.split, out)
    layout = find_layout(source, settings)
    model = model or load_settings_model(settings)
    plan = plan_of(
        source,
        model,
        layout,
        settings.model_dump(mode="json"),
        disk_fingerprint(settings),
        scorer={"name": scorer.name, "version": scorer.version, **options.model_dump(mode="json")},
        file=checksums(settings.probes, settings.reference),
    )
    if finished := find_run(out, plan, FilterSummary):
        return finished
    with followed_by(None):
        check = require_aligned(model, settings)
    encoded = encode_source(source, layout, model, settings, scorer.needs)
    own_safe = known_good(model, settings, scorer.needs)
    rows_key = key_of(encoded.examples) if "whole file" in scorer.needs else ""
    tokens = int(token_counts(encoded.examples).sum())
    explaining = round(COST / (scorer.cost or COST) * min(tokens, model.batch_tokens))  # at the pace of the scoring
    with followed_by(tokens + explaining):
        reference = make_reference(model, check, settings, encoded.examples, rows_key, own_safe)
        good = good_scores(reference, own_safe, settings, model.batch_tokens)
    engine = None
    if settings.engine == "ray":
        from gradshield.scoring.ray import ray_engine

        build = partial(build_scorer, portable_settings(settings, model), model.fingerprint, rows_key)
        engine = ray_engine(build, {*reference.files, check_cache_file(model, settings.probes)}, settings.workers)
    find_threshold(np.empty(0), good, reference, settings)  # what can go wrong goes wrong before the scoring
    with open_run(out, plan):
        journal = out / JOURNAL
        rows = scored_parts(encoded.examples, reference)
        with followed_by(explaining), parked_on_cpu(model) if engine else nullcontext():  # an actor may need its GPU
            scores = score(rows, reference.scorer, batch_tokens=model.batch_tokens, journal=journal, engine=engine)
        leave_out_unscored(encoded, scores)
        threshold = find_threshold(scores["score"], good, reference, settings)
        by_row = {name: values_by_row(values, encoded) for name, values in scores.columns.items()}
        words_of = np.array(["quarantined", "kept"], dtype=object)  # eight bytes a row
        verdicts = words_of[is_kept(by_row["score"], threshold.value).astype(int)]
        verdicts[list(encoded.reasons)] = "set aside"
        counts = write_outputs(source, verdicts.tolist(), encoded.reasons, out)
        marked = explain_highest(model, check, settings, encoded, by_row["score"])
        keep_for_report(out, reference.anchors, marked, scorer.unit)
        with catch_write_errors(out):
            write_scores(out, encoded, by_row, verdicts)
        seconds = time.monotonic() - start
        note = note_of_kept(vars(settings), encoded.forms, verdicts)
        summary = FilterSummary(
            file=source.path,
            rows=encoded.rows,
            kept=counts["kept"],
            quarantined=counts["quarantined"],
            set_aside=counts["set aside"],
            model=model.name,
            scorer=settings.scorer,
            threshold=ThresholdSummary(**vars(threshold)),
            probes=ProbesSummary(refused=sum(check.refused), of=len(check.refused), grade=check.grade),
            **({"rows_digest": rows_key} if rows_key else {}),
            **({"trl_note": note} if note else {}),
            seconds=round(seconds, 1),
            rows_per_second=round(encoded.rows / seconds, 1),
            tokens_per_second=round(tokens / seconds),
            version=version("gradshield"),
        )
        del encoded, rows, scores, by_row, verdicts  # with millions of rows, the report needs the memory
        return_memory()
        finished = SavedRun(**plan.as_dict(), summary=summary)
        with catch_write_errors(out):
            write_script(out, settings)
            report_run(out, finished, source)
            write_run(out, finished.as_dict())
            journal.unlink(missing_ok=True)
    return summary


def scored_parts(examples: Sequence[Example], reference: Reference) -> Sequence[Example]:
    """What the scorer reads of the examples, in a file of its own where they are in one."""
    if not isinstance(examples, Examples):
        return reference.scored_part(examples)
    rows = Examples()
    for start in range(0, len(examples), 1000):
        for example in reference.scored_part(examples[start : start + 1000]):
            rows.append(example)
    return rows


def leave_out_unscored(encoded: Encoded, scores: Scores) -> None:
    """Adds the reason of rows without a score: they can't be called safe. Raises UserError if no row has one."""
    values = scores["score"]
    overflown = "its score is not a finite number: the model overflows on it"
    why = {n: scores.reasons.get(n, overflown) for n in np.flatnonzero(~np.isfinite(values)).tolist()}
    if len(why) == len(values):
        if set(why.values()) == {overflown}:
            raise UserError("no row's score is a finite number: the model overflows; try --dtype float32 or bfloat16")
        raise UserError(f"no row could be scored; the first: {why[0]}")
    encoded.reasons.update({encoded.examples[n].row: reason for n, reason in why.items()})


def good_scores(
    reference: Reference, own_safe: Sequence[Example], settings: FilterSettings, batch_tokens: int
) -> np.ndarray:
    """Scores of rows known to be good: the anchors that answer or refuse, and the user's own, if there are any."""
    if settings.threshold != "anchored":
        return np.empty(0)
    good = np.concatenate([reference.anchors["good"], reference.anchors["refusal"]])
    if not own_safe:
        return good
    known = reference.scored_part(own_safe)
    own = score(known, reference.scorer, batch_tokens=batch_tokens, title="known-good rows")
    return np.concatenate([good, np.delete(own["score"], list(own.reasons))])


def find_threshold(scores: np.ndarray, good: np.ndarray, reference: Reference, settings: FilterSettings) -> Threshold:
    """The threshold by the rule that the settings name."""
    if settings.threshold == "a1":
        return thresholds.a1(scores, settings.alpha)
    if settings.threshold == "fixed":
        return thresholds.fixed(settings.value or 0.0)
    if settings.threshold == "share":
        return thresholds.share(scores, settings.value or 0.0)
    return thresholds.anchored(scores, good, reference.anchors["harmful"])
