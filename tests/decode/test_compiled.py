"""What the step and the loop compile to: nothing large is copied, and devices meet exactly where they must."""

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast, get_args

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.decode import sampling
from jaxinfer.decode.layout import Layout
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import (
    DraftModel,
    Eagle,
    EarlyExit,
    Lookahead,
    Medusa,
    PromptLookup,
    Speculation,
    depth_of,
)
from jaxinfer.decode.speculative.medusa import Head
from jaxinfer.decode.step import Part, Programs
from jaxinfer.engine.step_input import lay_out
from jaxinfer.engine.warm_up import WARM
from jaxinfer.model import EagleHead, Model, read_config, read_eagle_config
from jaxinfer.parallel import collectives, make_mesh
from tests.decode.branching import Branching
from tests.engine import eagle_heads
from tests.engine.tiny import CONFIG
from tests.model.rings import ring_from

SLOTS, PAGE, CONTEXT, TOKENS, LAYERS = 8, 7, 77, 64, 2
# Sizes that no other axis has, so that a shape tells what an array is.
ODD = CONFIG | {"num_attention_heads": 15, "num_key_value_heads": 3, "head_dim": 24, "hidden_size": 40,
                "intermediate_size": 56, "max_position_embeddings": CONTEXT}  # fmt: skip
EVEN = CONFIG | {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": CONTEXT}
FULL, SLIDING = (ODD | {"num_hidden_layers": 1, "layer_types": [f"{kind}_attention"]} for kind in ("full", "sliding"))
# How the compiler spells a collective.
MEETING = r" (all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter)(?:-start)?\("
PROGRAMS = [(which, dtype) for which in ("step", "loop") for dtype in ("float32", "int8", "float8_e4m3fn")]


@pytest.mark.parametrize(
    ("devices", "speculation", "expected"),
    [({}, None, True), ({"tensor": 2}, None, False), ({"pipe": 2}, None, False), ({}, PromptLookup(2), False)],
)
def test_kernels_run_side_by_side_on_one_device_without_speculation(devices, speculation, expected):
    """Elsewhere two that wait for all of their own blocks might run at once, each in the other's place on the GPU."""
    alike = EVEN | {"layer_types": ["full_attention"] * LAYERS}
    model = Model(read_config(alike), make_mesh(**devices))
    programs = Programs(model, Layout(SLOTS, PAGE, (29,), CONTEXT, "float32", speculation=speculation))
    assert programs.side_by_side == expected


def test_the_loop_is_compiled_to_run_kernels_side_by_side(monkeypatch):
    """The compiler is told: it refuses an option that it does not know."""
    monkeypatch.setattr("jaxinfer.decode.step.SIDE_BY_SIDE", {"xla_of_no_such_name": "1"})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_of_no_such_name"):
        compiled("loop", EVEN)


@dataclass(frozen=True)
class Compiled:
    which: str
    cache_dtype: str
    model: Model
    state: object
    cache: object
    executable: jax.stages.Compiled

    @property
    def text(self) -> str:
        return self.executable.as_text()


def compiled(
    which: str, config: dict, tensor: int = 1, num_pages: int = 29, cache_dtype: str = "float32",
    context: int = CONTEXT, needs: Needs = sampling.GREEDY, speculation: Speculation | None = None, ranks: int = 1,
) -> Compiled:  # fmt: skip
    """A program of decode and, as `step` and `sample`, of prefill. Nothing is run."""
    model = Model(read_config(config | {"max_position_embeddings": context}), make_mesh(tensor, context=ranks))
    pools = (ranks * num_pages,) * len(model.config.windows)
    layout = Layout(SLOTS, PAGE, pools, context, cache_dtype, speculation=speculation, ranks=ranks)
    programs = Programs(model, layout)
    weights = [] if speculation is None else speculation.weights
    given = ([*model.parameters.values(), *weights], *programs.new_state())
    with jax.set_mesh(model.mesh):
        if which == "loop":
            lowered = programs._loop.lower(
                *given, np.arange(SLOTS, dtype=np.int32), steps=3, needs=needs, drafts=depth_of(speculation)
            )
        elif which in get_args(Part):
            lowered = programs.lower_verify(cast(Part, which), *given, np.arange(SLOTS, dtype=np.int32), needs)
        else:
            step = lay_out([], TOKENS, SLOTS, [])
            lowered = programs._step.lower(*given, step.packed(), **step.sizes)
            if which == "sample":
                _, logits_WV, rows, hidden_WD, _ = lowered.out_info
                lowered = programs._sample.lower(given[1], logits_WV, rows, hidden_WD, needs=needs)
        return Compiled(which, cache_dtype, model, *given[1:], lowered.compile())


@pytest.fixture(scope="module", params=PROGRAMS, ids="-".join)
def alone(request) -> Compiled:
    which, cache_dtype = request.param
    return compiled(which, ODD, cache_dtype=cache_dtype)


def moved(text: str, sizes: set[int]) -> list[str]:
    """Instructions, also those inside of fusions, that rearrange an array of as many elements as one of `sizes`."""
    found = re.findall(r"(\w+\[([\d,]*)\]\S* (?:copy|copy-start|convert|transpose)\(.*)", text)
    return [line for line, dims in found if math.prod(map(int, filter(None, dims.split(",")))) in sizes]


def test_neither_cache_nor_weights_are_moved(alone):
    """By their number of elements, so that a reshape hides nothing."""
    pools = {array.size for array in jax.tree.leaves(alone.cache)}
    weights = {math.prod(leaf.shape) for leaf in alone.model.parameters.values() if len(leaf.shape) > 1}
    assert moved(alone.text, pools | weights) == []


def test_a_moved_weight_would_be_seen():
    weight = jax.ShapeDtypeStruct((40, 56), np.float32)
    for rearrange in (lambda w: w.T + 1, lambda w: (w + 1).astype(np.float16)):
        assert moved(jax.jit(rearrange).lower(weight).compile().as_text(), {40 * 56})


def test_every_cache_leaf_is_updated_in_place(alone):
    """Its output is aliased to an input of its own, of the same shape."""
    header = alone.text.splitlines()[0]
    aliased = dict(re.findall(r"\{(\d+)\}: \((\d+), \{\}", header))
    leaves = jax.tree.leaves(alone.cache)
    first = len(jax.tree.leaves(alone.state)) if alone.which == "loop" else 0  # a step gives no state back
    # A layout such as {3,2,1,0} after a shape would be taken for the end of the list.
    parameters = re.findall(r"\w+\[([\d,]*)\]", re.search(r"entry_computation_layout=\{\((.*?)\)->", header)[1])
    inputs = [int(aliased[str(first + index)]) for index in range(len(leaves))]
    kinds = 2 if alone.cache_dtype == "float32" else 4  # keys, values and their scales
    assert len(set(inputs)) == len(leaves) == kinds * LAYERS
    for index, leaf in zip(inputs, leaves, strict=True):
        assert parameters[index] == ",".join(map(str, leaf.shape))


def a_draft() -> DraftModel:
    """Of one layer, with heads that the model has not."""
    config = FULL | {"num_attention_heads": 11, "num_key_value_heads": 1}
    model = Model(read_config(config), make_mesh(1))
    return DraftModel("small", 3, model=model, params=list(model.parameters.values()))


def a_head() -> Eagle:
    """That grows another tree for each slot."""
    sizes = {"head_dim": 22, "intermediate_size": 51}
    fields = eagle_heads.config(FULL["hidden_size"], FULL["vocab_size"]) | sizes
    head = EagleHead(read_eagle_config(fields), Model(read_config(FULL), make_mesh(1)), embeds=False, bias=True)
    return Eagle("head", 8, 2, 3, head=head, params=list(head.parameters.values()))


def heads() -> Medusa:
    """Three, of which one has an output matrix of its own; with so many nodes that nothing is as large as a weight."""
    model = Model(read_config(FULL), make_mesh(1))
    D, own = FULL["hidden_size"], model.parameters["head_VD"]
    whole = NamedSharding(model.mesh, P())
    block = (
        jax.ShapeDtypeStruct((D, D), own.dtype, sharding=whole),
        jax.ShapeDtypeStruct((D,), own.dtype, sharding=whole),
    )
    made: Any = tuple(Head((block,), own if place == 2 else None) for place in range(3))
    return Medusa("heads", 7, heads=made)


@pytest.mark.parametrize(
    ("method", "config", "dtype", "needs"),
    [
        (PromptLookup(3), SLIDING, "float32", sampling.UNFILTERED),
        (EarlyExit(3, 1), ODD, "float32", sampling.GREEDY),
        (a_draft(), FULL, "float32", sampling.UNFILTERED),
        (Branching((-1, -1, 0)), ODD, "int8", sampling.UNFILTERED),
        (Lookahead(3, 3, 1, 5), FULL, "float32", sampling.GREEDY),
        (a_head(), FULL, "float32", sampling.GREEDY),
        (a_head(), FULL, "float32", sampling.UNFILTERED),
        (heads(), FULL, "float32", sampling.GREEDY),
    ],
    ids=lambda value: getattr(value, "level", value if isinstance(value, str) else type(value).__name__),
)
def test_a_loop_that_speculates_moves_no_cache_and_asks_no_host(method, config, dtype, needs):
    """Nor where the accepted tokens of a tree are brought to their places. Chains that a model draws, and trees, meet
    both kinds of sampling, and every method one."""
    loop = compiled("loop", config, speculation=method, needs=needs, cache_dtype=dtype)
    pools = {array.size for array in jax.tree.leaves(loop.cache)}
    weights = [*loop.model.parameters.values(), *method.weights]
    assert moved(loop.text, pools | {math.prod(leaf.shape) for leaf in weights if len(leaf.shape) > 1}) == []
    header = loop.text.splitlines()[0]
    aliased = re.findall(r"\{(\d+)\}: \((\d+), \{\}", header)
    assert len(aliased) == len(jax.tree.leaves((loop.state, loop.cache)))
    assert not re.search(r"infeed|outfeed|send\(|recv\(|callback", loop.text)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [(EarlyExit(3, 1), "float32"), (Branching((-1, -1, 0)), "int8")],
    ids=["EarlyExit", "Branching"],
)
@pytest.mark.parametrize("part", get_args(Part))
def test_a_step_that_the_host_checks_moves_no_cache(part, method, dtype):
    """Nor the state of the slots, which the last part alone gives back."""
    found = compiled(part, ODD, speculation=method, cache_dtype=dtype)
    assert moved(found.text, {array.size for array in jax.tree.leaves(found.cache)}) == []
    updated = jax.tree.leaves((found.state, found.cache) if part == "verify" else found.cache)
    assert len(re.findall(r"\{\d+\}: \(\d+, \{\}", found.text.splitlines()[0])) == len(updated)


def test_grouped_heads_share_keys_and_values(alone):
    """No array has an axis of keys, the head size, and the query heads (15, or 3 and 5 apart) as well."""
    arrays = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", alone.text)}
    keys = {array for array in arrays if {7, 11, 77} & set(array) and 24 in array}
    assert any({3, 24} <= set(array) for array in keys), "the gathered keys should be among the arrays"
    assert not [array for array in keys if {5, 15} & set(array)]


def test_temporary_memory_does_not_grow_with_the_pool(alone):
    large = compiled(alone.which, ODD, num_pages=2900, cache_dtype=alone.cache_dtype)
    small, grown = (each.executable.memory_analysis().temp_size_in_bytes for each in (alone, large))
    assert grown == small
    cache = sum(array.nbytes for array in jax.tree.leaves(large.cache))
    assert large.executable.memory_analysis().alias_size_in_bytes >= cache


@pytest.mark.parametrize(
    ("which", "cache_dtype", "config"),
    [("step", "float32", FULL), ("step", "int8", SLIDING), ("loop", "float32", SLIDING), ("loop", "int8", FULL)],
    ids=lambda value: value if isinstance(value, str) else value["layer_types"][0],
)
def test_temporary_memory_grows_with_the_context_by_page_tables_alone(which, cache_dtype, config):
    """Beyond one block of keys, which XLA gathers at a time. A table is gathered by the slots of the prefill, and
    padded to whole blocks."""
    short, long = (compiled(which, config, cache_dtype=cache_dtype, context=context) for context in (16_384, 131_072))
    small, grown = (each.executable.memory_analysis().temp_size_in_bytes for each in (short, long))
    tables = sum(array.nbytes for array in jax.tree.leaves(long.state.tables))
    assert grown - small <= 3 * tables


def test_the_sampler_updates_its_state_in_place():
    sample = compiled("sample", FULL)
    aliased = re.findall(r"\{(\d+)\}: \((\d+), \{\}", sample.text.splitlines()[0])
    assert aliased == [(str(index), str(index)) for index in range(len(jax.tree.leaves(sample.state)))]


def widest_sort(text: str) -> int:
    """Of all sorts, and of the searches for the largest, which may become one."""
    shapes = dict(re.findall(r"(%[\w.-]+) = \w+\[([\d,]*)\]", text))
    operands = re.findall(r" (?:sort|topk)\((%[\w.-]+)| custom-call\((%[\w.-]+)\)[^\n]*TopK", text)
    return max((max(map(int, shapes[one or other].split(","))) for one, other in operands), default=0)


@pytest.mark.parametrize("which", ["sample", "loop"])
def test_the_vocabulary_is_sorted_for_filters_alone(which):
    """Neither a temperature nor penalties nor log-probabilities ask for it; an argmax is one pass."""
    vocab = 3001
    texts = [compiled(which, FULL | {"vocab_size": vocab}, needs=needs).text for needs in WARM]
    greedy, unfiltered, everything = map(widest_sort, texts)
    assert (greedy, everything) == (0, vocab)
    assert 0 < unfiltered < vocab // 2
    asked = sampling.needs([SamplingParams(temperature=0.0, logprobs=5)])
    assert [needs.covers(asked) for needs in WARM] == [False, True, True]


@pytest.mark.parametrize(
    ("which", "meetings"),
    [
        ("step", {"all-reduce": 2 * LAYERS + 1}),
        ("sample", {"all-gather": 1}),
        ("loop", {"all-reduce": 2 * LAYERS + 1, "all-gather": 1}),
    ],
)
def test_devices_meet_twice_a_layer(which, meetings):
    """Attention and MLP each end in one sum over devices, the embedding of a sharded vocabulary in another, and the
    sampler gathers what each has found in its part of the vocabulary, two numbers a row. A loop's body is one
    computation, whatever its number of steps."""
    program = compiled(which, EVEN, tensor=4)
    assert meetings_of(program) == meetings
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", program.text)
    assert [math.prod(map(int, dims.split(","))) for dims in gathered] == [4 * 2 * SLOTS] * len(gathered)


def test_devices_share_many_tokens_between_the_products_of_a_layer(monkeypatch):
    """The sums leave each device its part of the tokens; all are gathered for the next product. The last layer is
    finished, by two sums, for a row of each slot, which every device has."""
    monkeypatch.setattr(collectives, "MANY_TOKENS", TOKENS)
    expected = {"reduce-scatter": 2 * LAYERS - 1, "all-gather": 2 * LAYERS - 1, "all-reduce": 2}
    assert meetings_of(compiled("step", EVEN, tensor=4)) == expected


def test_many_tokens_go_round_a_ring():
    """Into and out of attention and MLP, but for what finishes the last layer; the embedding's sum leaves each device
    its part, as without a ring."""
    devices = 4
    with ring_from(TOKENS):
        program = compiled("step", EVEN, tensor=devices)
    products = 4 * (LAYERS - 1) + 1
    expected = {"reduce-scatter": 1, "collective-permute": (devices - 1) * products, "all-reduce": 2}
    assert meetings_of(program) == expected


def meetings_of(program: Compiled) -> Counter[str]:
    """The collectives, as the compiler spells them."""
    return Counter(re.findall(MEETING, program.text))
