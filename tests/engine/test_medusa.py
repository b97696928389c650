"""Heads that guess: of a tiny model whose next token follows from the one before, they can be made by hand."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.speculative.comparing import Shut
from jaxinfer import SamplingParams, checkpoint
from jaxinfer.decode.sampling import pack
from jaxinfer.decode.slots import Admission, admit, empty_slots, put_back, taken
from jaxinfer.decode.speculative import Medusa, Typical, by_name
from jaxinfer.decode.speculative.medusa import FILE, FIRST, LATER, NEXT, read_heads, sparse_tree
from jaxinfer.engine import Options
from jaxinfer.engine.gate import Gate
from jaxinfer.llm import LLM
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from tests.decode.rows import stacked
from tests.engine.test_speculation import Alternating, answers, assert_constrained_alike
from tests.engine.tiny import (
    CONFIG,
    assert_clean,
    assert_warm,
    drawing_alike,
    one_rectangle,
    tiny_folder,
    warm_llm,
    with_weights,
)

V, D, HEADS = CONFIG["vocab_size"], CONFIG["hidden_size"], 3
SHARPNESS = 0.3  # logits far enough apart that what is likeliest is mostly drawn, at a temperature of 1
FOLLOWS = np.random.default_rng(1).permutation(V)
ONE_T = np.full(1, -1, np.int32)  # no tokens
OPTIONS = Options(
    max_num_seqs=4, max_num_batched_tokens=64, page_size=8, num_pages=20, steps_per_dispatch=2, always_speculate=True
)

# Greedy and sampled, of all lengths, two of which begin alike.
PROMPTS = ["ab" * 9, "x", "0123456789" * 7, "z" * 33, "ab" * 9 + "c", "import os\nimport"]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=1.0, max_tokens=41, seed=1, ignore_eos=True),
    SamplingParams(temperature=0.7, max_tokens=20, seed=2, presence_penalty=0.4),
    SamplingParams(temperature=0.9, max_tokens=37, seed=3, stop_token_ids=[70, 71, 72]),
    SamplingParams(temperature=0.0, repetition_penalty=1.2, max_tokens=30, ignore_eos=True),
    SamplingParams(temperature=1.0, max_tokens=33, seed=5, ignore_eos=True),
]


def outputs(normed_VD: np.ndarray, ahead: int) -> np.ndarray:
    """The matrix for which after each token the likeliest is the one `ahead` of it: a sum of outer products, in which
    the squares of vectors are far larger than the products of two."""
    after = np.arange(V)
    for _ in range(ahead):
        after = FOLLOWS[after]
    matrix_VD = np.zeros((V, D), np.float32)
    matrix_VD[after] = SHARPNESS * normed_VD
    return matrix_VD


def write(folder: Path, source: Path, rest: float) -> Path:
    """The tiny model, whose layers count in part, with an output matrix made by hand, and heads for it."""
    model = Model(read_config(source), make_mesh(1))
    arrays = {name: np.array(array) for name, array in checkpoint.load(source, model).items()}
    for name in arrays:
        if name.endswith(("o_MD", "down_FD")):
            arrays[name] *= rest
    arrays["final_norm.scale_D"] = np.ones(D, np.float32)
    embedded_VD = arrays["embed.weight_VD"]
    normed_VD = embedded_VD / np.sqrt((embedded_VD**2).mean(axis=1, keepdims=True))
    arrays["head_VD"] = outputs(normed_VD, 1)
    texts = {file.name: file.read_text() for file in source.glob("*.json")}
    with jax.set_mesh(model.mesh):
        placed = {name: jax.device_put(array, model.parameters[name].sharding) for name, array in arrays.items()}
    checkpoint.export(folder, model, placed, texts, shard_bytes=1 << 20)
    tensors = {f"{head}.1.weight": outputs(normed_VD, head + 2) for head in range(HEADS)}
    save_heads(folder, tensors | blocks())
    return folder


def blocks(hidden: int = D) -> dict[str, np.ndarray]:
    """Of blocks that change next to nothing."""
    weight_DD, bias_D = 1e-3 * np.eye(hidden, dtype=np.float32), np.zeros(hidden, np.float32)
    return {f"{head}.0.linear.{name}": part for head in range(HEADS) for name, part in
            (("weight", weight_DD), ("bias", bias_D))}  # fmt: skip


def save_heads(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / FILE)
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return tiny_folder(tmp_path_factory.getbasetemp())


def assert_all_is_right(llm: LLM, depth: int) -> None:
    """Of what is proposed after prompts, in chunks and shared, after steps with proposals and after steps without."""
    assert llm.engine.layout.depth == depth
    llm.engine.gate = llm.engine.scheduler.gate = Alternating(llm.engine.layout)
    greedy = SamplingParams(temperature=0.0, ignore_eos=True)
    for prompt in ("ab" * 9, "abcabd" * 12, "abcabd" * 11 + "xyz"):
        drafts, before = llm.engine.counters.drafts, llm.engine.counters.accepted or (0,) * depth
        (output,) = llm.generate([prompt], replace(greedy, max_tokens=1 + 2 * (1 + depth) + 2 + 1 + depth))
        tokens = [*output.prompt_token_ids[-1:], *output.outputs[0].token_ids]
        assert tokens[1:] == FOLLOWS[tokens[:-1]].tolist()
        accepted = [new - old for new, old in zip(llm.engine.counters.accepted, before, strict=True)]
        # The first is of the prompt; two steps with proposals, two without, and one more with.
        assert [llm.engine.counters.drafts - drafts, *accepted] == [3] * (1 + depth)
    assert llm.engine.metrics.prefix_hit_rate > 0


def test_heads_that_are_right_bring_all_that_they_can(tmp_path, tiny):
    """After prompts, in chunks and shared, after steps with proposals, and after steps without: the hidden state is
    that of the newest token. On two devices, each with its part of the output matrices."""
    folder = write(tmp_path / "table", tiny, rest=0.0)
    llm = LLM(folder, tensor_parallel_size=2, options=replace(OPTIONS, speculation=Medusa(folder, 8)))
    assert_all_is_right(llm, HEADS)


def test_heads_never_change_an_output(tmp_path, tmp_path_factory, tiny):
    """Greedy and sampled, preempted and shared: where the rest of the model has a say, too."""
    folder = write(tmp_path / "model", tiny, rest=0.1)
    llm = drawing_alike(LLM(folder, options=replace(OPTIONS, speculation=Medusa(folder))))
    with with_weights(warm_llm(tmp_path_factory.getbasetemp()), folder) as plain, one_rectangle():
        assert answers(llm, PROMPTS, PARAMS) == answers(plain, PROMPTS, PARAMS)
        counters = llm.engine.counters
        assert counters.preemptions > 0
        assert counters.accepted_by_position[0] > 0.5
        assert counters.accepted[-1] > 0
        assert_constrained_alike(llm, plain)
    assert_warm(plain)
    assert_clean(llm)


def test_typical_acceptance_takes_what_is_likely_enough(tmp_path, tiny):
    """Here all that is not impossible, of requests that are drawn at random. Greedy ones stay as they are."""
    folder = write(tmp_path / "model", tiny, rest=0.1)
    lax = Medusa(folder, 8, typical=Typical(1e-9, 1e-9))
    llm = drawing_alike(LLM(folder, options=replace(OPTIONS, speculation=lax)))
    prompts = ["ab" * 9, "x"]
    params = SamplingParams(temperature=1.0, max_tokens=1 + 3 * (1 + HEADS), seed=1, ignore_eos=True)
    with one_rectangle():
        llm.generate(prompts, params)
        counters = llm.engine.counters
        assert (counters.drafts, *counters.accepted) == (2 * 3,) * (1 + HEADS)
        llm.engine.gate = llm.engine.scheduler.gate = Shut(llm.engine.layout)
        greedy = replace(params, temperature=0.0)
        plain = answers(llm, prompts, [greedy, params])
        llm.engine.gate = llm.engine.scheduler.gate = Gate(llm.engine.layout)
        found = answers(llm, prompts, [greedy, params])
    assert found[0] == plain[0]
    assert found[1] != plain[1]


def test_a_new_request_begins_without_a_memory():
    """And what steps of some slots keep is theirs."""
    memory_BD = np.arange(12, dtype=np.float32).reshape(4, 3)
    state = empty_slots(4, 1, 2, V, memory=memory_BD)
    row = Admission((np.zeros(2, np.int32),), np.int32(0), np.int32(9), pack(SamplingParams(), [], 0), *[ONE_T] * 2)
    state = admit(state, jnp.array([2, 4], jnp.int32), stacked([row, row]))  # 4 is no slot
    assert state.memory.tolist() == [[0, 1, 2], [3, 4, 5], [0, 0, 0], [9, 10, 11]]
    slots_B = jnp.array([3, 0, 4], jnp.int32)
    own = taken(state, slots_B)
    nothing_nB = jnp.zeros((1, 3), jnp.int32)
    state = put_back(state, slots_B, replace(own, memory=-own.memory), nothing_nB, nothing_nB)
    assert state.memory.tolist() == [[0, -1, -2], [3, 4, 5], [0, 0, 0], [-9, -10, -11]]


# --- the tree


@pytest.mark.parametrize(("heads", "nodes"), [(1, 5), (2, 7), (4, 15), (5, 63), (3, 127)])
def test_a_tree_has_the_likeliest_paths(heads, nodes):
    """By the rule of thumb: no path that was left out is likelier than one that was taken."""

    def rate(path: tuple[int, ...]) -> float:
        return round(float(np.prod([FIRST * LATER**place * NEXT**rank for place, rank in enumerate(path)])), 15)

    paths = sparse_tree(heads, nodes)
    assert len(set(paths)) == nodes
    rates = [rate(path) for path in paths]
    assert rates == sorted(rates, reverse=True)
    left_out = {(*path[:-1], path[-1] + 1) for path in paths} | {(*path, 0) for path in paths if len(path) < heads}
    assert max(map(rate, left_out - set(paths))) <= rates[-1]
    for place, path in enumerate(paths):
        before = {path[:-1]} - {()} | ({(*path[:-1], path[-1] - 1)} if path[-1] else set())
        assert before <= set(paths[:place])


def test_the_tree_is_that_of_the_paths():
    method = Medusa("heads", 15, heads=read_heads({f"{head}.0.weight": np.zeros((V, D)) for head in range(4)}))
    parents = method.tree.parents
    assert len(parents) == 15
    for path, parent in zip(method.choices, parents, strict=True):
        assert path[:-1] == (() if parent == -1 else method.choices[parent])
    assert Medusa("heads", 2, heads=method.heads).tree.is_chain


# --- what is refused


def test_heads_of_another_model_are_refused(tmp_path, tiny):
    good = {f"{head}.1.weight": np.zeros((V, D), np.float32) for head in range(HEADS)}
    llm = partial(LLM, tiny)

    def refused(tensors: dict[str, np.ndarray], message: str) -> None:
        folder = save_heads(tmp_path / "heads", tensors)
        with pytest.raises(ValueError, match=message):
            llm(options=replace(OPTIONS, speculation=Medusa(folder)))

    refused(good | blocks(hidden=16), r"linear.weight of shape \(16, 16\); .* hidden size 32 .* must be \(32, 32\)")
    wide = {"1.1.weight": np.zeros((V + 1, D), np.float32)}
    refused(good | blocks() | wide, r"head 1 .* weight of shape \(105, 32\); .* 104 tokens, it must be \(104, 32\)")
    one_head = save_heads(tmp_path / "one", {"0.0.weight": np.zeros((V, D), np.float32)})
    with pytest.raises(
        ValueError, match="num_speculative_tokens = 105 makes a tree of the 105 likeliest tokens of a "
    ):
        llm(options=replace(OPTIONS, speculation=Medusa(one_head, 105)))
    with pytest.raises(ValueError, match=f"{FILE} is missing"):
        llm(options=replace(OPTIONS, speculation=Medusa(tiny)))
    with pytest.raises(ValueError, match="num_speculative_tokens = 128 must be"):
        Medusa(tmp_path, 128)
    assert (by_name("medusa"), by_name("medusa", num_speculative_tokens=7, draft_model="heads")) == (
        Medusa(),
        Medusa("heads", 7),
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["lm_head.weight"], "has a tensor 'lm_head.weight'"),
        (["1.0.weight"], r"has the heads \[1\]; they must be numbered from 0 on"),
        ([], r"has the heads \[\]"),
        (["0.0.linear.weight"], "head 0 .* must have blocks of a linear.weight and a linear.bias"),
        (["0.0.weight", "0.1.linear.weight", "0.1.linear.bias"], "head 0 .* behind them one weight or none"),
        (["0.1.weight"], "head 0 .* numbered from 0 on"),
        (["0.0.weight", "0.0.linear.bias"], "head 0"),
    ],
)
def test_what_are_no_heads_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        read_heads(dict.fromkeys(names, np.zeros(1)))


def test_a_head_may_have_the_output_matrix_of_the_model():
    (head,) = read_heads({"0.0.linear.weight": np.zeros(1), "0.0.linear.bias": np.zeros(1)})
    assert (len(head.blocks), head.output_VD) == (1, None)
