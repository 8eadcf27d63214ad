"""Fine-tuning leaves the model as it was, saves what loads again, and goes on where it was stopped."""

import json

import pytest
import torch
from conftest import random_examples
from safetensors.torch import load_file
from training.launch import start

from gradshield.base.errors import UserError
from gradshield.base.settings import FinetuneSettings
from gradshield.models.load import load_model
from gradshield.training.finetune import _Order, finetune

FAST = {"learning_rate": 1e-2, "epochs": 3, "batch": 4}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_model_is_left_as_it_was_and_what_is_saved_differs(tiny_folder, tmp_path, method):
    model = load_model(tiny_folder)
    examples = random_examples(8, len(model.tokenizer))
    before = {name: weight.clone() for name, weight in model.net.state_dict().items()}
    figures = finetune(model, examples, tmp_path / "out", FinetuneSettings(method=method, **FAST))
    assert figures["steps"] == 6 and figures["loss"] > 0
    after = model.net.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not any(w.requires_grad for w in model.net.parameters())
    trained = load_model(str(tmp_path / "out"))
    assert any(not torch.equal(before[k], w) for k, w in trained.net.state_dict().items() if k in before)
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_all_weights_of_a_bfloat16_model_are_trained_in_float32(tiny_folder, tmp_path):
    model = load_model(tiny_folder, dtype="bfloat16")
    examples = random_examples(8, len(model.tokenizer))
    before = {name: weight.clone() for name, weight in model.net.state_dict().items()}
    settings = FinetuneSettings(method="full", learning_rate=4e-5, epochs=10, batch=2)
    finetune(model, examples, tmp_path / "fine", settings)
    assert all(w.dtype == before[k].dtype and torch.equal(before[k], w) for k, w in model.net.state_dict().items())
    saved = load_file(tmp_path / "fine" / "model.safetensors")
    assert {w.dtype for w in saved.values()} == {torch.bfloat16}
    exact = load_model(tiny_folder)
    finetune(exact, examples, tmp_path / "exact", settings)
    wanted = load_file(tmp_path / "exact" / "model.safetensors")
    moved, sought = (torch.cat([(m[k].float() - before[k].float()).flatten() for k in saved]) for m in (saved, wanted))
    assert float(torch.corrcoef(torch.stack([moved, sought]))[0, 1]) > 0.4  # in bfloat16: .16


def test_one_process_trains_on_one_of_several_gpus(tiny_folder, tmp_path, monkeypatch):
    from transformers import TrainingArguments

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: self._n_gpu or 2))  # 0 on a CPU
    model = load_model(tiny_folder)
    figures = finetune(model, random_examples(4, len(model.tokenizer)), tmp_path / "out", FinetuneSettings(**FAST))
    assert figures["steps"] > 0


def test_attention_is_not_left_to_cudnn_while_it_trains(tiny_folder, tmp_path, monkeypatch):
    from transformers import Trainer

    seen, real = [], Trainer.training_step

    def step(self, *arguments, **named):
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        return real(self, *arguments, **named)

    monkeypatch.setattr(Trainer, "training_step", step)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    model = load_model(tiny_folder)
    finetune(model, random_examples(4, len(model.tokenizer)), tmp_path / "out", FinetuneSettings(**FAST))
    assert before and seen and not any(seen) and torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_stopped_in_the_middle_it_ends_with_the_same_weights(tiny_folder, tmp_path, method, monkeypatch):
    from transformers import Trainer

    model = load_model(tiny_folder)
    examples = random_examples(8, len(model.tokenizer))
    settings = FinetuneSettings(method=method, **FAST)
    whole = finetune(model, examples, tmp_path / "whole", settings)
    real, steps = Trainer.training_step, []

    def dying(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == 4:  # in the second epoch
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", dying)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, examples, tmp_path / "cut", settings)
    saved = list((tmp_path / "cut" / "checkpoints").glob("checkpoint-*"))
    assert saved and not any(w.requires_grad for w in model.net.parameters())
    torn = tmp_path / "cut" / "checkpoints" / "checkpoint-4"  # as a kill in the middle of saving leaves it
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"epoch"')
    cut = finetune(model, examples, tmp_path / "cut", settings)
    assert [cut[name] for name in ("loss", "steps")] == pytest.approx([whole[name] for name in ("loss", "steps")])
    assert len(steps) == 4 + 4  # steps of the first epoch are not done again
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    one, other = (load_file(tmp_path / f / name) for f in ("whole", "cut"))
    assert all(torch.allclose(one[k], other[k], atol=1e-6) for k in one)


def test_the_order_of_rows_follows_from_seed_and_epoch_in_every_process():
    lengths, settings = list(range(5, 105)), FinetuneSettings(seed=3)
    torch.manual_seed(1)
    first, again, second = (list(_Order(lengths, settings, lambda n=n: n)) for n in (0, 0, 1))
    assert first == again != second and sorted(first) == sorted(second) == list(range(100))
    assert first != list(_Order(lengths, FinetuneSettings(seed=4), lambda: 0))


def test_every_row_is_seen_once_an_epoch_and_in_another_order(tiny_folder, tmp_path, monkeypatch):
    from transformers import Trainer

    model = load_model(tiny_folder)
    examples = random_examples(8, len(model.tokenizer))
    seen, real = [], Trainer.training_step

    def watching(self, net, inputs, *arguments, **more):
        seen.extend(tuple(row[row != -100].tolist()) for row in inputs["labels"])
        return real(self, net, inputs, *arguments, **more)

    monkeypatch.setattr(Trainer, "training_step", watching)
    finetune(model, examples, tmp_path / "out", FinetuneSettings(epochs=2, batch=2, lora_dropout=0.1))
    assert len(seen) == 16 and sorted(seen[:8]) == sorted(seen[8:]) and seen[:8] != seen[8:]


def test_what_a_kill_left_of_old_checkpoints_is_cleared_away(tiny_folder, tmp_path):
    model = load_model(tiny_folder)
    left = tmp_path / "out" / ".checkpoints" / "checkpoint-1"
    left.mkdir(parents=True)
    finetune(model, random_examples(4, len(model.tokenizer)), tmp_path / "out", FinetuneSettings(**FAST))
    assert not left.parent.exists() and (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_torn_readme_is_replaced(tiny_folder, tmp_path):
    model = load_model(tiny_folder)
    for name in ("torn", "fresh"):
        (tmp_path / name).mkdir()
        if name == "torn":  # as a full disk leaves it
            (tmp_path / name / "README.md").write_text("---\nlibrary_name: peft\n---\n\n# Mod")
        finetune(model, random_examples(4, len(model.tokenizer)), tmp_path / name, FinetuneSettings(**FAST))
    assert (tmp_path / "torn" / "README.md").read_bytes() == (tmp_path / "fresh" / "README.md").read_bytes()


def test_a_diverged_run_saves_nothing(tiny_folder, tmp_path):
    model = load_model(tiny_folder)
    with pytest.raises(UserError, match="diverged"):
        finetune(
            model, random_examples(8, len(model.tokenizer)), tmp_path / "out", FinetuneSettings(learning_rate=1e30)
        )
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_out_of_memory_goes_on_with_fewer_rows_at_once(tiny_folder, tmp_path, monkeypatch):
    from transformers import Trainer

    real, sizes = Trainer.training_step, []

    def small(self, model, inputs, *args, **kwargs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("no")
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", small)
    model = load_model(tiny_folder)
    figures = finetune(model, random_examples(4, len(model.tokenizer)), tmp_path / "out", FinetuneSettings(**FAST))
    assert sizes[:2] == [4, 2] and set(sizes[2:]) == {1} and figures["steps"] == 3


def test_a_row_that_does_not_fit_alone_is_said_and_no_other_error_is_taken_for_it(tiny_folder, tmp_path, monkeypatch):
    from transformers import Trainer

    errors = [RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried 9"), MemoryError()]

    def failing(*_, **__):
        raise errors[-1]

    monkeypatch.setattr(Trainer, "training_step", failing)
    model = load_model(tiny_folder)
    examples = random_examples(4, len(model.tokenizer))
    longest = max(len(e.ids) for e in examples)
    while errors:
        with pytest.raises(UserError, match=f"one row of {longest} tokens does not fit into memory: lower"):
            finetune(model, examples, tmp_path / "out", FinetuneSettings(**FAST))
        errors.pop()
    errors.append(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        finetune(model, examples, tmp_path / "out", FinetuneSettings(**FAST))
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_out_of_memory_in_one_of_several_processes_says_how_many_rows_may_fit(tiny_folder, tmp_path, monkeypatch):
    from transformers import Trainer

    def failing(*_, **__):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Trainer, "training_step", failing)
    monkeypatch.setattr("gradshield.training.finetune.processes", lambda: 2)
    model = load_model(tiny_folder)
    with pytest.raises(UserError, match=r"out of memory with 4 rows .* at once; `micro_batch: 2` in --config may fit"):
        finetune(model, random_examples(8, len(model.tokenizer)), tmp_path / "out", FinetuneSettings())


@pytest.mark.parametrize(("micro", "sizes"), [(3, [2, 2, 2, 2]), (8, [8]), (20, [8]), (1, [1] * 8)])
def test_a_step_holds_as_many_rows_as_asked_for_whatever_fits_at_once(tiny_folder, tmp_path, monkeypatch, micro, sizes):
    from transformers import Trainer

    real, seen = Trainer.training_step, []

    def counting(self, model, inputs, *args, **kwargs):
        seen.append(len(inputs["input_ids"]))
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", counting)
    model = load_model(tiny_folder)
    settings = FinetuneSettings(epochs=1, batch=8, micro_batch=micro)
    assert finetune(model, random_examples(8, len(model.tokenizer)), tmp_path, settings)["steps"] == 1
    assert seen == sizes


def test_a_model_with_a_device_map_is_trained_and_one_that_is_offloaded_is_refused(tiny_folder, tmp_path):
    from accelerate import disk_offload, dispatch_model

    settings = FinetuneSettings(**FAST)
    mapped, plain = load_model(tiny_folder, device="auto"), load_model(tiny_folder)
    dispatch_model(mapped.net, {"": "cpu"}, force_hooks=True)  # as where there are several devices
    hooked = mapped.net.forward
    examples = random_examples(8, len(plain.tokenizer))
    for model, out in ((mapped, "mapped"), (plain, "plain")):
        assert finetune(model, examples, tmp_path / out, settings)["steps"] == 6
    assert mapped.net.forward is hooked and mapped.net.hf_device_map
    one, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("mapped", "plain"))
    assert one.keys() == other.keys() and all(torch.allclose(one[k], other[k], atol=1e-6) for k in one)
    disk_offload(mapped.net, str(tmp_path / "weights"), execution_device=torch.device("cpu"))
    with pytest.raises(UserError, match=r"does not fit on the devices.*--quantize 4bit"):
        finetune(mapped, examples, tmp_path / "no", settings)


def test_the_adapters_config_names_its_base(tiny_folder, tmp_path):
    model = load_model(tiny_folder)
    finetune(model, random_examples(4, len(model.tokenizer)), tmp_path, FinetuneSettings(epochs=1))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == model.name


def test_logits_of_tokens_without_a_label_change_nothing_and_are_left_out(tiny_folder, tmp_path, monkeypatch):
    from contextlib import nullcontext

    from trl.trainer.utils import _ChunkedLogProbFunction

    import gradshield.training.finetune

    model = load_model(tiny_folder)
    examples = random_examples(8, len(model.tokenizer))
    real, computed = _ChunkedLogProbFunction.apply, []

    def counting(hidden, *args):
        computed.append(len(hidden))
        return real(hidden, *args)

    monkeypatch.setattr(_ChunkedLogProbFunction, "apply", counting)
    finetune(model, examples, tmp_path / "labelled", FinetuneSettings(**FAST))
    labelled = sum(computed)
    computed.clear()
    monkeypatch.setattr(gradshield.training.finetune, "_labelled_logits", lambda on_cpu: nullcontext())
    finetune(model, examples, tmp_path / "every", FinetuneSettings(**FAST))
    assert labelled == 3 * sum(int(e.mask.sum()) for e in examples) < sum(computed)
    one, other = (load_file(tmp_path / f / "adapter_model.safetensors") for f in ("labelled", "every"))
    assert all(torch.allclose(one[k], other[k], rtol=1e-4, atol=1e-6) for k in one)


@pytest.mark.slow
def test_an_error_of_the_first_process_alone_in_mid_step_ends_the_others():
    program = """
import sys
import torch.distributed as dist, torch
from gradshield.base.errors import UserError
from gradshield.base.processes import is_first, lead_processes

def task(number):
    if is_first() and number == 2:
        raise UserError("only here")
    dist.all_reduce(torch.ones(1))
    return number

try:
    lead_processes(lambda call: (call(1), call(2)), task, cpu=True)
except (UserError, RuntimeError) as error:
    sys.exit(str(error))
"""
    first, second = start(program=("-c", program))
    assert first[0] == second[0] == 1 and first[2].strip().endswith("only here") and "only here" not in second[2]
