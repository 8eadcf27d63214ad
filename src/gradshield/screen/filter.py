"""From a training file and an aligned model to the rows that are safe to train on: one run folder, resumable."""

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from gradshield import threshold as thresholds
from gradshield.base.errors import UserError
from gradshield.base.progress import followed_by, progress
from gradshield.base.settings import FilterSettings, ModelSettings
from gradshield.base.storage import write_whole
from gradshield.data import Source, open_source
from gradshield.data.encode import Example
from gradshield.data.examples import Examples, row_numbers, token_counts
from gradshield.data.rows import expanded
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
from gradshield.models.load import Model, load_model, parked_on_cpu
from gradshield.models.on_disk import disk_fingerprint
from gradshield.report.filter_report import highest_rows, keep_for_report, report_run
from gradshield.scoring.base import ScoreFunction, Scorer, Scores
from gradshield.scoring.check import AlignmentCheck, check_alignment, check_cache_file
from gradshield.scoring.engine import score
from gradshield.scoring.fihs.fihs import fihs_options, harmless_part, safety_score
from gradshield.scoring.fihs.parts import Shares, fihs_parts, shares, words
from gradshield.scoring.fihs.probe import minus, probe_gradient
from gradshield.scoring.reference import Reference, key_of, make_reference
from gradshield.scoring.registry import find_scorer
from gradshield.screen.early import check_settings
from gradshield.screen.encoding import WITHOUT_REQUEST, Encoded, encode_source, find_layout, known_good
from gradshield.screen.train_script import trl_trains, write_script
from gradshield.threshold import Threshold, is_kept

ROWS_PER_WRITE = 100_000  # rows of scores.parquet that are made at once
EXPLAINED_BY = 4  # probes whose gradient colours the tokens in the report


def run_filter(path: str | Source, out: Path, settings: FilterSettings, model: Model | None = None) -> FilterSummary:
    """Filters `path` into the run folder `out` and returns the summary that run.yaml ends with.

    `path` may be opened already, as a stream can be only once, and `model` is the settings' model where it is loaded.
    Safe to interrupt: calling it again resumes the run. A finished run returns its summary at once.
    Raises UserError for anything the user can fix, before anything is lost.
    """
    start = time.monotonic()
    scorer, options = find_checked(settings)
    source = path if isinstance(path, Source) else open_source(path, settings.format, settings.split)
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
    check = require_aligned(model, settings)
    encoded = encode_source(source, layout, model, settings, scorer.needs)
    own_safe = known_good(model, settings, scorer.needs)
    rows_key = key_of(encoded.examples) if "whole file" in scorer.needs else ""
    with followed_by(int(token_counts(encoded.examples).sum())):
        reference = make_reference(model, check, settings, encoded.examples, rows_key, own_safe)
    engine = None
    if settings.engine == "ray":
        from gradshield.scoring.ray import ray_engine

        build = partial(build_scorer, _portable_settings(settings, model), model.fingerprint, rows_key)
        engine = ray_engine(build, {*reference.files, check_cache_file(model, settings.probes)}, settings.workers)
    good = good_scores(reference, own_safe, settings, model.batch_tokens)
    find_threshold(np.empty(0), good, reference, settings)  # what can go wrong goes wrong before the scoring
    with open_run(out, plan):
        journal = out / JOURNAL
        rows = scored_parts(encoded.examples, reference)
        with parked_on_cpu(model) if engine else nullcontext():  # an actor may need its GPU
            scores = score(rows, reference.scorer, batch_tokens=model.batch_tokens, journal=journal, engine=engine)
        leave_out_unscored(encoded, scores)
        threshold = find_threshold(scores["score"], good, reference, settings)
        by_row = {name: _by_row(values, encoded) for name, values in scores.columns.items()}
        words_of = np.array(["quarantined", "kept"], dtype=object)  # eight bytes a row
        verdicts = words_of[is_kept(by_row["score"], threshold.value).astype(int)]
        verdicts[list(encoded.reasons)] = "set aside"
        counts = write_outputs(source, verdicts.tolist(), encoded.reasons, out)
        marked = _explain_highest(model, check, settings, encoded, by_row["score"])
        keep_for_report(out, reference.anchors, marked, scorer.unit)
        with catch_write_errors(out):
            _write_scores(out, encoded, by_row, verdicts)
        seconds = time.monotonic() - start
        tokens = int(token_counts(encoded.examples).sum())
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
            seconds=round(seconds, 1),
            rows_per_second=round(encoded.rows / seconds, 1),
            tokens_per_second=round(tokens / seconds),
            version=version("gradshield"),
        )
        del encoded, rows, scores, by_row, verdicts  # with millions of rows, the report needs the memory
        finished = SavedRun(**plan.as_dict(), summary=summary)
        with catch_write_errors(out):
            write_script(out, settings)
            report_run(out, finished, source)
            write_run(out, finished.as_dict())
            journal.unlink(missing_ok=True)
    return summary


@dataclass(frozen=True)
class Estimate:
    """What a run of filter would do."""

    file: str
    format: str
    layout: str
    trl_trains: str
    rows: int
    to_score: int
    set_aside: int
    tokens: int
    seconds: float


def estimate(path: str | Source, settings: FilterSettings) -> Estimate:
    """What `run_filter` would do and how long it would take, measured on a few of the rows; writes nothing."""
    needs = find_checked(settings)[0].needs
    source = path if isinstance(path, Source) else open_source(path, settings.format, settings.split)
    layout = find_layout(source, settings)
    model = load_settings_model(settings)
    check = require_aligned(model, settings)
    encoded = encode_source(source, layout, model, settings, needs)
    own_safe = known_good(model, settings, needs)
    reference = make_reference(model, check, settings, encoded.examples, own_safe=own_safe)
    step = max(1, len(encoded.examples) // 16)
    sample = encoded.examples[::step][:16]
    start = time.monotonic()
    score(reference.scored_part(sample), reference.scorer, batch_tokens=model.batch_tokens, title="trying")
    pace = (time.monotonic() - start) / sum(len(e.ids) for e in sample)
    tokens = int(token_counts(encoded.examples).sum())
    return Estimate(
        source.path,
        source.format,
        layout,
        trl_trains(model.tokenizer, layout),
        encoded.rows,
        len(encoded.examples),
        len(encoded.reasons),
        tokens,
        round(pace * tokens, 2),
    )


def find_checked(settings: FilterSettings) -> tuple[Scorer, Any]:
    """The scorer and its options. Raises UserError for settings that contradict each other, or would do nothing."""
    check_settings(settings)
    scorer, options = find_scorer(settings.scorer)
    if "request" in scorer.needs and settings.loss_on == "all":
        raise UserError(f"--loss-on all leaves no request apart from its response; {WITHOUT_REQUEST}")
    if settings.engine == "ray" and find_spec("ray") is None:
        raise UserError("--engine ray needs Ray: pip install 'ray[data]'")
    return scorer, options


def load_settings_model(settings: ModelSettings, over: str | None = None) -> Model:
    """The model that the settings name, with the adapter `over` it, if there is one."""
    return load_model(
        settings.model,
        adapter=[a for a in (settings.adapter, over) if a],
        quantize=settings.quantize,
        device=settings.device,
        dtype=settings.dtype,
        chat_template=settings.chat_template,
        trust_remote_code=settings.trust_remote_code,
        batch_tokens=settings.batch_tokens,
    )


def require_aligned(model: Model, settings: FilterSettings) -> AlignmentCheck:
    """The alignment check of the model. Raises UserError when it is not aligned, unless forced (appendix A.6)."""
    check = check_alignment(model, settings.probes)
    if check.grade == "not aligned" and not settings.force:
        raise UserError(
            f"{model.name} refuses only {sum(check.refused)} of {len(check.refused)} probes, so it can't tell what "
            "breaks alignment: use an aligned model (gradshield check shows more; --force continues anyway)"
        )
    return check


def build_scorer(settings: FilterSettings, fingerprint: str, rows_key: str = "") -> ScoreFunction:
    """The scorer that the settings name, from nothing: what a worker begins with. Raises UserError where the model
    there is not the one with this fingerprint, since its scores would not go with the others."""
    model = load_settings_model(settings)
    if model.fingerprint != fingerprint:
        raise UserError(f"{model.name}: on a worker it is another model than here: its files or its template differ")
    own_safe = known_good(model, settings, find_scorer(settings.scorer)[0].needs)
    settings = settings.model_copy(update={"threshold": "fixed"})  # its anchors are not needed here
    return make_reference(model, require_aligned(model, settings), settings, None, rows_key, own_safe).scorer


def _portable_settings(settings: FilterSettings, model: Model) -> FilterSettings:
    """The settings with paths that hold in another working directory, too, no GPU's number, and the dtype that the
    model has here, whatever a worker's device would choose."""
    named = {name: getattr(settings, name) for name in ("model", "adapter", "chat_template", "probes", "reference")}
    paths = {name: expanded(value) for name, value in named.items() if value}
    found: dict[str, str | None] = {name: str(p.resolve()) for name, p in paths.items() if p.exists()}
    found["dtype"] = str(model.net.dtype).removeprefix("torch.")
    if (settings.device or "").startswith("cuda"):
        found["device"] = None  # an actor sees but its own
    return settings.model_copy(update=found)


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


def _by_row(values: np.ndarray, encoded: Encoded) -> np.ndarray:
    """Values of the examples at their rows; NaN for rows set aside."""
    result = np.full(encoded.rows, np.nan)
    result[row_numbers(encoded.examples)] = values
    return result


def _write_scores(out: Path, encoded: Encoded, columns: Mapping[str, np.ndarray], verdicts: np.ndarray) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {**columns, "tokens": _by_row(token_counts(encoded.examples).astype(float), encoded)}
    text = ("place", "group", "verdict", "reason")
    schema = pa.schema([("row", pa.int64()), *((n, pa.string()) for n in text), *((n, pa.float64()) for n in columns)])
    with write_whole(out / "scores.parquet") as stream, pq.ParquetWriter(stream, schema) as writer:
        for start in range(0, encoded.rows, ROWS_PER_WRITE):
            part = slice(start, min(start + ROWS_PER_WRITE, encoded.rows))
            rows = range(part.start, part.stop)
            piece = {
                "row": np.arange(part.start, part.stop) + 1,
                "place": [_printable(place) for place in encoded.places[part]],
                "group": [_printable(group) for group in encoded.groups[part]],
                "verdict": verdicts[part].tolist(),
                "reason": [encoded.reasons.get(n) for n in rows],
                **{name: values[part] for name, values in columns.items()},
            }
            writer.write_table(pa.table(piece, schema=schema))


def _printable(name: str) -> str:
    """A file's name need not be UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _explain_highest(
    model: Model, check: AlignmentCheck, settings: FilterSettings, encoded: Encoded, scores: np.ndarray
) -> dict[int, Shares]:
    """Response tokens with their shares of FIHS, by row, for as many of the highest rows as one batch holds.

    It is a second look at rows that are decided already: where the memory, or a model that gives no gradients, does
    not let it be had, they go without.
    """
    at = np.searchsorted(row_numbers(encoded.examples), highest_rows(scores))
    chosen = [encoded.examples[int(n)] for n in at]
    room = np.cumsum([len(e.ids) for e in chosen])
    chosen = chosen[: max(1, int((room <= model.batch_tokens).sum()))]
    found: dict[int, Shares] = {}
    try:
        probes = check.refused_probes()
        options = fihs_options(settings.scorer)
        s = safety_score(model, probes, options)
        gradient = probe_gradient(model, probes[:EXPLAINED_BY], s)
        harmless = harmless_part(model, [gradient], s, options)
        gradient = minus(gradient, *harmless) if harmless else gradient
        with progress("explaining the highest rows", int(room[len(chosen) - 1]), len(chosen)) as advance:
            for e in chosen:
                parts, _ = fihs_parts(model, e, [gradient])
                found[e.row] = words(model.tokenizer, e, shares(parts[0].sum(0)), responses_only=True)
                advance(len(e.ids), 1)
    except Exception as error:  # whatever a model's own code raises: nothing else is to be lost by it
        why = (str(error).strip() or type(error).__name__).split("\n")[0]
        logging.getLogger("gradshield").warning("tokens are not marked in the report: %s", why)
    return found
