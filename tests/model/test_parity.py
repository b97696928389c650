"""Every family against transformers: the same logits, in float32, however the tokens are cut into steps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import checkpoint
from jaxinfer.decode.batch import Prefill, make_batch
from jaxinfer.decode.sampling import pack
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.slots import Admission
from jaxinfer.decode.step import Layout, Programs
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from tests.golden.load import Golden, cases, load
from tests.golden.weights import write_checkpoint

TOLERANCE = 1e-4  # on logits of unit variance
SLOTS, PAGE = 4, 16


class Runner:
    """Runs a golden model step by step and keeps the logits of every token."""

    def __init__(self, golden: Golden, folder, tensor: int = 1):
        write_checkpoint(folder, golden)
        self.model = Model(read_config(folder), make_mesh(tensor), golden.context, "float32")
        self.params = self.model.params(checkpoint.load(folder, self.model))
        self.golden = golden
        groups = len(self.model.config.windows)
        row = -(-golden.context // PAGE)
        self.layout = Layout(SLOTS, PAGE, (SLOTS * row + 1,) * groups, golden.context, "float32")
        self.programs = Programs(self.model, self.layout)
        self.reset()

    def reset(self):
        """Empty cache; every sequence in a slot of its own, on shuffled pages."""
        row = self.layout.pages_per_row
        self.state, self.cache = self.programs.new_state()
        # What nobody wrote must not be read.
        self.cache = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), self.cache)
        pages = np.random.RandomState(0).permutation(np.arange(1, self.layout.num_pages[0]))
        packed = pack(SamplingParams(temperature=0.0, max_tokens=1000), (), 0)
        for slot in range(len(self.golden.sequences)):
            table = pages[slot * row : (slot + 1) * row].astype(np.int32)
            tables = (table,) * len(self.layout.num_pages)
            admission = Admission(tables, np.asarray(1000, np.int32), packed, np.full(1, -1, np.int32))
            self.state = self.programs.admit(self.state, slot, admission)

    @partial(jax.jit, static_argnums=(0, 4, 5))
    def _logits(self, params, state, cache, decode, tokens, packed):
        batch, _ = make_batch(state, decode, Prefill.unpacked(packed, tokens), PAGE)
        hidden_TD, _, cache = self.model.forward(params, batch, cache)
        return jax.sharding.reshard(self.model.logits(params, hidden_TD), jax.P(None, None)), cache

    def prefill(self, pieces: list[tuple[int, int, int]], tokens: int) -> list[np.ndarray]:
        """Logits of (slot, start, end) pieces of the sequences, run as one ragged step."""
        prefill = Prefill(
            np.zeros(tokens, np.int32), np.zeros(SLOTS + 1, np.int32), np.full(SLOTS, SLOTS, np.int32),
            np.zeros(SLOTS, np.int32), np.zeros(SLOTS, np.int32),
        )  # fmt: skip
        at = 0
        for index, (slot, start, end) in enumerate(pieces):
            prefill.tokens_T[at : at + end - start] = self.golden.sequences[slot][start:end]
            at += end - start
            prefill.slots_R[index], prefill.lengths_R[index] = slot, end
            prefill.starts_R1[index + 1 :] = at
        with jax.set_mesh(self.model.mesh):
            logits, self.cache = self._logits(self.params, self.state, self.cache, 0, tokens, prefill.packed())
        return np.split(np.asarray(logits), prefill.starts_R1[1 : len(pieces) + 1])[:-1]

    def decode(self, position: int, slots: list[int]) -> np.ndarray:
        """Logits of one decode step that gives each slot its sequence's token at `position`."""
        active = np.isin(np.arange(SLOTS), slots)
        token = [self.golden.sequences[slot][position] if slot in slots else 0 for slot in range(SLOTS)]
        state = jax.tree.map(lambda array: array, self.state)
        object.__setattr__(state, "token_B", jnp.asarray(token, jnp.int32))
        object.__setattr__(state, "length_B", jnp.full(SLOTS, position, jnp.int32))
        object.__setattr__(state, "active_B", jnp.asarray(active))
        nothing = np.zeros(1, np.int32)
        with jax.set_mesh(self.model.mesh):
            logits, self.cache = self._logits(self.params, state, self.cache, SLOTS, 0, nothing)
        return np.asarray(logits)


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
    runner.prefill([(slot, 0, length) for slot, length in enumerate(start)], 320)
    ours = [np.zeros((0, golden.logits[0].shape[1]), np.float32) for _ in start]
    for position in range(min(start), max(len(s) for s in golden.sequences)):
        slots = [slot for slot, s in enumerate(golden.sequences) if start[slot] <= position < len(s)]
        logits = runner.decode(position, slots)
        for slot in slots:
            ours[slot] = np.concatenate([ours[slot], logits[slot : slot + 1]])
    for slot, length in enumerate(start):
        assert_close(ours[slot], golden.logits[slot][length:])
        assert ours[slot].argmax(axis=1)[:-1].tolist() == golden.sequences[slot][length + 1 :]
