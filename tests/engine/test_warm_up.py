"""After `warm_up` nothing is traced or compiled again, whatever requests arrive.

The engine is shared with many tests, and each of them asserts the same of the requests it made (`assert_warm`).
"""

from contextlib import contextmanager

import jax

from jaxinfer.decode.sampling_params import SamplingParams
from tests.engine.tiny import CHARACTERS, assert_warm, warm_llm

VARIED = [
    ("a", SamplingParams(max_tokens=1)),
    ("and so on", SamplingParams(temperature=0.0, prompt_logprobs=3)),
    ("x" * 70, SamplingParams(top_k=20, n=3, max_tokens=9)),
    ("hello", SamplingParams(temperature=0.0, max_tokens=30)),
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
