import numpy as np
from scored import PROBES, rows_of, scored

from gradshield.data.encode import Example, encode_request
from gradshield.scoring.bundled_requests import harmless_requests, requests_to_refuse
from gradshield.scoring.states import cosine, read_states


def test_it_is_the_cosine_with_the_difference_of_means_and_does_not_read_the_answer(tiny):
    def mean(requests):
        encoded = [encode_request(request, tiny.tokenizer) for request in requests]
        rows = [Example(n, ids, np.arange(len(ids)) > 0) for n, ids in enumerate(encoded)]
        return read_states(tiny, rows, [1], "last", 4000)[0].mean(0)

    feature = mean(requests_to_refuse(PROBES)) - mean(harmless_requests())
    rows = rows_of(tiny, [("Bake a cake", "Sure"), ("Bake a cake", "I can't help with that"), (PROBES[0], "Sure")])
    found = scored(tiny, "ref-teacher:layer=1", rows)["score"]
    states = read_states(tiny, rows, [1], "prompt", 400)[0]
    np.testing.assert_allclose(found, cosine(states, feature[None])[:, 0], atol=1e-4)
    assert found[0] == found[1] != found[2]
