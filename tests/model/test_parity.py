"""Every family against transformers: the same logits, in float32, however the tokens are cut into steps."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import checkpoint
from jaxinfer.cache import make_cache
from jaxinfer.decode.batch import Batch, StepInput, make_batch, make_rectangle
from jaxinfer.decode.slots import SlotState, empty_slots
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from tests.golden.load import Golden, cases, load
from tests.golden.weights import write_checkpoint

TOLERANCE = 1e-4  # on logits of unit variance
SLOTS, PAGE = 4, 16


# Apart from the model, so that families share what they compile to.
@partial(jax.jit, static_argnums=2)
def prefilling(state: SlotState, packed: jax.Array, tokens: int) -> Batch:
    return make_batch(state, StepInput.unpacked(packed, tokens, 0), PAGE)[0]


@jax.jit
def decoding(state: SlotState) -> Batch:
    return make_rectangle(state, PAGE)[0]


class Runner:
    """Runs a golden model step by step and keeps the logits of every token."""

    def __init__(self, golden: Golden, folder):
        write_checkpoint(folder, golden)
        self.model = Model(read_config(folder), make_mesh(), golden.context, "float32")
        self.params = self.model.params(checkpoint.load(folder, self.model))
        self.golden = golden
        self.row = -(-golden.context // PAGE)
        self.reset()

    def reset(self):
        """Empty cache; every sequence in a slot of its own, on shuffled pages."""
        config, windows = self.model.config, len(self.model.config.windows)
        pages = 1 + np.random.RandomState(0).permutation(SLOTS * self.row).astype(np.int32)
        table_BJ = jnp.asarray(pages.reshape(SLOTS, self.row))
        empty = empty_slots(SLOTS, windows, self.row, config.vocab_size)
        self.state = replace(empty, tables=(table_BJ,) * windows)
        groups = tuple(config.group(layer) for layer in range(config.num_layers))
        num_pages = (SLOTS * self.row + 1,) * windows
        cache = make_cache(self.model.mesh, groups, num_pages, PAGE, self.model.kv_slots, config.head_size, "float32")
        # What nobody wrote must not be read.
        self.cache = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), cache)

    def logits(self, batch: Batch) -> np.ndarray:
        logits_TV, self.cache = self._logits(self.params, batch, self.cache)
        return np.asarray(logits_TV)

    @partial(jax.jit, static_argnums=0)
    def _logits(self, params, batch, cache):
        hidden_TD, _, cache = self.model.forward(params, batch, cache)
        return jax.sharding.reshard(self.model.logits(params, hidden_TD), jax.P(None, None)), cache

    def prefill(self, pieces: list[tuple[int, int, int]], tokens: int) -> list[np.ndarray]:
        """Logits of (slot, start, end) pieces of the sequences, run as one ragged step."""
        prefill = StepInput(
            np.zeros(tokens, np.int32), np.zeros(0, np.int32), np.zeros(SLOTS + 1, np.int32),
            np.full(SLOTS, SLOTS, np.int32), np.zeros(SLOTS, np.int32), np.zeros(SLOTS, np.int32),
        )  # fmt: skip
        at = 0
        for index, (slot, start, end) in enumerate(pieces):
            prefill.tokens_T[at : at + end - start] = self.golden.sequences[slot][start:end]
            at += end - start
            prefill.slots_R[index], prefill.lengths_R[index] = slot, end
            prefill.starts_R1[index + 1 :] = at
        with jax.set_mesh(self.model.mesh):
            logits_TV = self.logits(prefilling(self.state, prefill.packed(), tokens))
        return np.split(logits_TV, prefill.starts_R1[1 : len(pieces) + 1])[:-1]

    def decode(self, positions: list[int]) -> np.ndarray:
        """Logits of one decode step that gives each slot its sequence's token at its position; the rest are idle."""
        rest = SLOTS - len(positions)
        tokens = [self.golden.sequences[slot][position] for slot, position in enumerate(positions)]
        state = replace(
            self.state,
            token_B=np.pad(np.asarray(tokens, np.int32), (0, rest)),
            length_B=np.pad(np.asarray(positions, np.int32), (0, rest)),
            active_B=np.arange(SLOTS) < len(positions),
        )
        with jax.set_mesh(self.model.mesh):
            return self.logits(decoding(state))[: len(positions)]


def assert_close(ours: np.ndarray, theirs: np.ndarray):
    deviation = np.abs(ours - theirs).max() / theirs.std()
    assert deviation < TOLERANCE, f"logits of unit variance differ by {deviation:.2e}"


@pytest.fixture(scope="module", params=cases())
def runner(request, tmp_path_factory):
    return Runner(load(request.param), tmp_path_factory.mktemp(request.param))


def test_ragged_prefill_and_chunks(runner):
    sequences, logits = runner.golden.sequences, runner.golden.logits
    total = 320
    runner.reset()
    whole = runner.prefill([(slot, 0, len(s)) for slot, s in enumerate(sequences)], total)
    for ours, theirs in zip(whole, logits, strict=True):
        assert_close(ours, theirs)

    runner.reset()
    cuts = [(0, 3, 3, 40, 41), (0, 16, 17, 17, 60), (0, 1, 50, 64, 64)]
    parts: list[list[np.ndarray]] = [[] for _ in sequences]
    for step in range(5):
        pieces = []
        for slot, cut in enumerate(cuts):
            end = len(sequences[slot]) if step == 4 else cut[step + 1]
            pieces.append((slot, cut[step], end))
        for slot, part in enumerate(runner.prefill(pieces, total)):
            parts[slot].append(part)
    for part, theirs in zip(parts, logits, strict=True):
        assert_close(np.concatenate(part), theirs)


def test_decode_token_by_token(runner):
    """Past every window boundary; and the likeliest token is the one that transformers continued with."""
    golden = runner.golden
    runner.reset()
    start = [len(prompt) for prompt in golden.prompts]
    prompts = runner.prefill([(slot, 0, length) for slot, length in enumerate(start)], 320)
    first = [int(logits_TV[-1].argmax()) for logits_TV in prompts]
    assert first == [sequence[length] for sequence, length in zip(golden.sequences, start, strict=True)]
    new = min(len(sequence) - length for sequence, length in zip(golden.sequences, start, strict=True))
    ours = np.stack([runner.decode([length + step for length in start]) for step in range(new)], axis=1)
    for slot, length in enumerate(start):
        assert len(golden.sequences[slot]) == length + new
        assert_close(ours[slot], golden.logits[slot][length:])
        assert ours[slot].argmax(axis=1)[:-1].tolist() == golden.sequences[slot][length + 1 :]
