"""What a step computes, laid out as its rows."""

import numpy as np

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Request
from jaxinfer.engine.sequence import Chunk, Sequence
from jaxinfer.engine.step_input import lay_out, next_tokens


def test_chunks_are_laid_out_one_after_the_other():
    prompts = [(1, 2, 3, 4, 5), (6, 7), (8, 9, 10, 11)]
    first, second, third = (
        Sequence(Request(slot, prompt, SamplingParams(), (), 0), slot=slot) for slot, prompt in enumerate(prompts)
    )
    chunks = [Chunk(first, 2, 3), Chunk(second, 0, 2), Chunk(third, 1, 2)]
    step = lay_out(chunks, 8, 4)
    assert step.tokens_T.tolist() == [3, 4, 5, 6, 7, 9, 10, 0]
    assert step.slots_B.tolist() == []
    assert step.starts_R1.tolist() == [0, 3, 5, 7, 7]
    assert step.slots_R.tolist() == [0, 1, 2, 4]
    assert step.lengths_R.tolist() == [5, 2, 3, 0]
    assert step.last_R.tolist() == [1, 1, 0, 0]
    assert next_tokens(chunks, 8).tolist() == [4, 5, -1, 7, -1, 10, 11, -1]


def test_slots_that_decode_come_before_the_chunks():
    sequence = Sequence(Request(0, (1, 2, 3, 4, 5), SamplingParams(), (), 0), slot=0)
    chunks = [Chunk(sequence, 1, 3)]
    step = lay_out(chunks, 6, 4, [3, 1])
    assert step.tokens_T.tolist() == [0, 0, 2, 3, 4, 0]
    assert step.slots_B.tolist() == [3, 1, 4, 4]
    assert step.starts_R1.tolist() == [2, 5, 5, 5, 5]
    assert next_tokens(chunks, 6, 2).tolist() == [-1, -1, 3, 4, 5, -1]
    assert lay_out(chunks, 3, 4, []).slots_B.tolist() == [4, 4, 4]  # no more than there are rows
    packed = step.packed()
    assert packed.dtype == np.int32
    for sent, got in zip(vars(step).values(), vars(step.unpacked(packed, **step.sizes)).values(), strict=True):
        np.testing.assert_array_equal(sent, got)
