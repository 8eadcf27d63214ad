"""The model card of an accepted model, or of the safest model of a rejected search."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from gradshield.data.summaries import TrialSummary, UnseenSummary
from gradshield.report.words import rows_in_words, safety_in_words, unseen_in_words
from gradshield.tune.search import Outcome

if TYPE_CHECKING:
    from gradshield.tune.trials import Trials


def card(
    trials: "Trials",
    outcome: Outcome,
    trial: TrialSummary,
    counts: Mapping[str, int],
    unseen: UnseenSummary | None,
) -> str:
    """README.md of the trial's model: how it was screened and trained, and its safety and utility. `counts` are the
    rows of each verdict, empty where the model is rejected."""
    verdict = "accepted" if outcome.accepted else f"REJECTED ({outcome.reason}): do not use it as it is"
    pool, goal = trials.pool, trials.goal
    name = " + ".join([pool.model.name, *pool.model.adapters])
    end = "" if pool.tuning.literal else " at the upper end of the 95 % interval"
    utility = "not measured" if trial.utility is None else f"{trial.utility:.3f}"
    rows = f"- Rows: {rows_in_words(trial.kept, **counts)}.\n" if counts else ""
    found = {**_safety(trial), **unseen_in_words(unseen)}
    measured = "".join(f"- {what.capitalize()}: {figure}.\n" for what, figure in found.items())
    return (
        f"# Fine-tuned from {name}\n\nScreened and trained by GradShield {version('gradshield')}: {verdict}.\n\n"
        f"- Trained on {trial.kept} of {pool.encoded.rows} rows of {Path(pool.source.path).name}: "
        f"{_chosen(trials, trial)}.\n{rows}- Defense: {pool.tuning.defense}.\n{measured}"
        f"- Attack success rate of the base model {goal.base.asr:.3f}; goal: {goal.max_asr:.3f} or less{end},  "
        f"on {trials.measuring.settings.requests} requests.\n- Utility ({pool.tuning.task}) {utility}; base model "
        f"{goal.base.utility:.3f}; goal: {goal.min_utility:.3f} or more.\n- Training: {_training(trials)}\n"
    )


def _safety(trial: TrialSummary) -> dict[str, str]:
    """The trial's safety in words; of one that failed, that it is unknown."""
    return safety_in_words(trial.safety) if trial.safety else {"attack success rate": "unknown"}


def _chosen(trials: "Trials", trial: TrialSummary) -> str:
    if trial.threshold is None:
        return "every row but those set aside or held out"
    least = f", without the {trial.lo} rows of lowest score" if trials.pool.tuning.literal and trial.lo else ""
    return f"rows with a score below {trial.threshold:+.3f}{least} (score: {trials.pool.settings.scorer})"


def _training(trials: "Trials") -> str:
    tuning = trials.pool.tuning
    if trials.trainer.own:
        return "by the user's own trainer"
    if tuning.trainer_command:
        config = f" (config: {tuning.trainer_config})" if tuning.trainer_config else ""
        return f"`{tuning.trainer_command}`{config}"
    return trials.pool.training.model_dump_json()
