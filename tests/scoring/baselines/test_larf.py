import numpy as np
import torch
from conftest import freeze, random_examples, tiny_net, tiny_tokenizer
from scored import scored

from gradshield.scoring.anchors import anchor_examples
from gradshield.scoring.baselines.larf import sensitive_layer
from gradshield.scoring.states import cosine, read_states


def test_it_is_the_difference_of_mean_cosines(tiny):
    rows, anchors = random_examples(4, 200), anchor_examples(tiny)
    states = [
        read_states(tiny, part, [1], "last", 400)[0]
        for part in (rows, *(anchors[k][:200:2] for k in ("harmful", "refusal")))
    ]
    wanted = cosine(states[0], states[1]).mean(1) - cosine(states[0], states[2]).mean(1)
    np.testing.assert_allclose(scored(tiny, "larf:layer=1", rows)["score"], wanted, atol=1e-5)


def test_the_only_layer_that_does_anything_is_the_sensitive_one():
    tokenizer = tiny_tokenizer()
    net = tiny_net(tokenizer)
    with torch.no_grad():
        for n in (0, 2):  # blocks that add nothing to what they are given
            net.model.layers[n].self_attn.o_proj.weight.zero_()
            net.model.layers[n].mlp.down_proj.weight.zero_()
    assert sensitive_layer(freeze("one", net, tokenizer), 0.2) == 1
