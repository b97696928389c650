"""What is proposed as a tree changes no output either: the draws walk it, and leave what plain decoding leaves."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.cache import make_cache, move
from jaxinfer.decode import sampling
from jaxinfer.decode.batch import accepted_moves, make_drafted
from jaxinfer.decode.layout import Layout
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative import Proposal, Tree, beyond_of, depth_of, drafts_of, tree_of, verify
from jaxinfer.decode.speculative.verify import agreeing, walk
from jaxinfer.decode.step import Programs
from jaxinfer.decode.tree import Ancestry, GrownTree
from jaxinfer.engine.request import Request
from jaxinfer.engine.sequence import Chunk, Sequence
from jaxinfer.engine.step_input import lay_out
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from tests.decode.branching import PARENTS, Branching
from tests.decode.test_speculative import IDLE, NEEDS, SLOTS, VOCAB, assert_slot_equal, new_state, plain_step, table
from tests.engine.tiny import CONFIG

TREES = [Tree(PARENTS), Tree((-1,) * 5), Tree((-1, 0, 0, 1, 1, 3))]


walked_at_once = jax.jit(lambda drafts_Bk, drawn_BQ, tree: walk(agreeing(drafts_Bk, drawn_BQ, tree), tree))
laid_out = jax.jit(make_drafted, static_argnums=2)
grown_ancestry = jax.jit(GrownTree.ancestry, static_argnums=0)


def trees(nodes: int) -> st.SearchStrategy[Tree]:
    return st.tuples(*(st.integers(-1, node - 1) for node in range(nodes))).map(Tree)


def tokens(count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 2), min_size=count, max_size=count)


def walked(parents: tuple[int, ...], drafts: list[int], draw) -> list[int]:
    """By hand: the nodes along the path of the draws. Of equal children the one on whose side most draws count.

    Args:
        draw: the token drawn after a node.
    """
    token = lambda child: draw(-1 if parents[child] == -1 else parents[child])  # noqa: E731

    def best(node: int) -> list[int]:
        children = [child for child, parent in enumerate(parents) if parent == node and drafts[child] == token(child)]
        return max(([child, *best(child)] for child in children), key=len, default=[])

    return best(-1)


# --- shapes


@settings(max_examples=50)
@given(trees(9))
def test_a_row_sees_its_ancestors(tree):
    for node, parent in enumerate(tree.parents):
        assert tree.depth_Q[node + 1] == tree.depth_Q[parent + 1] + 1
        seen = tree.seen_QQ[parent + 1].copy()
        seen[node + 1] = True
        np.testing.assert_array_equal(tree.seen_QQ[node + 1], seen)
        path = tree.rows_Qd[node + 1]
        assert path[: tree.depth_Q[node + 1] + 1].tolist() == np.flatnonzero(seen).tolist()
        assert set(path[tree.depth_Q[node + 1] :].tolist()) == {node + 1}
    assert tree.rows_Qd.shape[1] == tree.depth + 1 == tree.depth_Q.max() + 1
    assert tree.beyond >= len(tree.parents) - tree.depth
    assert tree.is_chain == (tree.depth == len(tree.parents)) == (tree.beyond == 0)


@settings(max_examples=30)
@given(st.lists(trees(7), min_size=3, max_size=3))
def test_trees_of_each_slot_mean_what_each_means_alone(shapes):
    """Also where the longest path that there might be is longer than all that there are."""
    found = grown_ancestry(GrownTree(7, 7), jnp.array([tree.parents for tree in shapes], jnp.int32))
    for slot, tree in enumerate(shapes):
        parent_k, depth_Q, seen_QQ, rows_Qd = (np.asarray(part)[slot] for part in found)
        expected = tree.ancestry
        np.testing.assert_array_equal(parent_k, expected.parent_Bk[0])
        np.testing.assert_array_equal(depth_Q, expected.depth_BQ[0])
        np.testing.assert_array_equal(seen_QQ, expected.seen_BQQ[0])
        np.testing.assert_array_equal(rows_Qd[:, : tree.depth + 1], expected.rows_BQd[0])
        np.testing.assert_array_equal(rows_Qd[:, tree.depth :].T, np.tile(rows_Qd[:, -1], (8 - tree.depth, 1)))


def test_trees_of_each_slot_are_laid_out_and_verified_each_alone():
    """The step of several slots with a tree each is that of all slots with one tree, slot by slot."""
    kinds = [Tree(PARENTS), Tree((-1, 0, 0, 1, 1, 3, 2, 0, -1)), Tree((-1,) * 9)]
    state, logits_VV = new_state(5), table(5)
    own = [kinds[slot % 3] for slot in range(len(SLOTS) + 1)]
    drafts_Bk = jnp.asarray(np.random.default_rng(0).integers(0, 4, (len(own), 9)).astype(np.int32))
    grown = grown_ancestry(GrownTree(9, 4), jnp.array([tree.parents for tree in own], jnp.int32))
    state = replace(state, tables=(jnp.arange(1, 46, dtype=jnp.int32).reshape(9, 5),))
    found, batch = verified_step(state, logits_VV, drafts_Bk, grown), laid_out(state, drafts_Bk, 4, grown)
    for kind in kinds:
        alone, slots = verified_step(state, logits_VV, drafts_Bk, kind.ancestry), range(kinds.index(kind), len(own), 3)
        laid = laid_out(state, drafts_Bk, 4, kind.ancestry)
        for slot in slots:
            assert_slot_equal(found.state, alone.state, slot)
            emits_d, deep = np.asarray(found.emits_dB)[:, slot], kind.depth + 1
            np.testing.assert_array_equal(emits_d[:deep], np.asarray(alone.emits_dB)[:, slot])
            assert not emits_d[deep:].any()
            np.testing.assert_array_equal(found.rows_Bd[slot, :deep], alone.rows_Bd[slot])
            np.testing.assert_array_equal(batch.views[0].tree_mask_BQW[slot], laid.views[0].tree_mask_BQW[slot])
            own_rows = slice(10 * slot, 10 * slot + 10)
            np.testing.assert_array_equal(batch.positions_T[own_rows], laid.positions_T[own_rows])


@pytest.mark.parametrize("parents", [(), (0,), (-1, 1), (-1, -2), (-1, 0.0), (-1, True), (-1,) * 128, [-1, 0]])
def test_what_is_no_tree_is_refused(parents):
    with pytest.raises(ValueError, match="parents"):
        Tree(parents)


def test_a_chain_is_no_tree():
    """Causal attention serves it, and nothing is moved."""
    chain = Branching((-1, 0, 1))
    assert (tree_of(chain), drafts_of(chain), depth_of(chain), beyond_of(chain)) == (None, 3, 3, 0)
    method = Branching()
    assert (tree_of(method), drafts_of(method), depth_of(method), beyond_of(method)) == (Tree(PARENTS), 9, 4, 6)
    layout = Layout(2, 8, (9,), 64, "float32", speculation=method)
    assert (layout.drafts, layout.depth, layout.pages_per_row) == (9, 4, 10)


def test_a_tree_of_another_size_than_the_method_says_is_refused():
    class Wrong(Branching):
        @property
        def num_speculative_tokens(self):
            return 8

    with pytest.raises(ValueError, match="tree has 9 nodes; it must have num_speculative_tokens = 8"):
        Layout(2, 8, (9,), 64, "float32", speculation=Wrong()).depth  # noqa: B018


@settings(max_examples=5)
@given(trees(7))
def test_a_step_lays_a_tree_out(tree):
    """Written one after the other, at the position of its depth, seeing its path; whoever is idle writes nowhere."""
    size, state = 4, replace(new_state(0), tables=(jnp.arange(1, 46, dtype=jnp.int32).reshape(9, 5),))
    lengths_B = np.arange(9, dtype=np.int32)
    state = replace(state, length_B=jnp.asarray(lengths_B), active_B=jnp.arange(9) != 2)
    drafts_Bk = np.arange(63, dtype=np.int32).reshape(9, 7)
    batch = laid_out(state, jnp.asarray(drafts_Bk), size, tree.ancestry)
    (view,) = batch.views
    for slot in range(9):
        rows, active = slice(8 * slot, 8 * slot + 8), slot != 2
        places = lengths_B[slot] + np.arange(8)
        written = np.asarray(state.tables[0])[slot, places // size] * size + places % size
        assert view.write_T[rows].tolist() == (written.tolist() if active else [0] * 8)
        assert batch.positions_T[rows].tolist() == ((lengths_B[slot] + tree.depth_Q) * active).tolist()
        assert batch.tokens_T[rows].tolist() == [int(state.token_B[slot]) * active, *(drafts_Bk[slot] * active)]
        bits = [[int(word) >> key & 1 for key in range(32)] for (word,) in np.asarray(view.tree_mask_BQW[slot])]
        np.testing.assert_array_equal(np.array(bits)[:, :8], tree.seen_QQ)
        assert view.decode_lengths_B[slot] == (lengths_B[slot] + 8) * active
    assert laid_out(state, jnp.asarray(drafts_Bk), size).views[0].tree_mask_BQW is None


# --- the walk


@settings(max_examples=30)
@given(trees(6), tokens(6), tokens(7))
def test_the_walk_is_that_by_hand(tree, drafts, draws):
    """What is drawn depends on the text before alone: it is the same after equal tokens."""
    texts = [tuple(drafts[row - 1] for row in path[1:]) for path in tree.paths]
    draws = [draws[texts.index(text)] for text in texts]
    rows_Bd, count_B = walked_at_once(jnp.array([drafts], jnp.int32), jnp.array([draws], jnp.int32), tree.ancestry)
    nodes = walked(tree.parents, drafts, lambda node: draws[node + 1])
    assert count_B.tolist() == [len(nodes) + 1]
    # Equal siblings may lead to other nodes, of equal tokens.
    found = [drafts[row - 1] for row in rows_Bd[0, 1 : len(nodes) + 1].tolist()]
    assert found == [drafts[node] for node in nodes]


@jax.jit
def verified_step(state: SlotState, logits_VV: jax.Array, drafts_Bk: jax.Array, tree: Ancestry):
    tokens_BQ = jnp.concatenate([state.token_B[:, None], drafts_Bk], axis=1)
    return verify(state, logits_VV[tokens_BQ.reshape(-1)], Proposal(drafts_Bk), NEEDS, tree)


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: f"{len(tree.parents)} nodes, {tree.depth} deep")
def test_verified_trees_are_plain_steps(tree):
    """With trees that are partly right: after a step that brought n tokens to a slot, it is as n plain steps leave it,
    penalties included, and no draw that could have counted was left out."""
    rng, logits_VV, state = np.random.default_rng(0), table(3), new_state(3)
    plain, draws = [state], []
    for _ in range(30):
        after, sampled = plain_step(plain[-1], logits_VV)
        plain.append(after)
        draws.append(sampled)
    tokens_nB = np.stack([draw.tokens_W for draw in draws])
    taken, brought = np.zeros(len(SLOTS) + 1, int), set()
    for _ in range(5):
        right_Bk = tokens_nB[taken[:, None] + tree.depth_Q[1:] - 1, np.arange(len(taken))[:, None]]
        other_Bk = rng.integers(0, VOCAB, right_Bk.shape)
        drafts_Bk = np.where(rng.random(right_Bk.shape) < 0.6, right_Bk, other_Bk).astype(np.int32)
        was_active_B = np.asarray(state.active_B)
        state, sampled_dB, emits_dB, *_ = verified_step(state, logits_VV, jnp.asarray(drafts_Bk), tree.ancestry)
        brought_B = np.asarray(emits_dB).sum(axis=0)
        for slot in range(len(SLOTS)):
            # Draws after nodes of wrong paths are others than plain decoding's, but nothing that is reached is one.
            plainly = tokens_nB[taken[slot] + tree.depth_Q, slot]
            wanted = 1 + len(walked(tree.parents, drafts_Bk[slot].tolist(), lambda node, at=plainly: at[node + 1]))
            for step in range(brought_B[slot]):
                jax.tree.map(
                    lambda found_dB, expected_B, at=(step, slot): np.testing.assert_array_equal(
                        found_dB[at], expected_B[at[1]]
                    ),
                    sampled_dB, draws[taken[slot] + step],
                )  # fmt: skip
            assert_slot_equal(state, plain[taken[slot] + brought_B[slot]], slot)
            assert brought_B[slot] <= wanted * was_active_B[slot]
            assert not state.active_B[slot] or brought_B[slot] == wanted
        assert brought_B[IDLE] == 0
        taken += brought_B
        brought |= set(brought_B.tolist())
    assert brought >= set(range(1, tree.depth + 1))


# --- the cache


@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn"])
def test_what_is_moved_is_copied_bit_by_bit(dtype):
    """Chains of moves too: all are read before any is written. On two devices, each with its own heads."""
    mesh, rng = make_mesh(2), np.random.default_rng(0)
    with jax.set_mesh(mesh):
        (pages,) = make_cache(mesh, (0,), (6,), 4, 4, 8, dtype)
        filled = jax.tree.map(
            lambda pool: jax.device_put(rng.integers(-100, 100, pool.shape).astype(pool.dtype), pool.sharding), pages
        )
        from_T, to_T = np.array([5, 6, 11, 0, 0], np.int32), np.array([4, 5, 17, 0, 0], np.int32)
        moved = jax.jit(move)(filled, jnp.asarray(from_T), jnp.asarray(to_T))
    for name in ("k_PSKH", "v_PSKH", "k_scales_PKS", "v_scales_PKS"):
        if getattr(filled, name) is None:
            assert dtype == "float32"
            continue
        before, after = (np.asarray(getattr(pages, name)) for pages in (filled, moved))
        if "scales" in name:  # by page, slot and head, as the numbers are
            before, after = (array.transpose(0, 2, 1) for array in (before, after))
        flat = lambda array: array.reshape(-1, *array.shape[2:])  # noqa: E731
        expected = flat(before).copy()
        expected[to_T[:3]] = flat(before)[from_T[:3]]
        np.testing.assert_array_equal(flat(after)[4:], expected[4:])  # all but the null page


def test_accepted_keys_go_to_their_places():
    state = replace(new_state(0), tables=(jnp.arange(1, 46, dtype=jnp.int32).reshape(9, 5),))
    state = replace(state, length_B=jnp.full(9, 2, jnp.int32))
    rows_Bd = np.tile(np.array([[0, 2, 5, 6]], np.int32), (9, 1))
    taken_B = np.arange(9, dtype=np.int32) % 5
    ((from_T, to_T),) = accepted_moves(state, jnp.asarray(rows_Bd), jnp.asarray(taken_B), 4)
    for slot in range(9):
        expected = [(row, place) for place, row in enumerate([0, 2, 5, 6])][1 : max(taken_B[slot], 1)]
        at = lambda place, slot=slot: (1 + 5 * slot + (2 + place) // 4) * 4 + (2 + place) % 4  # noqa: E731
        own = slice(3 * slot, 3 * slot + 3)
        found = list(zip(from_T[own].tolist(), to_T[own].tolist(), strict=True))
        assert found == [(at(row), at(place)) for row, place in expected] + [(0, 0)] * (3 - len(expected))


def test_a_tree_leaves_the_keys_and_values_of_plain_decoding():
    """In both layers of the tiny model, one with a window, over shuffled pages."""
    model = Model(read_config(CONFIG), make_mesh(1))
    weights, prompt, steps = model.random_params(), tuple(range(3, 16)), 5
    params = SamplingParams(temperature=0.8, presence_penalty=0.7, max_tokens=60, ignore_eos=True)
    found = {}
    for method in (None, Branching()):
        programs = Programs(model, Layout(2, 4, (40, 40), 80, "float32", speculation=method))
        state, cache = programs.new_state()
        pages = [(np.random.default_rng(group).permutation(24) + 1).tolist()[:20] for group in range(2)]
        state = programs.admit(state, {1: programs.admission(params, pages, prompt, (), 7)})
        chunk = Chunk(Sequence(Request(0, prompt, params, (), 7), slot=1), 0, len(prompt))
        needs = sampling.needs([params])
        state, cache, first = programs.step(weights, state, cache, lay_out([chunk], 16, 2), None, needs)
        tokens = [int(first.sampled.tokens_W[0, 1])]
        for _ in range(2 if method else 3):
            state, cache, output = programs.loop(
                weights, state, cache, np.arange(2, dtype=np.int32), steps=steps, needs=needs,
                drafts=depth_of(method),
            )  # fmt: skip
            tokens += np.asarray(output.sampled.tokens_W)[np.asarray(output.emits_nW)[:, 1], 1].tolist()
        found[method] = state, cache, tokens, pages
    (plain, plain_cache, expected, _), (state, cache, tokens, pages) = found.values()
    length = min(int(plain.length_B[1]), int(state.length_B[1]))
    assert len(tokens) > 1 + 2 * steps + 3
    assert tokens[:16] == expected[: len(tokens)]
    for layer, group in enumerate(model.config.group(layer) for layer in range(2)):
        at_T = np.array([pages[group][place // 4] * 4 + place % 4 for place in range(length)])
        for name in ("k_PSKH", "v_PSKH"):
            ours, theirs = (
                np.asarray(getattr(one[layer], name)).reshape(-1, 2, 8)[at_T] for one in (cache, plain_cache)
            )
            # Sums of 32 and 48 terms may go in another order where a step has more rows.
            atol = 100 * np.finfo(np.float32).eps * np.abs(theirs).max()
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
