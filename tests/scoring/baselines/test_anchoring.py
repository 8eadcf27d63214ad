import numpy as np
import torch
from conftest import random_examples
from scored import scored

from gradshield.scoring.anchors import anchor_examples
from gradshield.scoring.fihs.autograd import gradient_of, loss_of
from gradshield.scoring.fihs.descent import first_tokens
from gradshield.scoring.states import cosine, read_states


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


def test_a_harmful_anchor_is_its_own_nearest(tiny):
    known = anchor_examples(tiny)["harmful"][::2]
    rows = [known[4], *random_examples(3, 200)]
    found = scored(tiny, "anchoring:by=representation", rows)["score"]
    np.testing.assert_allclose(found[0], 1, atol=1e-5)
    states, others = (read_states(tiny, part, [2], "last", 400)[0] for part in (rows, known))
    np.testing.assert_allclose(found, cosine(states, others).max(1), atol=1e-5)
