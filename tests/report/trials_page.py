"""The page of a `tune` run whose figures are made up."""

from dataclasses import asdict

from gradshield.data.run_folder import RunPlan
from gradshield.data.summaries import TuneSummary
from gradshield.report.tune_page import report_trials
from gradshield.tune.search import Trial

TRIALS = (
    Trial(1, None, 0, 330, 330, 0.98, None, False, False),
    Trial(2, -1.2, 0, 330, 180, 0.0, 0.21, True, False, "utility 0.210 is below the 0.300 asked for"),
    Trial(3, 0.5, 180, 330, 281, 0.02, 0.55, True, True),
    Trial(4, 0.9, 180, 330, 290, None, None, False, False, "fine-tuning diverged <script>alert(1)</script>"),
)
SAFETY = {"asr": 0.02, "asr_interval": [0.003, 0.071], "requests": 100, "judge": "<script>", "hs": 1.25}
SAFETY |= {"hs_interval": [1.0, 1.5], "ungraded": 0, "judge_control": None}
TOOK = {"steps": 90, "seconds": 12.5, "utility_interval": None}
PLAN = {
    "input": {"path": "train.jsonl", "format": "jsonl", "layout": "messages", "sha256": "0"},
    "model": {"name": "embedded", "fingerprint": "0"},
    "settings": {"model": "embedded"},
    "versions": {},
}


def page(tmp_path, trials=TRIALS, accepted=3, **other):
    summary = {
        "file": "train.jsonl",
        "accepted": accepted,
        "reason": "safe and useful" if accepted else "nothing was safe",
        "rows": 330,
        **({"kept": 281, "quarantined": 49, "set_aside": 0} if accepted else {}),
        "held_out": 0,
        "base": {"asr": 0.04, "utility": 0.3, "utility_interval": [0.2, 0.4], "safety": SAFETY},
        "goal": {"max_asr": 0.05, "min_utility": 0.3},
        "asr": 0.02,
        "utility": 0.55,
        "safety": SAFETY,
        "task": "dialogsum",
        "model": "run/model",
        "cost": {"trials": len(trials), "steps": 360, "scored_tokens": 30000, "safety_evaluations": 4, "seconds": 50.0},
        "trials": [{**asdict(t), **TOOK, "safety": None if t.asr is None else SAFETY} for t in trials],
        "version": "0.1.0",
        **other,
    }
    report_trials(tmp_path, RunPlan(**PLAN), TuneSummary(**summary))
    return (tmp_path / "report.html").read_text(encoding="utf-8")
