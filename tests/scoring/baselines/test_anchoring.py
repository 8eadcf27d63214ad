import numpy as np
import pytest
import torch
from conftest import freeze, random_examples, tiny_net, tiny_tokenizer
from scored import scored

from gradshield.models.hooks import hidden_at
from gradshield.scoring.anchors import anchor_examples
from gradshield.scoring.fihs.autograd import gradient_of, loss_of
from gradshield.scoring.fihs.descent import first_tokens
from gradshield.scoring.states import cosine


def last_state(model, row) -> np.ndarray:
    """The last of transformers' own hidden states, which is behind the final norm, at the row's last token."""
    with torch.no_grad():
        output = model.net(input_ids=torch.from_numpy(row.ids)[None].long(), output_hidden_states=True)
    return output.hidden_states[-1][0, -1].numpy()


def flat(model, row) -> torch.Tensor:
    """The unit gradient of the row's first ten response tokens."""
    gradient = gradient_of(model.weights, loss_of(model, first_tokens(row, 10), []))
    g = torch.cat([each.flatten() for each in gradient.values()]).double()
    return g / g.norm()


def test_the_gradient_form_is_that_of_dense_gradients(tiny):
    rows, anchors = random_examples(5, 200), anchor_examples(tiny)
    harmful, safe = anchors["harmful"][::2], anchors["refusal"][::2]
    means = [torch.stack([flat(tiny, e) for e in part]).mean(0) for part in (harmful[:3], safe[:3], safe[3:6])]
    wanted = [float(flat(tiny, row) @ (means[0] - means[1] - means[2])) for row in rows]
    np.testing.assert_allclose(scored(tiny, "anchoring:examples=3", rows)["score"], wanted, atol=0.01)


def test_a_harmful_anchor_is_its_own_nearest_behind_the_final_norm():
    tokenizer = tiny_tokenizer()
    net = tiny_net(tokenizer)
    torch.manual_seed(0)
    torch.nn.init.uniform_(net.model.norm.weight)  # of ones, it would change no cosine
    model = freeze("tiny-norm", net, tokenizer)
    known = anchor_examples(model)["harmful"][::2]
    rows = [known[4], *random_examples(3, 200)]
    found = scored(model, "anchoring:by=representation", rows)["score"]
    np.testing.assert_allclose(found[0], 1, atol=1e-5)
    states, others = (np.stack([last_state(model, row) for row in part]) for part in (rows, known))
    np.testing.assert_allclose(found, cosine(states, others).max(1), atol=1e-5)


@pytest.mark.parametrize("kind", ["tiny", "tiny_gpt2"])
def test_what_the_head_is_given_comes_after_the_blocks_outputs_and_the_final_norm(kind, request):
    model = request.getfixturevalue(kind)
    ids, count = torch.arange(2, 20).reshape(2, 9), len(model.layers)
    first, *_, last = hidden_at(model, ids, [0, count])
    with torch.no_grad():
        known = model.net(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(known) == count + 1 and torch.allclose(first, known[1], atol=1e-6)
    assert torch.allclose(last, known[-1], atol=1e-6)
    assert not torch.allclose(last, hidden_at(model, ids, [count - 1])[0], atol=1e-2)
