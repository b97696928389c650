"""What only a GPU can show: its compiler copies nothing either, and its numbers are those of transformers."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxinfer.decode.layout import Layout
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import Speculation, depth_of
from jaxinfer.decode.step import Programs
from jaxinfer.engine import Options
from jaxinfer.llm import LLM
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from tests.decode.branching import Branching
from tests.decode.test_compiled import moved
from tests.golden.load import load_demo

pytestmark = pytest.mark.gpu
TRIED_DTYPES = ("bfloat16", "int8", "float8_e4m3fn")
LLAMA = Path(__file__).parents[1] / "configs" / "models" / "llama-3-8b"


def decode_loop(num_pages: int, cache_dtype: str, slots: int = 16, speculation: Speculation | None = None):
    """Two layers of Llama-3-8B in bfloat16: the compiled loop, the model and the cache."""
    config = read_config(LLAMA)
    model = Model(dataclasses.replace(config, layers=config.layers[:2]), make_mesh(), context=400)
    programs = Programs(model, Layout(slots, 16, (num_pages,), 400, cache_dtype, speculation=speculation))
    state, cache = programs.new_state()
    given = (list(model.parameters.values()), state, cache, np.arange(slots, dtype=np.int32))
    asked = {"steps": 4, "needs": Needs("greedy", 0), "drafts": depth_of(speculation)}
    return programs.lower_loop(*given, **asked).compile(), model, cache


@pytest.mark.parametrize("speculation", [None, Branching()], ids=["plain", "tree"])
@pytest.mark.parametrize("dtype", TRIED_DTYPES)
def test_a_decode_step_of_real_shapes_moves_no_cache_and_no_weight(dtype, speculation):
    executable, model, cache = decode_loop(401, dtype, speculation=speculation)
    pools = {array.size for array in jax.tree.leaves(cache)}
    weights = {math.prod(leaf.shape) for leaf in model.parameters.values() if len(leaf.shape) > 1}
    assert moved(executable.as_text(), pools | weights) == []


@pytest.mark.parametrize("dtype", TRIED_DTYPES)
def test_temporary_memory_does_not_grow_with_the_pool(dtype):
    small, large = (decode_loop(pages, dtype)[0].memory_analysis().temp_size_in_bytes for pages in (401, 4001))
    assert small == large


def test_the_demo_model_writes_what_it_writes_with_transformers():
    golden = load_demo()
    llm = LLM(dtype="float32", max_model_len=384, options=Options(max_num_seqs=32))
    outputs = llm.generate(golden.texts, SamplingParams(temperature=0.0, max_tokens=256, ignore_eos=True))
    ours = [output.prompt_token_ids + output.outputs[0].token_ids for output in outputs]
    assert ours == golden.sequences
