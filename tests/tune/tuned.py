"""Small runs of tune on the random model, whose answers' worth is made up."""

import gradshield.tune.measuring as work
from gradshield.base.settings import FilterSettings, FinetuneSettings, TuneSettings
from gradshield.evaluation.config import EvaluationSettings
from gradshield.evaluation.safety import SafetyReport, wilson
from gradshield.tune.command import run_tune

TRAINING = FinetuneSettings(epochs=1, learning_rate=1e-3)
MEASURING = EvaluationSettings(request_count=4, max_new_tokens=4, scary="none", cases=8)
EASY = {"min_utility": -1e9, "max_asr": 0.5}


def answer_with(monkeypatch, *asrs: float, asked: int = 0) -> list[float]:
    """evaluate_safety says these in turn, as if so many (0: very many) requests were asked, the base model's first, the
    last one ever after; returns what it said."""
    said: list[float] = []

    def evaluate(model, settings):
        said.append(asrs[min(len(said), len(asrs) - 1)])
        return SafetyReport(said[-1], wilson(round(said[-1] * asked), asked) if asked else (0.0, said[-1]), (), (), ())

    monkeypatch.setattr(work, "evaluate_safety", evaluate)
    return said


def tune(train, out, folder, *, trainer=None, measuring=MEASURING, batch_tokens=None, **more):
    tuning = TuneSettings(**{**EASY, **more})
    settings = FilterSettings(
        model=folder, batch_tokens=batch_tokens, threshold="share", value=0.25, scorer="fihs:probes=2"
    )
    return run_tune(str(train), out, settings, TRAINING, tuning, measuring, trainer=trainer)


def lines_of(file) -> list[bytes]:
    return [line for line in file.read_bytes().split(b"\n") if line]
