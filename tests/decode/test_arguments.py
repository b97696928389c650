"""What counts as an integer and as a number, wherever an argument must be one."""

import math

import numpy as np
import pytest

from jaxinfer.decode.arguments import check_size, is_integer, is_number, is_size
from jaxinfer.decode.speculative import DraftModel, Eagle, EarlyExit, Lookahead, PromptLookup
from jaxinfer.decode.tree import Tree
from jaxinfer.engine import Options


@pytest.mark.parametrize(
    ("value", "integer", "size", "number"),
    [
        (3, True, True, True),
        (np.int32(3), True, False, True),
        (3.0, False, False, True),
        (math.nan, False, False, True),
        (True, False, False, False),
        (np.True_, False, False, False),
        ("3", False, False, False),
        (None, False, False, False),
    ],
)
def test_no_flag_is_a_number(value, integer, size, number):
    assert (is_integer(value), is_size(value, 1), is_number(value)) == (integer, size, number)
    assert not is_integer(value, 4)
    assert not is_integer(value, most=2)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: Options(max_num_seqs=value), "max_num_seqs"),
        (lambda value: Options(steps_per_dispatch=value), "steps_per_dispatch"),
        (lambda value: Options(num_pages=value), "num_pages"),
        (lambda value: PromptLookup(value), "num_speculative_tokens"),
        (lambda value: PromptLookup(1, value), "prompt_lookup_max"),
        (lambda value: DraftModel("a", value), "num_speculative_tokens"),
        (lambda value: EarlyExit(1, value), "exit_layers"),
        (lambda value: Lookahead(window_size=value), "window_size"),
        (lambda value: Eagle("a", depth=value), "depth"),
        (lambda value: Tree((-1, value)), r"parents\[1\]"),
        (lambda value: check_size("so_many", value, 1), "so_many"),
    ],
)
@pytest.mark.parametrize("value", [True, "2", 2.0, np.int64(2), -2])
def test_sizes_are_integers_of_python(make, name, value):
    with pytest.raises(ValueError, match=rf"{name} = .* must be "):
        make(value)
