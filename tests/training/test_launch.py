"""Several processes train as one does and leave one set of files; when one dies, all end, and the same call goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_examples
from safetensors.torch import load_file
from training.launch import DRIVER, environment, start

from gradshield.base.settings import FinetuneSettings
from gradshield.models.load import load_model
from gradshield.training.finetune import finetune

FLAGS = [
    *(
        "--max-asr",
        "0.5",
        "--min-utility",
        "-1e9",
        "--threshold",
        "share",
        "--value",
        "0.25",
        "--scorer",
        "fihs:probes=2",
    ),
    *("--request-count", "4", "--max-new-tokens", "4", "--scary", "none"),
    *("--epochs", "2", "--learning-rate", "1e-3"),
]
pytestmark = pytest.mark.slow


@pytest.fixture
def train(tmp_path) -> Path:
    file = tmp_path / "train.jsonl"
    rows = ({"prompt": f"Question {n}" + " x" * (n % 7), "completion": f"Answer {n * n}"} for n in range(45))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def trials(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "trials.jsonl").read_text().split("\n") if line]
    free = ("seconds", "utility", "utility_interval", "checksum")  # the checksum is of the others, too
    return [{k: v for k, v in line.items() if k not in free} for line in lines]


def test_accelerate_launch_ends_as_one_process_does(tiny_folder, train, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    accelerate = str(Path(sys.executable).with_name("accelerate"))
    launch = [accelerate, "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    for command, out in (([sys.executable], one), (launch, two)):
        arguments = [*command, DRIVER, "tune", str(train), "--model", tiny_folder, "-o", str(out), *FLAGS]
        done = subprocess.run(arguments, env=environment(), capture_output=True, text=True, timeout=110)
        assert done.returncode == 0, done.stderr
        shown = [
            line.split()[0]
            for line in done.stdout.split("\n")
            if line.startswith("    ") and line.strip()[:1].isdigit()
        ]
        assert shown == ["1", "2"] and done.stdout.count("│ verdict") == 1, done.stdout  # said once, by the first
    assert files(one) == files(two) and trials(one) == trials(two)
    assert (one / "kept.jsonl").read_bytes() == (two / "kept.jsonl").read_bytes()
    values = [json.loads((f / "trials.jsonl").read_text().split("\n")[1])["utility"] for f in (one, two)]
    base = json.loads((one / "base.json").read_text())["utility"]
    assert values[0] > base and abs(values[0] - values[1]) < 0.1 * (values[0] - base)  # rows come in another order
    assert load_model(tiny_folder, adapter=str(two / "model")).name


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_is_the_same_however_many_processes_share_it(tiny_folder, tmp_path, method):
    model = load_model(tiny_folder)
    settings = FinetuneSettings(method=method, learning_rate=1e-3)
    finetune(model, random_examples(8, len(model.tokenizer)), tmp_path / "one", settings)
    for code, said, error in start("train", tiny_folder, str(tmp_path / "two"), method, "1e-3", "8"):
        assert code == 0 and not said, error
    assert files(tmp_path / "one") == files(tmp_path / "two")
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    one, two = (load_file(tmp_path / folder / name) for folder in ("one", "two"))
    before = {k: 0 if method == "lora" else model.net.state_dict()[k] for k in one if "lora_A" not in k}
    for key, start_value in before.items():  # Adam turns rounding into steps where a gradient is nearly 0
        assert (one[key] - two[key]).norm() < 0.02 * (one[key] - start_value).norm(), key


def test_all_processes_agree_that_a_training_diverged(tiny_folder, tmp_path):
    ended = start("train", tiny_folder, str(tmp_path / "out"), "lora", "1e30", "8")
    assert all(code == 0 and said.startswith("Diverged: ") for code, said, _ in ended), ended
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_dies_the_other_ends_and_the_same_call_goes_on(tiny_folder, train, tmp_path, rank):
    out = tmp_path / "run"
    command = ["tune", str(train), "--model", tiny_folder, "-o", str(out), *FLAGS]
    ended = start(*command, LAUNCHED_DIES=f"{rank}:13")  # in the second trial
    dead, left = ended[rank], ended[1 - rank]
    assert dead[0] == -9 and left[0] == 2, ended
    assert "another process" in left[2].strip().split("\n")[-1] and "Traceback" not in left[2]
    assert [t["number"] for t in trials(out)] == [1]
    count = 2 - rank  # as many as before, or fewer
    assert [code for code, *_ in start(*command, count=count)] == [0] * count
    assert [(t["number"], t["safe"], t["steps"]) for t in trials(out)] == [(1, False, 10), (2, True, 8)]
    assert load_model(tiny_folder, adapter=str(out / "model")).name


@pytest.mark.parametrize("rank", [0, 1])
def test_when_one_dies_between_two_trainings_the_other_ends(rank):
    ended = start("wait", str(rank))
    dead, left = ended[rank], ended[1 - rank]
    assert dead[0] == -9 and left[0] == 0 and "another process of this command ended" in left[1], ended
    assert ended[0][1].startswith("21\n")


def test_a_users_mistake_is_said_once_and_all_processes_end(tiny_folder, train, tmp_path):
    run = ["-o", str(tmp_path / "run")]
    for arguments, words in (
        (["tune", "no.jsonl", "--model", tiny_folder], "no such file"),
        (["tune", str(train), "--model", tiny_folder, "--batch", "3"], "is not divisible by 2"),
        (["filter", str(train), "--model", tiny_folder], "only tune"),
    ):
        first, second = start(*arguments, *run, program=("-m", "gradshield"))
        assert first[0] == 2 and first[2].strip().count("\n") == 0 and words in first[2], first
        assert not second[1] and not second[2], second
    assert not (tmp_path / "run").exists()
