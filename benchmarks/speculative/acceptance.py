"""How much of what is proposed is right, where the demo model goes on from text that nobody was trained on."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.decode import PROMPT
from benchmarks.record import OURS, Record
from benchmarks.speculative.comparing import warm_loops
from benchmarks.speculative.texts import beginnings
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import Speculation, tree_of
from jaxinfer.engine import Options
from jaxinfer.llm import LLM
from jaxinfer.roofline import tokens_per_step

RIGHT, BROUGHT = "proposed tokens right", "tokens of a step"


def accepting(name: str, method: Speculation, temperatures: Sequence[float], new: int, texts: int) -> list[Record]:
    """Tokens of a step with proposals at each temperature, and how often a token of a chain is right after right
    ones."""
    options = Options(max_num_seqs=16, max_num_batched_tokens=2048, speculation=method, always_speculate=True)
    llm = LLM(dtype="float32", options=options)
    params = {temperature: _params(temperature, new) for temperature in temperatures}
    warm_loops(llm.engine, params.values())
    prompts = [list(ids) for ids in beginnings(llm.tokenizer, PROMPT, 8 * PROMPT)][:texts]
    records = []
    for temperature in temperatures:
        steps, right = _counted(llm, prompts, params[temperature])
        case = f"demo drafted by {name} T={temperature:g}"
        if tree_of(llm.engine.layout.speculation) is None:
            records.append(Record(case, OURS, RIGHT, 100 * sum(right) / sum([steps, *right[:-1]]), "%"))
        records += [
            Record(case, OURS, BROUGHT, tokens_per_step([count / steps for count in right]), "tokens"),
            Record(case, OURS, "steps with proposals", steps, "steps"),
        ]
    return records


def _params(temperature: float, new: int) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_tokens=new, seed=0, ignore_eos=True)


def _counted(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> tuple[int, list[int]]:
    """Steps with proposals, and those of them in which the first proposed token was right, the first two, and so
    on."""
    counters = llm.engine.counters
    steps, before = counters.drafts, counters.accepted or (0,) * llm.engine.layout.depth
    llm.generate(prompts, params)
    right = [after - first for after, first in zip(counters.accepted, before, strict=True)]
    return counters.drafts - steps, right
