"""The inputs of Linears are each token's, once, whatever fits into memory."""

import numpy as np
import pytest
import torch
from conftest import random_examples

from gradshield.base.errors import UserError
from gradshield.scoring.inputs import input_grams, read_inputs


@pytest.fixture
def short_of_memory(tiny):
    """The second block takes two rows at once; by then, the first one's inputs have been read."""

    def refuse(_module, args):
        if len(args[0]) > 2:
            raise torch.OutOfMemoryError("no")

    handle = tiny.layers[1].mlp.register_forward_pre_hook(refuse)
    yield
    handle.remove()


@pytest.mark.parametrize("responses", [True, False])
def test_out_of_memory_half_way_through_a_pass_leaves_no_token_out_and_counts_none_twice(
    tiny, short_of_memory, responses
):
    rows = random_examples(11, len(tiny.tokenizer))
    modules = [block.mlp.down_proj for block in tiny.layers[:2]]
    found = [0, 0]

    def take(number, x):
        found[number] += len(x)

    read_inputs(tiny, modules, rows, 4096, take, responses=responses)
    assert found == [sum(int(e.mask.sum()) if responses else len(e.ids) for e in rows)] * 2


def test_grams_are_those_of_each_row_by_itself_also_where_memory_is_short(tiny, short_of_memory):
    rows = random_examples(5, len(tiny.tokenizer))
    modules = [block.mlp.down_proj for block in tiny.layers[:2]]
    expected = [sum(grams) for grams in zip(*(input_grams(tiny, modules, [row], 4096) for row in rows))]
    for found, wanted in zip(input_grams(tiny, modules, rows, 4096), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_a_row_that_does_not_fit_by_itself_is_said(tiny):
    def refuse(*_):
        raise MemoryError

    with pytest.raises(UserError, match=r"a row of .* tokens does not fit even alone; lower --max-length"):
        read_inputs(tiny, [tiny.layers[0].mlp.down_proj], random_examples(1, 100), 4096, refuse)
