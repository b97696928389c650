"""A head that drafts features: of a tiny model whose next token follows from the one before, a good one can be made by
hand."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.speculative.comparing import Shut
from jaxinfer import SamplingParams, checkpoint
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.speculative import Eagle, by_name
from jaxinfer.engine import Options
from jaxinfer.llm import LLM
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.training.train import DenseRows
from tests.engine.eagle_heads import by_hand, features, nearly_right, nearly_right_third, ranked, write_head
from tests.engine.test_medusa import FOLLOWS, PARAMS, PROMPTS, D, V, assert_all_is_right, write
from tests.engine.test_speculation import answers, assert_constrained_alike
from tests.engine.tiny import (
    CONFIG,
    assert_clean,
    assert_warm,
    drawing_alike,
    one_rectangle,
    tiny_folder,
    warm_llm,
    with_weights,
    write_checkpoint,
)

OPTIONS = Options(
    max_num_seqs=4, max_num_batched_tokens=64, page_size=8, num_pages=28, steps_per_dispatch=2, always_speculate=True
)
HEAD = nearly_right(D, rest=0.5)
NODES, DEPTH = 9, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Most of what it says follows from the last token."""
    return write(tmp_path_factory.mktemp("model") / "model", tiny_folder(tmp_path_factory.getbasetemp()), rest=0.1)


def proposing(model: Path, folder: Path, tensors: dict[str, np.ndarray]) -> LLM:
    head = write_head(folder, tensors, V)
    return drawing_alike(LLM(model, options=replace(OPTIONS, speculation=Eagle(head, NODES, DEPTH, 3))))


@pytest.fixture(scope="module")
def llm(tmp_path_factory, model) -> LLM:
    return proposing(model, tmp_path_factory.mktemp("head"), HEAD)


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory) -> Path:
    """Of so many layers that three of them can be read."""
    kinds = ["sliding_attention", "full_attention"] * 2
    config = CONFIG | {"num_hidden_layers": 4, "layer_types": kinds}
    root = tmp_path_factory.mktemp("deep")
    return write(root / "model", write_checkpoint(root / "source", config), rest=0.1)


@pytest.fixture(scope="module")
def third(deep_model) -> dict[str, np.ndarray]:
    """The tensors of a head of EAGLE-3, which proposes some of the model's tokens."""
    tensors = checkpoint.tensors(deep_model, "model.safetensors")
    tokens_V = np.delete(np.arange(V), [5, 17, 18, 60])
    return nearly_right_third(D, 0.3, np.asarray(tensors["model.embed_tokens.weight"]), FOLLOWS, tokens_V)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Windowed(DenseRows):
    """One row of a whole text, in layers some of which have a window."""

    def attend(self, q_TKgH, k_TKH, v_TKH, state, group, scores, sinks_Kg):
        place_T = self.positions_T
        apart_TT = place_T[:, None] - place_T[None]
        seen_TT = (apart_TT >= 0) & (apart_TT < (scores.window or len(place_T)))
        scores_KgTT = jnp.einsum("TKgH,tKH->KgTt", q_TKgH, k_TKH) * scores.scale
        weights_KgTT = jax.nn.softmax(jnp.where(seen_TT[None, None], scores_KgTT, -jnp.inf))
        return jnp.einsum("KgTt,tKH->TKgH", weights_KgTT, v_TKH), state


class Whole:
    """What a text means to the model and to the head, computed anew, all of it at once."""

    def __init__(self, llm: LLM, tensors: dict[str, np.ndarray], params: list[jax.Array], text_BT: np.ndarray):
        model, own = llm.model, params[: len(llm.model.parameters)]
        taps = (1, 1, 0) if "d2t" in tensors else ()

        @jax.jit
        def shown(own, tokens_T):
            cache = (None,) * model.config.num_layers
            hidden_TD, tapped, _ = model.forward(own, Windowed(tokens_T[None]), cache, taps=taps)
            return jnp.concatenate(tapped, axis=1) if taps else model.head(own, hidden_TD)[0]

        with jax.set_mesh(model.mesh):
            shown_BTE = [np.asarray(shown(own, jnp.asarray(text_T))) for text_T in text_BT]
        self.tensors, self.features_BTD = tensors, [features(tensors, shown_TE) for shown_TE in shown_BTE]
        arrays = dict(zip(model.parameters, own, strict=True))
        self.embed_VD, self.head_VD = (np.asarray(arrays[name]) for name in ("embed.weight_VD", "head_VD"))
        self.text_BT, (self.window,) = text_BT, llm.engine.layout.speculation.head.config.windows

    def keys(self, slot: int, length: int) -> np.ndarray:
        return self._expected(slot, length, [], [])[1]

    def proposed(self, slot: int, newest: int, choices: tuple[tuple[int, ...], ...]) -> list[int]:
        """Of each path of ranks the token at its end, after the token at the place `newest`."""
        found: dict[tuple[int, ...], tuple[list[int], list[np.ndarray]]] = {(): ([], [])}
        for path in choices:
            tokens, before = found[path[:-1]]
            before = [*before, self._expected(slot, newest + 1, tokens, before)[0][-1]]
            found[path] = [*tokens, ranked(self.tensors, before[-1], self.head_VD)[path[-1]][0]], before
        return [found[path][0][-1] for path in choices]

    def grown(self, slot: int, newest: int, method: Eagle) -> tuple[list[int], list[int]]:
        """The tokens and parents of a dynamic tree after the token at the place `newest`."""
        tried: list[tuple[float, int, list[int], list[np.ndarray]]] = []
        level = [(0.0, -1, [], [])]
        for _ in range(method.depth):
            first = len(tried)
            for value, node, tokens, before in level:
                expected_D = self._expected(slot, newest + 1, tokens, before)[0][-1]
                for token, logprob in ranked(self.tensors, expected_D, self.head_VD)[: method.branches]:
                    tried.append((value + logprob, node, [*tokens, token], [*before, expected_D]))
            nodes = sorted(range(first, len(tried)), key=lambda node: -tried[node][0])[: method.branches]
            level = [(tried[node][0], node, *tried[node][2:]) for node in nodes]
        chosen = sorted(range(len(tried)), key=lambda node: -tried[node][0])[: method.num_speculative_tokens]
        chosen.sort()
        return [tried[node][2][-1] for node in chosen], [
            -1 if tried[node][1] == -1 else chosen.index(tried[node][1]) for node in chosen
        ]

    def _expected(self, slot: int, length: int, tokens: list[int], before: list[np.ndarray]):
        """Of the beginning of a text, and tokens that a head proposed with the features before them."""
        ids_T = [*self.text_BT[slot, :length], *tokens]
        before_TD = [np.zeros(D, np.float32), *self.features_BTD[slot][: length - 1], *before]
        return by_hand(self.tensors, self.embed_VD[ids_T], np.stack(before_TD), self.window)


def test_keys_and_proposals_are_those_of_the_whole_text(llm, one_rectangle):
    assert_those_of_the_whole_text(llm, HEAD)


def test_keys_and_proposals_of_three_layers_are_those_of_the_whole_text(tmp_path, deep_model, third, one_rectangle):
    """Of the layout of EAGLE-3, with a vocabulary of its own."""
    assert_those_of_the_whole_text(proposing(deep_model, tmp_path, third), third)


def test_a_head_beside_windows_alone_sees_what_is_in_them(tmp_path, one_rectangle):
    """Of a model that keeps no more: what it proposes is that of such a head, and changes no output."""
    config = CONFIG | {"layer_types": ["sliding_attention"] * 2}
    model = write(tmp_path / "model", write_checkpoint(tmp_path / "source", config), rest=0.1)
    llm = proposing(model, tmp_path / "head", HEAD)
    assert_those_of_the_whole_text(llm, HEAD)
    found, drafts = answers(llm, PROMPTS, PARAMS), llm.engine.counters.drafts
    llm.engine.gate = llm.engine.scheduler.gate = Shut(llm.engine.layout)
    assert answers(llm, PROMPTS, PARAMS) == found
    assert llm.engine.counters.drafts == drafts
    deep = Eagle(tmp_path / "head", 12, depth=8, branches=2)
    with pytest.raises(ValueError, match=r"depth = 8 must be less than 8, the tokens that the model keeps"):
        LLM(model, options=replace(OPTIONS, speculation=deep))


def assert_those_of_the_whole_text(llm: LLM, tensors: dict[str, np.ndarray]) -> None:
    """After prompts in chunks, beside which others decode, and steps in which some of the proposals were right: the
    head has seen the model's own features everywhere but behind the last step."""
    engine, method = llm.engine, llm.engine.layout.speculation
    assert isinstance(method, Eagle)
    prompts = ["ab" * 9, "the cat", "0123456789" * 7]
    params = [SamplingParams(temperature=0.3, seed=seed, max_tokens=24 - seed, ignore_eos=True) for seed in range(3)]
    llm.generate(prompts, params)
    assert engine.counters.drafts > engine.counters.accepted[0] > engine.counters.accepted[1] > 0, engine.counters
    assert (method.head.config.windows, method.head.config.num_layers) == (llm.model.config.windows[-1:], 1)
    runner, window = engine.runner, llm.model.config.windows[-1]
    state, pages, params = runner.state, runner.cache[-1], runner.params
    text_BT, length_B, table_BJ = (np.asarray(one) for one in (state.text_BT, state.length_B, state.tables[-1]))
    whole = Whole(llm, tensors, params, text_BT)
    slots = np.flatnonzero(length_B)
    assert len(slots) == 3
    for slot in slots:
        caught_up = length_B[slot] - DEPTH
        held_T = np.arange(0 if window is None else length_B[slot] - window + 1, caught_up)  # others gave pages back
        keys_TKH = np.asarray(pages.k_PSKH)[table_BJ[slot, held_T // 8], held_T % 8]
        np.testing.assert_allclose(keys_TKH, whole.keys(slot, caught_up)[held_T], atol=2e-5)

    forward = engine.runner.programs.forward
    state = replace(state, active_B=length_B > 0)
    always, shapes = replace(method, dynamic=False), set()
    with jax.set_mesh(llm.model.mesh):
        grown, fixed = (
            jax.device_get(
                jax.jit(partial(one.propose, forward), static_argnums=1)(
                    params, Needs("greedy", 0), state, runner.cache
                )
            )[0]
            for one in (method, always)
        )
    for slot in slots:
        assert fixed.drafts_Bk[slot].tolist() == whole.proposed(slot, length_B[slot], always.choices)
        found = grown.drafts_Bk[slot].tolist(), grown.parents_Bk[slot].tolist()
        assert found == whole.grown(slot, length_B[slot], method)
        shapes.add(tuple(found[1]))
    assert len(shapes) > 1
    assert any(node >= 0 <= parents[node] for parents in shapes for node in parents)  # as deep as may be


def test_a_head_never_changes_an_output(llm, model, tmp_path_factory):
    """Greedy and sampled, preempted and shared, with constraints and without."""
    before = llm.engine.counters.preemptions
    with with_weights(warm_llm(tmp_path_factory.getbasetemp()), model) as plain, one_rectangle():
        assert answers(llm, PROMPTS, PARAMS) == answers(plain, PROMPTS, PARAMS)
        assert llm.engine.counters.preemptions > before
        assert llm.engine.metrics.prefix_hit_rate > 0
        assert llm.engine.counters.tokens_per_draft > 1.5
        assert_constrained_alike(llm, plain)
    assert_warm(plain)
    assert_clean(llm)


def test_a_head_that_is_right_brings_all_that_it_can(tmp_path, tmp_path_factory):
    """A chain, on two devices, by a head with embeddings of its own; after prompts in chunks and shared, and after
    steps without proposals."""
    target = write(tmp_path / "table", tiny_folder(tmp_path_factory.getbasetemp()), rest=0.0)
    options = replace(OPTIONS, num_pages=None)
    tensors = nearly_right(D, rest=0.0)
    tensors["embed_tokens.weight"] = checkpoint.tensors(target, "model.safetensors")["model.embed_tokens.weight"]
    del tensors["fc.bias"]
    head = write_head(tmp_path / "head", tensors, V)
    speculation = Eagle(head, DEPTH, DEPTH, branches=1)
    llm = LLM(target, tensor_parallel_size=2, options=replace(options, speculation=speculation))
    assert_all_is_right(llm, DEPTH)


# --- the tree


def test_levels_grow_the_tree():
    """Each pass is over the nodes that have children, and every node is one of a row before it."""
    for nodes, depth, branches in [(15, 5, 4), (9, 3, 3), (4, 4, 1), (5, 1, 5), (63, 6, 4)]:
        method = Eagle("head", nodes, depth, branches, dynamic=False)
        paths, before = [], [()]
        for level in method.levels:
            own = [(*before[parent], int(rank)) for parent, rank in zip(level.parent_n, level.rank_n, strict=True)]
            paths += own
            before = [own[place] for place in level.inner_m]
        assert tuple(paths) == method.choices
        assert (len(paths), before) == (nodes, [])
        assert [path[:-1] for path in paths] == [
            () if parent == -1 else paths[parent] for parent in method.tree.parents
        ]
        assert max(path[-1] for path in paths) < branches
        rows = [level.rows for level in method.levels]
        assert rows == sorted(rows)
        assert rows[-1] == 1 + len({path[:-1] for path in paths} - {()})
    assert Eagle("head", 4, branches=1).tree.is_chain


# --- what is refused


def test_heads_of_another_model_are_refused(tmp_path, model):
    def refused(message: str, tensors: dict[str, np.ndarray], vocab: int = V, **fields) -> None:
        head = write_head(tmp_path / "head", tensors, vocab, **fields)
        with pytest.raises(ValueError, match=message):
            LLM(model, options=replace(OPTIONS, speculation=Eagle(head)))

    refused("has hidden_size 16; it must have the model's, 32", nearly_right(16, 0.1))
    refused("has vocab_size 105; it must have the model's, 104", HEAD, 105)
    refused("a head of 2 layers of LlamaForCausalLM; expected 1 layer", HEAD, num_hidden_layers=2)
    without = {name: tensor for name, tensor in HEAD.items() if "k_proj" not in name}
    refused(r"tensor 'layers.0.self_attn.k_proj.weight' of shape \(12, 32\) is missing", without)
    refused("tensor 'layers.0.input_layernorm.weight' .* is unexpected", HEAD | {
        "layers.0.input_layernorm.weight": np.ones(D, np.float32)
    })  # fmt: skip
    refused(r"tensor 'layers.0.mlp.up_proj.weight' has shape \(40, 31\); expected \(40, 32\)", HEAD | {
        "layers.0.mlp.up_proj.weight": np.ones((40, 31), np.float32)
    })  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        LLM(model, options=replace(OPTIONS, speculation=Eagle(tmp_path)))


def test_heads_of_three_layers_are_refused_where_they_do_not_fit(tmp_path, model, deep_model, third):
    def refused(message: str, changed: dict[str, np.ndarray], target: Path = deep_model) -> None:
        head = write_head(tmp_path / "head", third | changed, V, architectures=["LlamaForCausalLMEagle3"])
        with pytest.raises(ValueError, match=message):
            LLM(target, options=replace(OPTIONS, speculation=Eagle(head)))

    far = third["d2t"].copy()
    far[-1] += 1
    refused(r"tensor 'd2t' leads to the tokens 0\.\.104; expected 0\.\.103", {"d2t": far})
    refused(r"tensor 'd2t' is I64 of shape \(99,\); expected integers of shape \(100,\)", {"d2t": far[1:]})
    refused(r"tensor 'norm.weight' has shape \(31,\); expected \(32,\)", {"norm.weight": np.ones(31, np.float32)})
    refused("reads three layers of a model of 4 or more, not of 2", {}, model)
    wide = Eagle(write_head(tmp_path / "wide", third, V, architectures=["LlamaForCausalLMEagle3"]), branches=101)
    with pytest.raises(ValueError, match="branches = 101 must be at most 100, the tokens that may be proposed"):
        LLM(deep_model, options=replace(OPTIONS, speculation=wide))


def test_three_layers_are_low_middle_and_high(tmp_path, deep_model, third):
    target = Model(read_config(deep_model), make_mesh(1))
    folder = write_head(tmp_path / "head", third, V, draft_vocab_size=100)
    head = checkpoint.read_head(folder, target)
    params = checkpoint.head_params(folder, head)
    assert len(params) == len(head.parameters) + 1
    assert head.taps(SimpleNamespace(config=SimpleNamespace(num_layers=32))) == (1, 15, 28)


def test_settings_out_of_range_are_refused():
    for settings, message in [
        ({"num_speculative_tokens": 128}, "num_speculative_tokens = 128 must be"),
        ({"depth": 0}, r"depth = 0 must be an integer in 1\.\.127"),
        ({"branches": True}, "branches = True must be"),
        ({"num_speculative_tokens": 7, "depth": 2, "branches": 2}, "num_speculative_tokens = 7 must be at most 6"),
        (
            {"num_speculative_tokens": 8, "depth": 3, "branches": 1},
            "num_speculative_tokens = 8 must be at most 3, the nodes of a tree of depth 3 with 1 branches",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            Eagle("head", **settings)
    assert by_name("eagle") == Eagle()
    assert by_name("eagle", num_speculative_tokens=7, draft_model="head") == Eagle("head", 7)
