"""What the tests start in several processes: `gradshield tune` or one training of a random model that counts as
aligned, or two that wait for one another. What answers are worth is made up, and LAUNCHED_DIES="rank:step" kills that
process in that step."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

from conftest import random_examples
from transformers import Trainer

import gradshield.scoring.check as checking
import gradshield.tune.measuring as work
from gradshield.base.assets import ASSETS
from gradshield.base.errors import UserError
from gradshield.base.processes import is_first, lead_processes
from gradshield.base.settings import FinetuneSettings
from gradshield.cli.commands import main
from gradshield.data.requests import read_requests
from gradshield.evaluation.safety import SafetyReport
from gradshield.models.load import load_model
from gradshield.scoring.check import AlignmentCheck
from gradshield.training.finetune import finetune

ASRS = [0.0, 0.9, 0.1]  # the base model's, the first trial's, the second's


def made_up() -> None:
    """The random model refuses every probe, and the safety of what is trained is as ASRS says, by finished trials."""
    probes = read_requests(ASSETS / "probes.jsonl")
    always = AlignmentCheck(tuple(probes), (True,) * len(probes), ("I can't",) * len(probes), (1.0,) * len(probes), ())
    checking.check_alignment = lambda *_: always
    out = Path(sys.argv[sys.argv.index("-o") + 1])

    def evaluate(model, settings):
        assert is_first()
        trained = len(list(out.glob("trials/*/figures.json")))
        return SafetyReport(ASRS[trained], (0.0, ASRS[trained]), (), (), ())

    work.evaluate_safety = evaluate


def mortal(rank: str, step: int) -> None:
    """This process dies, as by kill -9, in the given step of its trainings."""
    real, steps = Trainer.training_step, []

    def dying(self, *args, **kwargs):
        steps.append(1)
        if os.environ["RANK"] == rank and len(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args, **kwargs)

    Trainer.training_step = dying


def train(folder: str, out: str, method: str, learning_rate: str, batch: str) -> None:
    """Three epochs on eight rows, so that a step of eight is all of them and their order does not matter."""
    model = load_model(folder)
    settings = FinetuneSettings(method=method, learning_rate=float(learning_rate), batch=int(batch))
    try:
        finetune(model, random_examples(8, len(model.tokenizer)), Path(out), settings)
    except UserError as error:
        print(f"{type(error).__name__}: {error}")


def wait(dying: str) -> None:
    """Both do one thing together; then one dies while the other waits for it."""

    def work(task):
        print(task(20), flush=True)
        if dying == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(5)  # until the other is dead
        task(1)

    def task(number: int) -> int:
        if not is_first() and dying == "1":
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return number + 1

    try:
        lead_processes(work, task, cpu=True)
    except UserError as error:
        print(error)


if __name__ == "__main__":
    if os.environ.get("LAUNCHED_DIES"):
        who, when = os.environ["LAUNCHED_DIES"].split(":")
        mortal(who, int(when))
    if sys.argv[1] == "train":
        train(*sys.argv[2:])
    elif sys.argv[1] == "wait":
        wait(sys.argv[2])
    else:
        if "tune" in sys.argv:
            made_up()
        main()
