"""What the demo model writes greedily is what transformers writes with it, whenever a request arrives, and whatever
else runs."""

from random import Random

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Options, Request
from jaxinfer.llm import LLM
from tests.engine.tiny import assert_clean, drawing_alike, one_rectangle
from tests.golden.load import load_demo

NEW = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW, ignore_eos=True)
# Prompts come in chunks, and four sequences at a time have too few pages.
OPTIONS = Options(max_num_seqs=4, max_num_batched_tokens=64, page_size=8, num_pages=20, steps_per_dispatch=4)


def test_greedy_text_is_that_of_transformers_whenever_it_is_asked_for():
    """Some prompts hold a part of the continuation already, so that others' pages serve them."""
    random, golden = Random(1), load_demo()
    wanted: dict[int, list[int]] = {}
    with one_rectangle():
        llm = drawing_alike(LLM(dtype="float32", max_model_len=256, options=OPTIONS))
        engine, written = llm.engine, dict[int, list[int]]()
        asked = [(text, len(prompt) + more) for prompt, text in zip(golden.prompts, golden.sequences, strict=True)
                 for more in (0, 9, 40)][:30]  # fmt: skip
        random.shuffle(asked)
        while asked or engine.busy:
            while asked and random.random() < 0.6:
                text, start = asked.pop()
                number = len(wanted)
                wanted[number], written[number] = text[start : start + NEW], []
                engine.add(Request(number, tuple(text[:start]), GREEDY, (), 0))
            for update in engine.step():
                written[update.request.id] += update.tokens
    assert written == wanted
    assert engine.counters.preemptions > 0
    assert engine.metrics.prefix_hit_rate > 0
    assert_clean(llm)
