"""The contraction is held to per-example autograd, and does not depend on batch, padding or order."""

import gc
import weakref

import numpy as np
import pytest
import torch
from conftest import freeze, random_examples, tiny_tokenizer
from scoring.gradients import REQUESTS, S, loss_by_autograd, probe_by_autograd

from gradshield.base.errors import UserError
from gradshield.data.encode import encode_request
from gradshield.models import hooks
from gradshield.models.load import Model
from gradshield.scoring.fihs.contraction import contract, random_directions
from gradshield.scoring.fihs.probe import Factors, ProbeGradient, compress, probe_gradient
from gradshield.scoring.fihs.scorer import fihs_scorer


@pytest.fixture(params=["tiny", "tiny_gpt2"])
def model(request) -> Model:
    return request.getfixturevalue(request.param)


def test_every_linear_of_the_decoder_is_covered(model):
    share, missing = model.coverage()
    assert share == 1.0 and not missing


def test_probe_factors_are_the_gradient_of_s(model):
    expected = probe_by_autograd(model)
    factors = probe_gradient(model, REQUESTS, S, tolerance=0).factors
    for name, gradient in expected.items():
        torch.testing.assert_close(factors[name].dense(), gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_dots_and_norms_equal_per_example_autograd(model):
    probe = probe_gradient(model, REQUESTS, S, tolerance=0)
    expected_probe = probe_by_autograd(model)
    examples = random_examples(9, len(model.tokenizer))
    result = contract(model, examples, probe, exact_norms=True)
    for n, example in enumerate(examples):
        expected = loss_by_autograd(model, example)
        dots = torch.stack([(expected[k] * expected_probe[k]).sum() for k in probe.factors])
        norms = torch.stack([expected[k].square().sum() for k in probe.factors])
        assert abs(result.dots[n].sum() - dots.sum()) <= 1e-5 * dots.abs().sum()
        torch.testing.assert_close(result.norms[n], norms, rtol=1e-4, atol=1e-9)


def test_scores_do_not_depend_on_batch_padding_or_order(model):
    probe = probe_gradient(model, REQUESTS, S)
    random = random_directions(probe.factors, 4)
    examples = random_examples(12, len(model.tokenizer))
    whole = contract(model, examples, probe, random)
    shuffled = np.random.default_rng(1).permutation(len(examples))
    again = contract(model, [examples[n] for n in shuffled], probe, random)
    single = torch.cat([contract(model, [e], probe, random).dots for e in examples])
    scale = float(whole.dots.abs().max())
    torch.testing.assert_close(again.dots, whole.dots[torch.tensor(shuffled)], rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(single, whole.dots, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(again.norms, whole.norms[torch.tensor(shuffled)], rtol=1e-4, atol=1e-8)


def test_random_directions_estimate_the_norm(model):
    probe = probe_gradient(model, REQUESTS, S)
    examples = random_examples(4, len(model.tokenizer))
    exact = contract(model, examples, probe, exact_norms=True).norms.sum(1)
    estimated = contract(model, examples, probe, random_directions(probe.factors, 2000)).norms.sum(1)
    torch.testing.assert_close(estimated, exact, rtol=0.15, atol=0)


def test_compression_keeps_within_the_tolerance():
    generator = torch.Generator().manual_seed(0)
    inp = torch.randn(40, 24, generator=generator) * torch.logspace(0, -6, 40)[:, None]
    factors = Factors(inp, torch.randn(40, 30, generator=generator))
    exact, rough = compress(factors, 0), compress(factors, 1e-2)
    assert exact.inp.shape[0] <= 24 and rough.inp.shape[0] < exact.inp.shape[0]
    size = factors.dense().norm()
    assert (exact.dense() - factors.dense()).norm() < 1e-5 * size
    assert (rough.dense() - factors.dense()).norm() <= 1.01e-2 * size


def test_a_step_on_a_high_fihs_row_lowers_s(tiny):
    """The sign: descending the loss of the row with the highest FIHS lowers S, of the lowest raises it."""
    probe = probe_gradient(tiny, REQUESTS, S)
    examples = random_examples(20, len(tiny.tokenizer))
    fihs = contract(tiny, examples, probe).dots.sum(1)
    encoded = [torch.tensor(encode_request(r, tiny.tokenizer)).long() for r in REQUESTS]

    def mean_s() -> float:
        with torch.no_grad():
            return float(torch.stack([S(tiny.net(ids[None]).logits[0, -1]) for ids in encoded]).mean())

    for pick, sign in ((int(fihs.argmax()), -1), (int(fihs.argmin()), 1)):
        gradients = loss_by_autograd(tiny, examples[pick])
        before = mean_s()
        for step in (-1e-4, 1e-4):  # there and back, the model stays as it was
            for name, gradient in gradients.items():
                tiny.linears[name].weight.data.add_(step * gradient)
            if step < 0:
                assert (mean_s() - before) * sign > 0


def test_a_device_map_scores_as_one_device(tiny_folder):
    from gradshield.models.load import load_model

    pytest.importorskip("accelerate")
    plain, spread = load_model(tiny_folder), load_model(tiny_folder, device="auto")
    examples = random_examples(5, len(plain.tokenizer))
    one, other = (contract(m, examples, probe_gradient(m, REQUESTS, S)).dots for m in (plain, spread))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(one.abs().max()))


def test_logits_in_parts_change_nothing(model, monkeypatch):
    probe, examples = probe_gradient(model, REQUESTS, S, tolerance=0), random_examples(7, len(model.tokenizer))
    whole = contract(model, examples, probe, exact_norms=True)
    monkeypatch.setitem(hooks.LOGITS, "cpu", 5 * len(model.tokenizer))
    forward = model.net.base_model.forward
    parts = contract(model, examples, probe, exact_norms=True)
    assert model.net.base_model.forward == forward
    for one, other in zip((whole.dots, whole.norms, whole.loss), (parts.dots, parts.norms, parts.loss)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(one.abs().max()))


def test_what_a_model_does_behind_its_head_is_done_to_logits_in_parts_too(monkeypatch):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    config = Gemma2Config(vocab_size=len(tokenizer), num_key_value_heads=1, final_logit_softcapping=0.05, **sizes)
    capped = freeze("gemma", Gemma2ForCausalLM(config), tokenizer)
    examples = random_examples(5, len(tokenizer))
    probe = probe_gradient(capped, REQUESTS, S, tolerance=0)
    whole = contract(capped, examples, probe)
    monkeypatch.setitem(hooks.LOGITS, "cpu", 5 * len(tokenizer))
    parts = contract(capped, examples, probe)
    torch.testing.assert_close(parts.loss, whole.loss)
    torch.testing.assert_close(parts.dots, whole.dots, rtol=1e-4, atol=1e-6 * float(whole.dots.abs().max()))
    dots = [sum(float((g * p).sum()) for g, p in pairs) for pairs in (
        zip(loss_by_autograd(capped, e).values(), probe_by_autograd(capped).values()) for e in examples
    )]  # fmt: skip
    np.testing.assert_allclose(parts.dots.sum(1), dots, rtol=1e-3, atol=1e-4 * max(map(abs, dots)))


def test_a_module_that_runs_twice_has_the_sum_of_its_gradients(tiny_folder):
    from gradshield.models.load import load_model

    shared = load_model(tiny_folder)
    shared.net.model.layers[1].mlp = shared.net.model.layers[0].mlp
    probe = probe_gradient(shared, REQUESTS, S, tolerance=0)
    expected, examples = probe_by_autograd(shared), random_examples(5, len(shared.tokenizer))
    found = contract(shared, examples, probe, random_directions(probe.factors, 4096))
    for n, example in enumerate(examples):
        of = loss_by_autograd(shared, example)
        for column, name in enumerate(probe.factors):
            dot, norm = float((of[name] * expected[name]).sum()), float(of[name].square().sum())
            assert float(found.dots[n, column]) == pytest.approx(dot, rel=1e-3, abs=1e-5)
            assert float(found.norms[n, column]) == pytest.approx(norm, rel=0.2)  # 4096 directions
    with pytest.raises(UserError, match="runs several times"):
        contract(shared, examples, probe, exact_norms=True)


def test_blocks_that_run_in_a_loop_are_followed_through_all_rounds(tiny_folder):
    from gradshield.models.load import load_model

    looped = load_model(tiny_folder)
    looped.net.config.use_cache = False
    decoder, real = looped.net.model, looped.net.model.layers[-1].forward

    def again(hidden, *args, **kwargs):
        hidden = real(hidden, *args, **kwargs)
        first = decoder.layers[0](hidden[0] if isinstance(hidden, tuple) else hidden, *args, **kwargs)
        return (first, *hidden[1:]) if isinstance(hidden, tuple) else first

    decoder.layers[-1].forward = again
    probe = probe_gradient(looped, REQUESTS, S, tolerance=0)
    expected, examples = probe_by_autograd(looped), random_examples(5, len(looped.tokenizer))
    dots = contract(looped, examples, probe).dots
    for n, example in enumerate(examples):
        of = loss_by_autograd(looped, example)
        for column, name in enumerate(probe.factors):
            dot = float((of[name] * expected[name]).sum())
            assert float(dots[n, column]) == pytest.approx(dot, rel=1e-3, abs=1e-5)


def test_linears_of_one_weight_are_left_out_and_said_to_be(tiny_folder):
    from gradshield.models.load import load_model

    model = load_model(tiny_folder)
    one, other = (layer.mlp.up_proj for layer in model.net.model.layers[:2])
    other.weight = one.weight
    names = [n for n in model.linears if n.endswith("mlp.up_proj")]
    assert len(names) == len(model.net.model.layers) - 2
    assert any("up_proj" in name for name in model.coverage()[1])


def test_a_linear_that_nothing_calls_and_one_that_gives_a_tuple_have_no_part_in_the_score(tiny_folder):
    from gradshield.models.load import load_model

    class Router(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    model, plain = load_model(tiny_folder), load_model(tiny_folder)
    model.net.model.layers[-1].mlp.unused = torch.nn.Linear(8, 8)  # last, so that all directions are as before
    model.net.model.layers[-1].mlp.router = Router(8, 8)
    probe, examples = probe_gradient(model, REQUESTS, S), random_examples(4, len(model.tokenizer))
    assert len(probe.factors) == len(plain.linears) + 1 and not any("router" in name for name in probe.factors)
    for variant in ("paper", "module"):
        found, wanted = (
            fihs_scorer(m, probe_gradient(m, REQUESTS, S), variant)(examples)["score"] for m in (model, plain)
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_estimated_norms_are_right_on_average_and_so_is_the_normalised_score(tiny):
    probe = probe_gradient(tiny, REQUESTS, S, tolerance=0)
    examples = random_examples(6, len(tiny.tokenizer))
    exact = contract(tiny, examples, probe, exact_norms=True)
    many = contract(tiny, examples, probe, random_directions(probe.factors, 4096))
    torch.testing.assert_close(many.norms, exact.norms, rtol=0.2, atol=0.0)
    module, estimated = ((c.dots / c.norms.sqrt()).mean(1) for c in (exact, many))
    torch.testing.assert_close(estimated, module, rtol=0.05, atol=0.02 * float(module.abs().max()))


def test_the_backward_ends_at_the_lowest_block_that_is_asked_for(tiny):
    examples = random_examples(4, len(tiny.tokenizer))
    probe = probe_gradient(tiny, REQUESTS, S)
    upper = {name: f for name, f in probe.factors.items() if ".layers.0." not in name}
    reached = []
    handle = tiny.layers[0].register_forward_hook(lambda _m, _a, output: reached.append(output[0].requires_grad))
    try:
        found = contract(tiny, examples, ProbeGradient(upper)).dots
    finally:
        handle.remove()
    place = [list(probe.factors).index(name) for name in upper]
    torch.testing.assert_close(found, contract(tiny, examples, probe).dots[:, place])
    assert reached == [False] and 0 < len(upper) < len(probe.factors)


def test_an_activations_output_is_made_again_bit_for_bit_instead_of_kept(model, monkeypatch):
    from contextlib import nullcontext

    rows, probe = random_examples(5, len(model.tokenizer)), probe_gradient(model, REQUESTS, S)
    saved = []

    def bytes_kept() -> int:
        saved.clear()
        real = torch.autograd.graph.saved_tensors_hooks

        class Counting(real):
            def __init__(self, pack, unpack):
                def counted(tensor):
                    kept = pack(tensor)
                    saved.append(tensor.nbytes if isinstance(kept, torch.Tensor) else 0)
                    return kept

                super().__init__(counted, unpack)

        with monkeypatch.context() as patched:
            patched.setattr(torch.autograd.graph, "saved_tensors_hooks", Counting)
            contract(model, rows, probe)
        return sum(saved)

    again = contract(model, rows, probe, exact_norms=True)
    less = bytes_kept()
    made_again = saved.count(0)
    with monkeypatch.context() as patched:
        patched.setattr(hooks, "_activations_again", lambda _: nullcontext())
        kept = contract(model, rows, probe, exact_norms=True)
    assert torch.equal(again.dots, kept.dots) and torch.equal(again.norms, kept.norms)
    gated = hasattr(model.layers[0], "mlp") and hasattr(model.layers[0].mlp, "gate_proj")
    assert less > 0 and made_again == (len(model.layers) if gated else 0)


def test_a_pass_that_fails_keeps_nothing(model):
    """Memory ends in the midst of a pass, and the batch is halved: what the first try made must be gone by then."""
    made = []

    def ends(_module, _args, output):
        made.append(weakref.ref(output[0] if isinstance(output, tuple) else output))
        if len(made) == 2:
            raise RuntimeError("out of memory")

    probe = probe_gradient(model, REQUESTS, S)
    handles = [layer.register_forward_hook(ends) for layer in model.layers]
    try:
        contract(model, random_examples(4, len(model.tokenizer)), probe)
    except RuntimeError as error:
        assert "out of memory" in str(error)
    finally:
        for handle in handles:
            handle.remove()
    gc.collect()
    assert len(made) == 2 and made[0]() is None


def test_attention_is_not_left_to_cudnn_in_a_backward_pass(tiny):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with hooks.gradients_from(tiny):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
