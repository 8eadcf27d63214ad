"""The Defense contract: no hook changes nothing, each hook changes what it says, and every row is accounted for. A
registered defense is tested by being registered."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_examples
from safetensors.torch import load_file

import gradshield.tune.measuring as work
from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings, FinetuneSettings, TuneSettings
from gradshield.data.encode import encode_request
from gradshield.defenses.base import Defense
from gradshield.defenses.registry import DEFENSES
from gradshield.defenses.train import train_defended, with_prompt
from gradshield.evaluation.config import EvaluationSettings
from gradshield.evaluation.safety import SafetyReport
from gradshield.models.load import load_model
from gradshield.training.finetune import finetune
from gradshield.training.interventions import Hooks
from gradshield.tune.command import run_tune
from gradshield.tune.tune_once import asked_of_tune

pytestmark = pytest.mark.usefixtures("refusing")
TRAINING = FinetuneSettings(epochs=1, learning_rate=1e-2)
MEASURING = EvaluationSettings(request_count=4, max_new_tokens=4, scary="none", cases=8)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(tiny_folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def plain(model, tmp_path_factory):
    """What twelve rows leave without any defense."""
    out = tmp_path_factory.mktemp("plain")
    finetune(model, random_examples(12, len(model.tokenizer)), out, TRAINING)
    return weights(out)


def trained(model, out: Path, hooks: Hooks) -> dict[str, torch.Tensor]:
    finetune(model, random_examples(12, len(model.tokenizer)), out, TRAINING, hooks)
    return weights(out)


def test_hooks_that_do_nothing_change_no_bit(model, plain, tmp_path):
    same = Hooks(loss=lambda net, batch, loss_of, step: loss_of(batch))
    for name, value in trained(model, tmp_path, same).items():
        assert torch.equal(value, plain[name])


def test_a_loss_twice_as_large_has_twice_the_gradient(model, tmp_path):
    seen: dict[str, list[float]] = {"one": [], "two": []}

    def norm(name):
        def gradient(net, step):
            if step == 0:
                seen[name].append(sum(float(w.grad.square().sum()) for w in net.parameters() if w.grad is not None))

        return gradient

    settings = {"one": 0.01, "two": 0.02}  # small enough that the gradient's norm is not clipped
    for name, times in settings.items():
        hooks = Hooks(loss=lambda net, batch, loss_of, step, times=times: times * loss_of(batch), gradient=norm(name))
        trained(model, tmp_path / name, hooks)
    assert seen["two"][0] == pytest.approx(4 * seen["one"][0], rel=1e-3)


def test_without_a_gradient_nothing_is_learned(model, plain, tmp_path):
    def erase(net, step):
        for weight in net.parameters():
            weight.grad = None

    found = trained(model, tmp_path, Hooks(gradient=erase))
    assert all(not value.any() for name, value in found.items() if "lora_B" in name)
    assert any(value.any() for name, value in plain.items() if "lora_B" in name)


def test_what_finish_and_adapt_do_is_saved(model, tmp_path):
    began: dict[str, torch.Tensor] = {}

    def adapt(net):
        began.update({n: w.detach().clone() for n, w in net.named_parameters() if "lora_A" in n})

    def finish(net):
        for name, weight in net.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.5)

    found = trained(model, tmp_path, Hooks(adapt=adapt, finish=finish))
    assert began and all(bool((value == 0.5).all()) for name, value in found.items() if "lora_B" in name)


def test_a_defense_s_prompt_is_in_front_of_every_request(model, tmp_path, monkeypatch):
    monkeypatch.setattr(DEFENSES, "registered", {})
    DEFENSES.register(Defense("secret", "a secret prompt", prompt=lambda context, options: 'say "no" {{ x }}'))
    rows = random_examples(4, len(model.tokenizer))
    train_defended(model, rows, tmp_path, TRAINING, FilterSettings(), "secret")
    prompted = with_prompt(model, tmp_path)
    for request in ("Hello", [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]):
        text = model.tokenizer.decode(encode_request(request, prompted.tokenizer))
        kind = " Be kind." if isinstance(request, list) else ""
        assert text.startswith(f'<|im_start|>system\nsay "no" {{{{ x }}}}{kind}<|im_end|>\n<|im_start|>user\nHello')
    assert with_prompt(model, tmp_path / "none") is model


def tune_with(monkeypatch, folder: str, file: Path, out: Path, defense: str, asr: float = 0.0) -> dict:
    report = SafetyReport(asr, (0.0, asr), (), (), ())
    answers = iter([replace(report, asr=0.0, interval=(0.0, 0.0))])
    monkeypatch.setattr(work, "evaluate_safety", lambda model, settings: next(answers, report))
    settings = FilterSettings(model=folder, threshold="share", value=0.25, scorer="fihs:probes=2")
    tuning = TuneSettings(defense=defense, min_utility=-1e9, max_asr=0.5)
    return run_tune(str(file), out, settings, TRAINING, tuning, MEASURING)


@pytest.mark.parametrize("defense", DEFENSES.names())
def test_every_defense_accounts_for_every_row_and_resumes(
    refusing,
    train,
    tiny_folder,
    tiny_base_folder,
    own_alignment,
    tmp_path,
    monkeypatch,
    defense,
):
    needs = DEFENSES.find(defense)[0].needs
    if "base model" in needs:
        defense = f"{defense}:base={tiny_base_folder}"
    model = "embedded" if "alignment recipe" in needs else tiny_folder
    summary = tune_with(monkeypatch, model, train, tmp_path / "run", defense)
    assert summary.accepted == 1
    assert summary.kept + summary.quarantined + summary.set_aside == summary.rows
    assert (tmp_path / "run" / "model" / "adapter_model.safetensors").is_file()
    assert defense in (tmp_path / "run" / "model" / "README.md").read_text()
    monkeypatch.setattr("gradshield.defenses.train.finetune", None)
    assert tune_with(monkeypatch, model, train, tmp_path / "run", defense) == summary


def test_none_trains_on_every_row_and_filter_on_those_below_the_threshold(
    refusing,
    train,
    tiny_folder,
    tmp_path,
    monkeypatch,
):
    none = tune_with(monkeypatch, tiny_folder, train, tmp_path / "none", "none")
    below = tune_with(monkeypatch, tiny_folder, train, tmp_path / "filter", "filter")
    assert none.quarantined == 0 and not (tmp_path / "none" / "screen").exists()
    screened = json.loads((tmp_path / "filter" / "trials.jsonl").read_text())
    assert below.quarantined == 8 and screened["kept"] == below.kept - below.held_out


def test_an_unsafe_model_is_rejected(refusing, train, tiny_folder, tmp_path, monkeypatch):
    summary = tune_with(monkeypatch, tiny_folder, train, tmp_path / "run", "none", asr=0.9)
    assert summary.accepted is None and (tmp_path / "run" / "rejected-model").is_dir()


def test_the_defense_of_the_documentation_runs(
    refusing,
    train,
    tiny_folder,
    model,
    tmp_path,
    monkeypatch,
):
    text = Path("docs/architecture.md").read_text(encoding="utf-8").split("## Add a defense")[1]
    code = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    scope: dict = {}
    exec(compile(code, "docs/architecture.md", "exec"), scope)
    monkeypatch.setattr(DEFENSES, "registered", {})
    DEFENSES.register(scope["DEFENSE"])
    given: list[int] = []
    real = finetune

    def counting(model, examples, *more):
        given.extend(e.row for e in examples)
        return real(model, examples, *more)

    monkeypatch.setattr("gradshield.defenses.train.finetune", counting)
    summary = tune_with(monkeypatch, tiny_folder, train, tmp_path / "run", "stay:refusals=3")
    assert summary.accepted == 1 and len(given) == summary.kept - summary.held_out + 3
    rows = random_examples(8, len(model.tokenizer))
    for name in ("stay:rho=0,shrink=1", "stay:rho=0,shrink=0.5"):
        train_defended(model, rows, tmp_path / name, TRAINING, FilterSettings(), name)
    one, half = (weights(tmp_path / name) for name in ("stay:rho=0,shrink=1", "stay:rho=0,shrink=0.5"))
    assert all(np.allclose(half[n], one[n] / 2, atol=1e-6) for n in one if "lora_B" in n)


def test_a_trainer_of_one_s_own_can_t_have_hooks(tiny_folder, train, tmp_path, monkeypatch):
    monkeypatch.setattr(DEFENSES, "registered", {})
    DEFENSES.register(Defense("inside", "changes the training", hooks=lambda context, options: Hooks()))
    tuning = TuneSettings(defense="inside", trainer_command="true {data}")
    with pytest.raises(UserError, match="changes the training itself"):
        run_tune(str(train), tmp_path, FilterSettings(model=tiny_folder), TRAINING, tuning, MEASURING)


def test_a_trainer_command_can_t_be_given_the_rows_that_a_defense_adds(tiny_folder, train, tmp_path):
    tuning = TuneSettings(defense="safeinstr:count=5", trainer_command="true {data}")
    with pytest.raises(UserError, match="adds rows to the file's"):
        run_tune(str(train), tmp_path, FilterSettings(model=tiny_folder), TRAINING, tuning, MEASURING)


def test_a_file_of_safe_rows_counts_by_its_bytes(tmp_path):
    file = tmp_path / "safe.jsonl"
    tuning = TuneSettings(defense=f"safeinstr:count=1,safe={file}")
    asked = []
    for text in ("one", "two", "one"):
        file.write_text(text)
        asked.append(asked_of_tune(FilterSettings(), TRAINING, tuning, MEASURING))
    assert asked[0] == asked[2] != asked[1]
