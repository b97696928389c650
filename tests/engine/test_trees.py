"""An engine that proposes trees gives what a plain one gives: with pages in 8 bits, a layer with a window, prompts in
chunks, shared beginnings and preemption."""

from dataclasses import replace

from benchmarks.speculative.comparing import Shut
from jaxinfer import SamplingParams
from jaxinfer.decode.layout import Layout
from jaxinfer.engine import Options, Request
from jaxinfer.engine.options import IN_FLIGHT
from jaxinfer.engine.scheduler import Scheduler
from jaxinfer.llm import LLM
from tests.decode.branching import Branching
from tests.engine.test_speculation import CONSTRAINED, CONSTRAINED_PROMPTS, answers
from tests.engine.tiny import assert_clean, drawing_alike, tiny_folder

OPTIONS = Options(
    max_num_seqs=4, max_num_batched_tokens=64, page_size=8, num_pages=22, steps_per_dispatch=3, cache_dtype="int8"
)
BEGINNING = "def f(x):\n    return " * 2  # past the window of 8, and several pages
PROMPTS = [BEGINNING + "x", BEGINNING + "y + 1", "0123456789" * 7, "abc", "z" * 33, BEGINNING + "zz", "the cat"]
# Also one whose every draw depends on the penalties of its path. Outputs end on all places of a page.
PARAMS = [
    SamplingParams(
        temperature=temperature, presence_penalty=penalty, max_tokens=most, seed=most, ignore_eos=True, logprobs=1
    )
    for temperature, penalty, most in [
        (0.0, 0.0, 25), (0.7, 0.0, 20), (0.0, 0.9, 9), (1.0, 0.5, 46), (0.0, 0.0, 1), (0.3, 0.0, 19), (0.0, 0.3, 31),
    ]
]  # fmt: skip


def test_trees_never_change_an_output(one_rectangle, tmp_path_factory):
    """Where the engine proposes nothing, it decodes plainly."""
    folder = tiny_folder(tmp_path_factory.getbasetemp())
    llm = drawing_alike(LLM(folder, options=replace(OPTIONS, speculation=Branching(), always_speculate=True)))
    asked, counters = [(PROMPTS, PARAMS), (CONSTRAINED_PROMPTS, CONSTRAINED)], llm.engine.counters
    found = [answers(llm, *asked[0])]
    assert counters.preemptions > 0
    assert counters.prefix_hits > 0
    assert counters.drafts > counters.accepted[0] > counters.accepted[1] > counters.accepted[3] > 0
    assert len(counters.accepted) == 4
    drafts = counters.drafts
    found.append(answers(llm, *asked[1]))
    assert counters.drafts > drafts
    assert llm.engine.runner.programs.traces["verify"] > 0
    assert_clean(llm)
    drafts = counters.drafts
    llm.engine._start_afresh()  # nothing that was written beside proposals is shared
    llm.engine.gate = llm.engine.scheduler.gate = Shut(llm.engine.layout)
    assert [answers(llm, *one) for one in asked] == found
    assert counters.drafts == drafts


def test_pages_are_held_for_all_nodes():
    """Of a text that ends where two pages do, some of what is proposed before its end lies on the third."""
    for method, most, columns in [(Branching(), 10, 3), (Branching((-1, 0, 1)), 10, 2), (Branching(), 4, 2)]:
        options = replace(OPTIONS, num_pages=4, speculation=method)
        scheduler = Scheduler(Layout(4, 8, (4,), 96, "float32", speculation=method), (None,), options)
        request = Request(0, (1,) * 7, SamplingParams(max_tokens=most, ignore_eos=True), (), 0)
        scheduler.add(request)
        assert scheduler.schedule().chunks
        (sequence,) = scheduler.schedule().decoding
        assert sequence.columns == columns
        longest = 24 - method.tree.beyond - 7
        for more, told in ((0, []), (1, ["prompt and max_tokens need 4 pages of 8 tokens; the cache has 3"])):
            params = SamplingParams(max_tokens=longest + more)
            assert scheduler.problems(replace(request, params=params)) == told


def test_pages_are_planned_for_all_nodes():
    assert replace(OPTIONS, speculation=Branching()).most_ahead == 3 * (1 + 4 * IN_FLIGHT) + 6
