import numpy as np
import pytest
import torch
from conftest import freeze, random_examples, tiny_net, tiny_tokenizer
from scored import scored


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity():
    tokenizer = tiny_tokenizer()
    net = tiny_net(tokenizer)
    for weight in net.parameters():
        weight.data.zero_()
    found = scored(freeze("zero", net, tokenizer), "perplexity", random_examples(5, 200))
    np.testing.assert_allclose(found["score"], len(tokenizer), rtol=1e-5)


def test_it_is_that_of_the_response_tokens(tiny):
    [row] = random_examples(1, 200, seed=3)
    labels = torch.from_numpy(np.where(row.mask, row.ids, -100)).long()[None]
    with torch.no_grad():
        loss = tiny.net(input_ids=torch.from_numpy(row.ids).long()[None], labels=labels).loss
    assert scored(tiny, "perplexity", [row])["score"][0] == pytest.approx(float(loss.exp()), rel=1e-4)
