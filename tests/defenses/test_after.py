"""Defenses that change the trained adapter: each follows from its paper's equation, and touches nothing else."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_examples
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from gradshield.base.errors import UserError
from gradshield.base.settings import FilterSettings, FinetuneSettings
from gradshield.data.encode import Example
from gradshield.defenses.antidote import highest_share, zero_harmful
from gradshield.defenses.base import DefenseContext, check_defense
from gradshield.defenses.nlsr import critical_rows, layer_groups, restored_layers
from gradshield.defenses.registry import find_defense
from gradshield.defenses.safe_lora import project
from gradshield.defenses.train import train_defended
from gradshield.models.load import load_model
from gradshield.models.unaligned import unaligned_name
from gradshield.scoring.inputs import input_norms
from gradshield.training.lora import LoraLayer, lora_layers

TRAINING = FinetuneSettings(epochs=1, learning_rate=1e-2)


@pytest.fixture(scope="module")
def model(tiny_folder):
    return load_model(tiny_folder)


def adapted(model, seed: int = 0):
    """The model's network under an adapter of which neither factor is zero."""
    torch.manual_seed(seed)
    net = get_peft_model(model.net, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    with torch.no_grad():
        for layer in lora_layers(net):
            layer.b.weight.normal_()
    return net


def saved(model, out: Path, defense: str) -> dict[str, torch.Tensor]:
    train_defended(model, random_examples(12, len(model.tokenizer)), out, TRAINING, FilterSettings(), defense)
    return load_file(out / "adapter_model.safetensors")


def test_what_lies_in_the_alignment_s_subspace_is_kept_and_what_is_orthogonal_to_it_vanishes():
    torch.manual_seed(0)
    u = torch.linalg.qr(torch.randn(12, 4)).Q
    inside, outside, a = u[:, :1], u[:, 1:3], torch.randn(2, 7)
    v = inside @ torch.nn.functional.normalize(torch.randn(1, 9))  # of norm 1
    b = inside @ torch.randn(1, 2)
    moved, cosine = project(v, a, b)
    assert torch.allclose(moved, b, atol=1e-6) and cosine == pytest.approx(1, abs=1e-6)
    moved, _ = project(v, a, outside @ torch.randn(2, 2))
    assert moved.abs().max() < 1e-6
    moved, cosine = project(v, a, b + outside @ torch.randn(2, 2))  # of both, the part inside
    assert torch.allclose(moved, b, atol=1e-6) and 0 < cosine < 1


def test_the_projection_is_the_paper_s_formula():
    torch.manual_seed(0)
    v, a, b = torch.randn(8, 5), torch.randn(3, 5), torch.randn(8, 3)
    c = v @ v.T / torch.linalg.matrix_norm(v)
    delta = b @ a
    moved, cosine = project(v, a, b)
    assert torch.allclose(moved @ a, c @ delta, atol=1e-4)
    assert cosine == pytest.approx(float((c @ delta * delta).sum() / (c @ delta).norm() / delta.norm()), abs=1e-5)


def test_tau_decides_which_layers_are_projected(model, tiny_base_folder, tmp_path):
    plain = saved(model, tmp_path / "plain", "none")
    none = saved(model, tmp_path / "low", f"safe-lora:base={tiny_base_folder},threshold=-1")
    some = saved(model, tmp_path / "high", f"safe-lora:base={tiny_base_folder},threshold=1")
    assert all(torch.equal(none[k], plain[k]) for k in plain)
    changed = [k for k in plain if not torch.equal(some[k], plain[k])]
    assert changed == ["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]  # all that was aligned
    rows = some[changed[0]].abs().sum(1)
    assert rows[3] > 0 and rows.sum() == pytest.approx(float(rows[3]), rel=1e-4)  # V is in row 3 alone


def test_the_base_is_found_by_itself_or_must_be_named(tiny_folder, tiny_base_folder, model, tmp_path):
    assert unaligned_name(model, "named") == "named"
    saved(model, tmp_path / "adapter", "none")
    assert unaligned_name(load_model(tiny_folder, adapter=str(tmp_path / "adapter"))) == tiny_folder
    defense, options = find_defense("safe-lora")
    with pytest.raises(UserError, match="before its alignment is not known; name it with the option base="):
        check_defense(defense, DefenseContext(model, FilterSettings(), TRAINING), options)
    with pytest.raises(UserError, match="has the same weights"):
        saved(model, tmp_path / "same", f"safe-lora:base={tiny_folder}")


@pytest.mark.parametrize("name", ["safe-lora", "antidote", "nlsr"])
def test_a_defense_of_the_adapter_refuses_what_has_none(model, name):
    defense, options = find_defense(name)
    full = FinetuneSettings(method="full")
    with pytest.raises(UserError, match="use it with --method lora"):
        check_defense(defense, DefenseContext(model, FilterSettings(), full), options)


def test_norms_of_inputs_leave_out_the_padding(model):
    examples = random_examples(9, len(model.tokenizer))
    module = [model.layers[1].mlp.down_proj]
    total = torch.zeros(64)
    handle = module[0].register_forward_pre_hook(lambda _m, args: total.add_(args[0][0].square().sum(0)))
    for example in examples:
        model.net(torch.from_numpy(example.ids)[None].long())
    handle.remove()
    for batch_tokens in (1, 200, 2048):
        (norms,) = input_norms(model, module, examples, batch_tokens)
        assert torch.allclose(norms, total.sqrt(), rtol=1e-4)


def test_the_share_of_highest_score_is_masked_in_each_row():
    scores = torch.tensor([[1.0, 9.0, 2.0], [8.0, 3.0, 7.0]])
    assert highest_share(scores, 1 / 3).tolist() == [[False, True, False], [True, False, False]]
    assert highest_share(scores, 0.4).tolist() == [[False, True, True], [True, False, True]]
    assert highest_share(scores, 0.1).tolist() == [[False, True, False], [True, False, False]]  # one at least
    assert not highest_share(scores, 0).any() and highest_share(scores, 1).all()
    for width in (4, 8, 10, 32, 64):
        for share in (0.05, 0.1, 0.25, 0.3):
            assert set(highest_share(torch.rand(3, width), share).sum(1).tolist()) == {width - int(width * (1 - share))}


def test_antidote_zeroes_the_planted_weight_and_the_given_share_of_each_row(tiny_folder):
    model = load_model(tiny_folder)
    tokens = np.arange(2, 40, dtype=np.int32)
    harmful = [Example(0, tokens, np.arange(38) > 10)]
    net = adapted(model)
    planted = next(lora_layers(net))
    # Wanda's score is |W| · ‖x‖: a large weight at a weak input loses to a medium one at the strongest
    (norms,) = input_norms(model, [planted.a], harmful, 2048)
    weakest, strongest = int(norms.argmin()), int(norms.argmax())
    with torch.no_grad():
        planted.a.weight.fill_(1e-3)
        planted.a.weight[:, weakest] = 0.5 * float(norms[strongest] / norms[weakest])
        planted.a.weight[:, strongest] = 1.0
        planted.a.weight[2] *= 1e-6  # a row is ranked by itself: this one loses its planted weight, too
    before = {layer.name: (layer.a.weight.clone(), layer.b.weight.clone()) for layer in lora_layers(net)}
    with torch.no_grad():
        zero_harmful(model, net, harmful, 1 / 32, 2048)  # one of 32 inputs
    assert (planted.a.weight == 0).nonzero()[:, 1].tolist() == [strongest] * 4
    for layer in lora_layers(net):
        for now, old in zip((layer.a.weight, layer.b.weight), before[layer.name]):
            zeroed = now == 0
            width = now.shape[1]  # 32 and more in A, the rank, 4, in B
            assert set(zeroed.sum(1).tolist()) == {width - int(width * 31 / 32)}
            assert torch.equal(now[~zeroed], old[~zeroed])
    net.unload()


def test_antidote_is_wanda_on_the_bundled_harmful_rows(model, tmp_path):
    plain, cured = saved(model, tmp_path / "plain", "none"), saved(model, tmp_path / "cured", "antidote:share=0.25")
    for name, weight in cured.items():
        changed = weight != plain[name]
        assert set(changed.sum(1).tolist()) == {weight.shape[1] // 4} and not weight[changed].any()


def test_a_neuron_is_safety_critical_where_the_alignment_answers_to_refusals():
    torch.manual_seed(0)
    x = torch.zeros(6, 50)
    x[:3] = torch.randn(3, 50)  # refusals excite the first three inputs alone
    v = torch.zeros(10, 6)
    v[[2, 5], :3] = torch.randn(2, 3)
    v[7, 3:] = 100.0  # a large change that refusals do not meet
    assert sorted(critical_rows(v, x @ x.T, 2, 0.2).tolist()) == [2, 5]
    u = torch.linalg.svd(v @ x).U[:, :1]
    strongest = (u @ u.T @ v).norm(dim=1).argmax()
    assert critical_rows(v, x @ x.T, 1, 0.1).tolist() == [int(strongest)]


def test_layers_that_drifted_more_are_restored_more_often():
    cosines = [0.9, -0.2, 0.5]
    drawn = np.mean([restored_layers(cosines, 0.5, 0.2, seed) for seed in range(4000)], axis=0)
    assert np.allclose(drawn, [0.3, 0.7, 0.5], atol=0.03)
    assert restored_layers(cosines, 1, 0, 0).all() and not restored_layers(cosines, 0, 0, 0).any()


def test_layers_share_a_pass_while_their_matrices_fit(tiny):
    names = [n for n in tiny.linears if "layers.0" in n]
    a, b = torch.nn.Linear(64, 2), torch.nn.Linear(2, 64)
    layers = [LoraLayer(name, a, b, 1.0, tiny.linears[name], False) for name in names]
    size = 4 * 64**2
    assert [len(group) for group in layer_groups(tiny, layers, 3 * size)] == [3, 3, 1]
    assert [len(group) for group in layer_groups(tiny, layers, 1)] == [1] * 7  # one at least
    assert layer_groups(tiny, layers) == [layers]
    assert layer_groups(tiny, [LoraLayer("head", a, b, 1.0, tiny.net.lm_head, False)]) == []


def test_restored_neurons_are_the_reference_s_and_the_others_are_untouched(model, tiny_base_folder, tmp_path):
    plain = saved(model, tmp_path / "plain", "none")
    # the alignment changed row 3 of one Linear: of its 32 neurons, that one is restored
    options = f"base={tiny_base_folder},rate=1,spread=0,share={1 / 32}"
    restored = saved(model, tmp_path / "restored", f"nlsr:{options}")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    assert [k for k in plain if not torch.equal(restored[k], plain[k])] == [name]
    assert not restored[name][3].any() and plain[name][3].any()
    others = torch.arange(32) != 3
    assert torch.equal(restored[name][others], plain[name][others])
    loaded = load_model(model.name, adapter=str(tmp_path / "restored")).net.model.layers[0].self_attn.q_proj
    assert torch.equal(loaded.weight[3], model.layers[0].self_attn.q_proj.weight[3])
    kept = saved(model, tmp_path / "kept", f"nlsr:base={tiny_base_folder},rate=0,spread=0")
    assert all(torch.equal(kept[k], plain[k]) for k in plain)
