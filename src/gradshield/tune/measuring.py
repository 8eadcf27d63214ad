"""Measures the models of a search: the base model once, which sets the goals, and the model of each trial."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradshield.base.errors import Diverged, UserError
from gradshield.base.settings import TuneSettings
from gradshield.base.storage import read_json, write_text
from gradshield.data.encode import Example
from gradshield.data.run_folder import catch_write_errors
from gradshield.data.summaries import BaseSummary, Interval, SafetySummary, UnseenSummary
from gradshield.evaluation.config import EvaluationSettings
from gradshield.evaluation.evaluate import JudgeFailed, evaluate_safety, write_safety, write_utility
from gradshield.evaluation.measure import safety_summary
from gradshield.evaluation.safety import SafetyReport, attack_success
from gradshield.evaluation.sources import unseen_requests
from gradshield.evaluation.utility import UtilityReport, evaluate_utility
from gradshield.models.load import Model
from gradshield.tune.pool import HELD_OUT

ROUNDING = 1e-9  # the tolerance when a figure is compared with a goal


class Base(BaseSummary):
    """base.json: the figures of the base model, and the seconds that measuring them took."""

    seconds: float


@dataclass(frozen=True)
class Measured:
    """The figures of a trial's model. Utility is measured only if it is safe."""

    safety: SafetySummary
    asr: float | None = None  # None for a broken model
    safe: bool = False
    useful: bool = False
    note: str = ""
    utility: float | None = None
    utility_interval: Interval | None = None


@dataclass(frozen=True)
class Goal:
    """The goals that a trial is compared with, and the figures of the base model."""

    base: Base
    max_asr: float  # of the interval's upper end, or of the ASR itself if algorithm 1 is run as printed
    min_utility: float


@dataclass(frozen=True)
class Measuring:
    """How models of one run are measured."""

    settings: EvaluationSettings
    tuning: TuneSettings
    held_out: Callable[[], Sequence[Example]]  # the first call may screen all rows

    def goal(self, base: Model, out: Path) -> Goal:
        """The goals that follow from the base model's safety and utility, which are measured once and saved in `out`.

        Raises UserError for a base model that is not safe enough itself, before any row is scored.
        """
        file, start = out / "base.json", time.monotonic()
        if not file.exists():
            report = self._safety(base, out / "base")
            self._highest_asr(base, report.asr, report.interval)
            pause = time.monotonic()
            self.held_out()  # the screening's seconds are counted apart
            start += time.monotonic() - pause
            useful = self._utility(base, out / "base")
            measured = Base(
                asr=report.asr,
                utility=useful.value,
                utility_interval=useful.interval,
                safety=safety_summary(report),
                seconds=round(time.monotonic() - start, 1),
            )
            with catch_write_errors(out):
                write_text(file, json.dumps(measured.as_dict()))
        found = read_json(file, Base)
        accepted = self._highest_asr(base, found.asr, found.safety.asr_interval)
        return Goal(found, accepted, self.tuning.lowest_utility(found.utility))

    def measure(self, trained: Model, goal: Goal, folder: Path) -> Measured:
        """Whether the model of a trial is safe, and if so, whether it is useful."""
        report = self._safety(trained, folder)
        safety = safety_summary(report)
        if not self._compared(report.asr, report.interval) <= goal.max_asr + ROUNDING:
            return Measured(safety, report.asr)
        try:
            found = self._utility(trained, folder)
        except Diverged as error:  # a broken model is not safe, whatever it answers
            return Measured(safety, note=str(error))
        useful = found.value >= goal.min_utility - ROUNDING
        note = "" if useful else f"utility {found.value:.3f} is below the goal of {goal.min_utility:.3f}"
        return Measured(safety, report.asr, True, useful, note, found.value, found.interval)

    def unseen(self, load: Callable[[], Model]) -> UnseenSummary | None:
        """Attack success of the accepted model on requests that no decision has seen. The trials' requests chose the
        model, so they flatter it. None, without loading the model, where the set has no more requests."""
        asked = unseen_requests(self.settings.requests, self.settings.request_count, self.settings.case_seed)
        if not asked:
            return None
        report = attack_success(load(), asked, self.settings.max_new_tokens)
        return UnseenSummary(asr=report.asr, asr_interval=report.interval, requests=len(asked))

    def _compared(self, asr: float, interval: Interval) -> float:
        """The attack success rate that is compared with the goal: the upper end of its 95 % interval, since 0 of 12
        does not show 5 %. Algorithm 1 as printed compares the rate itself."""
        return asr if self.tuning.literal or interval[1] is None else interval[1]

    def _highest_asr(self, base: Model, asr: float, interval: Interval) -> float:
        """The attack success rate that is accepted. Raises UserError where the base model's is over it."""
        compared = self._compared(asr, interval)
        accepted = self.tuning.highest_asr(compared)
        if compared > accepted:
            up_to = "" if self.tuning.literal else f", up to {compared:.3f} with 95 % confidence"
            raise UserError(
                f"{base.name}: attack success rate {asr:.3f}{up_to}, before any fine-tuning. That is above the goal of "
                f"{accepted:g}: ask more requests (--request-count), use a higher --max-asr, a --max-asr "
                "relative to the base model (+0.07), or a better aligned model"
            )
        return accepted

    def _safety(self, model: Model, folder: Path) -> SafetyReport:
        """The model's safety. Its answers are saved in the folder, even if the judge stops answering."""
        try:
            report = evaluate_safety(model, self.settings)
        except JudgeFailed as failed:
            write_safety(failed.report, folder)
            raise
        write_safety(report, folder)
        return report

    def _utility(self, model: Model, folder: Path) -> UtilityReport:
        task = self.held_out() if self.tuning.task == HELD_OUT else self.tuning.task
        found = evaluate_utility(model, task, self.settings)
        write_utility(found, folder)
        return found
