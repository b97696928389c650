"""A step that fails, or is interrupted, costs the requests that ran, and nothing else."""

import pytest

from jaxinfer.decode.sampling_params import SamplingParams
from tests.engine.tiny import assert_warm, warm_llm

PARAMS = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)


@pytest.mark.parametrize("program", ["step", "loop", "admit", "extend"])
def test_an_interrupt_after_the_cache_was_donated(tmp_path_factory, monkeypatch, program):
    llm = warm_llm(tmp_path_factory.getbasetemp())
    expected = llm.generate("hello", PARAMS)
    run = getattr(llm.engine.programs, program)

    def interrupted(*arguments, **options):
        run(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.programs, program, interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["hello", "you"], PARAMS)
    assert llm.generate("hello", PARAMS) == expected
    assert_warm(llm)


def test_a_stream_beside_a_failed_step_ends_and_says_so(tmp_path_factory, monkeypatch):
    llm = warm_llm(tmp_path_factory.getbasetemp())
    stream = llm.stream("and so on", PARAMS)
    first = next(stream)
    assert first.finish_reason is None
    with monkeypatch.context() as patched:
        patched.setattr(llm.engine.programs, "loop", lambda *arguments, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate("hello", PARAMS)
    assert [piece.finish_reason for piece in stream][-1] == "abort"
    assert_warm(llm)
