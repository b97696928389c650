"""After `warm_up` nothing is traced or compiled again, whatever requests arrive.

The engine is shared with many tests, and each of them asserts the same of the requests it made (`assert_warm`).
"""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxinfer.decode.sampling import GREEDY
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Warmed, WarmUp
from jaxinfer.engine.step_input import lay_out, padded
from jaxinfer.engine.warm_up import kernels_of, warm_programs
from jaxinfer.llm import LLM
from jaxinfer.machine import count_compiled
from tests.engine.tiny import CHARACTERS, ONE_LAYER, OPTIONS, assert_warm, tiny_folder, warm_llm, write_checkpoint

VARIED = [
    ("a", SamplingParams(max_tokens=1)),
    ("and so on", SamplingParams(temperature=0.0, prompt_logprobs=3)),
    ("x" * 70, SamplingParams(top_k=20, n=3, max_tokens=9)),
    ("hello", SamplingParams(temperature=0.0, max_tokens=30)),
    ("hello", SamplingParams(presence_penalty=0.5, frequency_penalty=0.1, min_tokens=2, max_tokens=20)),
    ("hello", SamplingParams(top_p=0.9, repetition_penalty=1.5, stop=["e"], max_tokens=30)),
    ([1, 2, 3], SamplingParams(min_p=0.1, temperature=0.5, seed=3, logit_bias={4: 2.0}, logprobs=2)),
    ("and so on", SamplingParams(min_tokens=3, stop_token_ids=[len(CHARACTERS) - 1], ignore_eos=True)),
]


@contextmanager
def counted(event: str):
    """Collects JAX's own reports of an event."""
    seen = []

    def listen(name: str, duration: float, **about):
        if event in name:
            seen.append(about)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_compiles_after_warm_up(tmp_path_factory):
    """Requests run alone, together, and in a stream that is left."""
    llm = warm_llm(tmp_path_factory.getbasetemp())
    with counted("compile") as compilations:
        for prompt, params in VARIED:
            llm.generate([prompt], params)
        llm.generate(*zip(*VARIED * 2, strict=True))
        for _ in llm.stream(*VARIED[-1]):
            break
    assert compilations == []
    assert_warm(llm)


def test_the_count_would_see_a_compilation():
    with counted("compile") as compilations:
        jax.jit(lambda x: x + 41)(1.0)
    assert compilations


def test_each_program_is_told_when_it_is_ready(tmp_path_factory, caplog):
    llm, told = warm_llm(tmp_path_factory.getbasetemp()), []
    with caplog.at_level("INFO", "jaxinfer.engine.warm_up"):
        done = llm.engine.warm_up(lambda warmed, total: told.append((warmed, total)))
    assert [warmed for warmed, _ in told] == list(done.warmed)
    every = warm_programs(llm.engine.runner, llm.engine.options.max_num_batched_tokens, masked=True)
    assert {warmed.name for warmed, _ in told} == {program.name for program in every}
    assert {total for _, total in told} == {len(told)} == {len({warmed.name for warmed, _ in told})}
    assert all(warmed.seconds > 0 for warmed in done.warmed)
    assert (done.programs, done.found) == (0, 0)  # it was warm
    assert [record.getMessage() for record in caplog.records] == [str(done)]


@pytest.mark.parametrize("devices", [1, 2])
def test_what_is_lowered_for_a_new_state_serves_those_that_programs_give_back(tmp_path_factory, devices):
    folder = tiny_folder(tmp_path_factory.getbasetemp())
    runner = LLM(folder, options=OPTIONS, tensor_parallel_size=devices).engine.runner
    given, slots_B = lay_out([], 64, 4), padded([], 4, 4)
    runner.lower_step(given).compile()
    runner.lower_loop(slots_B, GREEDY).compile()
    with count_compiled() as compiled:
        for _ in range(2):
            runner.update_all()
            runner.step(given, GREEDY)
            runner.loop(slots_B, GREEDY)
        runner.wait()
    traces = {"admit": 2, "release": 1, "extend": 1, "step": 1, "sample": 1, "loop": 1}
    assert (runner.programs.traces, compiled.programs) == (traces, 5)  # all but the step and the loop


def test_a_warm_up_in_words():
    done = WarmUp((Warmed("a", 0.5, 1.25, 3, 1), Warmed("b", 1.5, 2.0, 2, 2)), 2.75, 4)
    assert str(done) == "5 programs in 2.8 s, 3 of them from the cache; 4 kernels, lowered with them in 2.0 s"


def test_each_kernel_of_a_program_is_counted_once():
    @partial(jax.jit, static_argnums=1)
    def added(x: jax.Array, number: int) -> jax.Array:
        def kernel(x_ref, out_ref):
            out_ref[...] = x_ref[...] + number

        return plgpu.kernel(kernel, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    def lowered(program):
        x = jax.ShapeDtypeStruct((128,), jnp.float32)
        return jax.jit(program).trace(x).lower(lowering_platforms=("cuda",))

    assert kernels_of(lowered(lambda x: added(x, 1))) == 1
    assert kernels_of(lowered(lambda x: added(added(x, 1), 1) + 1)) == 1
    assert kernels_of(lowered(lambda x: added(added(x, 1), 2))) == 2
    assert kernels_of(lowered(lambda x: x + 1)) == 0


PROGRAM = """
import json, sys
from jaxinfer.engine import Options
from jaxinfer.llm import LLM
from jaxinfer.machine import count_compiled, keep_compiled

keep_compiled()
with count_compiled() as all_of_it:
    llm = LLM(sys.argv[1], options=Options(max_num_seqs=1, max_num_batched_tokens=64, page_size=8, num_pages=9))
    done = llm.engine.warm_up()
    llm.generate("hello")
print(json.dumps([done.programs, done.found, all_of_it.programs, all_of_it.found]))
"""


def test_a_second_start_compiles_nothing_again(tmp_path):
    folder = write_checkpoint(tmp_path / "model", ONE_LAYER)
    kept = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_ENABLE_COMPILATION_CACHE": "true"}
    environment, command = os.environ | kept, [sys.executable, "-c", PROGRAM, str(folder)]
    first, second = (
        json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
        for _ in range(2)
    )
    programs, found, *_ = first
    assert programs - found > 10
    assert second[0] == second[1] == programs
    assert second[2] == second[3] >= programs
