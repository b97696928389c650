"""With 8-bit pages too a request's text depends on the request alone: no token's scale depends on another token."""

from dataclasses import replace

import pytest

from jaxinfer.cache.quantized import LARGEST
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Options
from jaxinfer.llm import LLM
from tests.engine.tiny import assert_clean, tiny_folder

BEGINNING = "def f(x):\n    return " * 2  # past the window of 8, and several pages
REQUESTS = [
    *[(BEGINNING + end, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)) for end in ("x", "y + 1")],
    ("0123456789" * 6, SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)),
    ([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)),
]
# One request at a time, whole prompts, one step in a program, and a page for most of them.
ALONE = Options(
    max_num_seqs=1, max_num_batched_tokens=64, page_size=32, steps_per_dispatch=1, enable_prefix_caching=False
)
# Prompts in chunks, since they share the rows of a step, long programs, and pages that do not suffice for all.
FEW = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "page_size": 8, "num_pages": 22, "steps_per_dispatch": 7}


def test_the_batch_does_not_matter(one_rectangle, tmp_path_factory):
    """The engine does the same with both dtypes; what a token's scale depends on, `tests.test_cache` asks of both."""
    folder = tiny_folder(tmp_path_factory.getbasetemp())
    alone = LLM(folder, options=replace(ALONE, cache_dtype="int8"))
    expected = [alone.generate([prompt], params)[0] for prompt, params in REQUESTS]
    together = LLM(folder, options=Options(**FEW, cache_dtype="int8"))
    for order in (1, -1):
        assert together.generate(*zip(*REQUESTS[::order], strict=True)) == expected[::order]
        assert_clean(together)
    counters = together.engine.metrics.counters
    assert counters.preemptions > 0
    assert counters.prefix_hits > 0


@pytest.mark.parametrize("dtype", LARGEST)
def test_an_8_bit_cache_is_what_the_engine_holds(dtype, tmp_path_factory):
    llm = LLM(tiny_folder(tmp_path_factory.getbasetemp()), options=Options(cache_dtype=dtype, num_pages=9))
    held = sum(array.nbytes for pages in llm.engine.runner.cache for array in vars(pages).values())
    layers, pages, slots, heads, size = 2, 9, 16, 2, 8
    assert held == layers * pages * slots * 2 * heads * (size + 4)
