"""The card of a model that a search hands out, or keeps beside its rejection."""

from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from gradshield.search import Outcome, Trial

if TYPE_CHECKING:
    from gradshield.tune import Goal, _Task


def card(task: "_Task", outcome: Outcome, trial: Trial, goal: "Goal") -> str:
    """README.md of the model that `trial` left: how it was screened and trained, and what it was measured at."""
    verdict = "accepted" if outcome.accepted else f"REJECTED ({outcome.reason}): do not use it as it is"
    below = "every row" if trial.threshold is None else f"rows with a score below {trial.threshold:+.3f}"
    utility = "not measured" if trial.utility is None else f"{trial.utility:.3f}"
    asr = "unknown" if trial.asr is None else f"{trial.asr:.3f}"
    name = " + ".join([task.model.name, *task.model.adapters])
    requests = f"{task.measuring.requests} requests ({task.measuring.request_count} at most)"
    return (
        f"# Fine-tuned from {name}\n\nScreened and trained by GradShield {version('gradshield')}: {verdict}.\n\n"
        f"- Trained on {trial.kept} of {task.encoded.rows} rows of {Path(task.path).name}: {below} "
        f"(score: {task.settings.variant}).\n"
        f"- Attack success rate {asr} on {requests}; base model {goal.base_asr:.3f}; asked for: {goal.max_asr:g} or "
        f"less.\n- Utility ({task.tuning.task}) {utility}; base model {goal.base_utility:.3f}; asked for: "
        f"{goal.min_utility:.3f} or more.\n- Training: {task.training.model_dump_json()}\n"
    )
