"""A `tune` run → its report.html: what was asked for, and the trials' path through safety and utility."""

from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from gradshield.data.run_folder import RunPlan
from gradshield.data.summaries import BaseSummary, TrialSummary, TuneSummary
from gradshield.report.render import as_yaml, write_page
from gradshield.report.words import rows_in_words, safety_in_words, unseen_in_words


def report_trials(out: Path, plan: RunPlan, summary: TuneSummary) -> None:
    """Writes report.html. Raises UserError where it can't be written."""
    from gradshield.report.figure import draw  # matplotlib is slow to import

    accepted = summary.accepted_trial()
    label = "Attack success rate and utility of the base model and of every trial; the table below has the numbers."
    drawing = draw(partial(draw_trials, summary), label)
    write_page(
        out / "report.html",
        "tune.html",
        summary=summary,
        headline=_headline(summary),
        drawing={"wide": Markup(drawing.wide), "narrow": Markup(drawing.narrow)},
        verdicts=[_verdict(trial, summary) for trial in summary.trials],
        safety={
            **(safety_in_words(summary.safety) if summary.safety else {}),
            **unseen_in_words(summary.unseen),
        },
        rows=accepted and rows_in_words(accepted.kept, summary.kept, summary.quarantined, summary.set_aside),
        screened=(out / "screen" / "report.html").exists(),
        settings=as_yaml(plan.as_dict()),
    )


def _headline(summary: TuneSummary) -> str:
    trials, accepted = len(summary.trials), summary.accepted_trial()
    tried = f"after {trials} trial{'' if trials == 1 else 's'}"
    if accepted is None:
        return f"Rejected {tried}: {summary.reason}."
    return f"Safe and useful {tried}, trained on {accepted.kept:,} of {summary.rows:,} rows."


def _verdict(trial: TrialSummary, summary: TuneSummary) -> str:
    if trial.number == summary.accepted:
        return "accepted"
    if trial.asr is None:
        return f"failed: {trial.note}"
    return "not useful enough" if trial.safe else "not safe"


def draw_trials(summary: TuneSummary, size: Any) -> Any:
    """Attack success rate with its interval above, utility below, from the base model through every trial; dashed lines
    are the goal."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from gradshield.report.figure import BAD, INK, KEPT, MUTED

    trials, goal = summary.trials, summary.goal
    models: tuple[BaseSummary | TrialSummary, ...] = (summary.base, *trials)
    figure = Figure((size.width / 72, size.height * 1.2 / 72), layout="constrained")
    unit = "minus the loss, nats per token" if summary.task == "held-out" else "score of the task"
    panels = (
        ("attack success rate (share of requests)", "asr", goal.max_asr),
        (f"utility ({unit})", "utility", goal.min_utility),
    )
    for axes, (title, name, limit) in zip(figure.subplots(2, 1, sharex=True), panels):
        values = [(x, getattr(model, name), model) for x, model in enumerate(models)]
        places = [(x, y, model) for x, y, model in values if y is not None]
        axes.plot([x for x, *_ in places], [y for _, y, _ in places], color=MUTED, linewidth=1.2, zorder=1)
        for x, y, model in places:
            accepted = x > 0 and x == summary.accepted
            missed = x > 0 and not trials[x - 1].safe if name == "asr" else y < limit
            if name == "asr" and model.safety:
                axes.vlines(x, *model.safety.asr_interval, color=MUTED, linewidth=1.2, zorder=1)
            axes.plot(
                [x], [y], marker="X" if missed else "o", markersize=11 if accepted else 8, linestyle="none",
                color=BAD if missed else KEPT, markeredgecolor=INK, markeredgewidth=2 if accepted else 0.5,
            )  # fmt: skip
            axes.annotate(f"{y:.2f}", (x, y), (0, 9), textcoords="offset points", ha="center", color=INK)
        axes.axhline(limit, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        axes.set_title(title, loc="left", color=MUTED, fontsize=size.font)
        axes.tick_params(length=0, pad=5, labelcolor=MUTED)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.patch.set_visible(False)
        axes.margins(y=0.35)
        axes.set_xlim(-0.4, len(trials) + 0.4)
        for side, spine in axes.spines.items():
            spine.set(visible=side == "bottom", color=MUTED, linewidth=0.8)
    figure.axes[-1].set_xticks(range(len(trials) + 1), ["base model", *(f"trial {t.number}" for t in trials)])
    figure.patch.set_visible(False)
    return figure
