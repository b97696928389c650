"""From logits to tokens: penalties, filters and a random draw for each slot of the batch.

Everything is a pure function of arrays. Besides the letters of `jaxinfer.dims`: I logit-bias entries of a
slot, Z stop tokens of a slot, and L, here, the likeliest tokens that are reported.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.decode.sampling_params import (
    GREEDY_BELOW,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

MAX_EOS_IDS = 8
_PAD = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingState:
    """What the sampler keeps on the device for each slot.

    Attributes:
      temperature_B, top_p_B, min_p_B, repetition_B, presence_B, frequency_B: float32, as in `SamplingParams`.
      top_k_B: int32; below 1 keeps all tokens.
      seed_B: uint32.
      bias_ids_BI, bias_values_BI: int32 token ids, padded with -1, and the float32 biases of their logits.
      stop_ids_BZ: int32 ids of the tokens that end the sequence, padded with -1.
      min_tokens_B: int32; no stop token is drawn at a token index below it.
      counts_BV: int32, how often each token occurs in the output.
      prompt_BV: bool, whether each token occurs in the prompt.
    """

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    repetition_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array
    seed_B: jax.Array
    bias_ids_BI: jax.Array
    bias_values_BI: jax.Array
    stop_ids_BZ: jax.Array
    min_tokens_B: jax.Array
    counts_BV: jax.Array
    prompt_BV: jax.Array


def empty(slots: int, vocab: int) -> SamplingState:
    """The state of `slots` slots without a request; each decodes greedily. Filled on the host: nothing compiles."""
    idle = pack(SamplingParams(temperature=0.0), eos_ids=(), seed=0)
    return SamplingState(
        **{name: jnp.asarray(np.tile(row, (slots,) + (1,) * row.ndim)) for name, row in idle.items()},
        counts_BV=jnp.asarray(np.zeros((slots, vocab), np.int32)),
        prompt_BV=jnp.asarray(np.zeros((slots, vocab), np.bool_)),
    )


def pack(params: SamplingParams, eos_ids: Sequence[int], seed: int) -> dict[str, np.ndarray]:
    """One request's row of every field of `SamplingState` but the counts, as host arrays.

    Args:
      params: the request's parameters, valid for the model.
      eos_ids: the model's end-of-sequence tokens; left out of the stop tokens when the request ignores them.
      seed: 0..2**32 - 1. The caller chooses it, since a request has n continuations and may name no seed.

    Raises:
      ValueError: more than `MAX_EOS_IDS` end-of-sequence tokens.
    """
    if len(eos_ids) > MAX_EOS_IDS:
        raise ValueError(f"eos_ids has {len(eos_ids)} tokens; at most {MAX_EOS_IDS} are allowed")
    bias = params.logit_bias or {}
    stop_ids = [*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos_ids)]
    return {
        "temperature_B": np.asarray(0 if params.greedy else params.temperature, np.float32),
        "top_k_B": np.asarray(params.top_k, np.int32),
        "top_p_B": np.asarray(params.top_p, np.float32),
        "min_p_B": np.asarray(params.min_p, np.float32),
        "repetition_B": np.asarray(params.repetition_penalty, np.float32),
        "presence_B": np.asarray(params.presence_penalty, np.float32),
        "frequency_B": np.asarray(params.frequency_penalty, np.float32),
        "seed_B": np.asarray(seed, np.uint32),
        "bias_ids_BI": _padded(list(bias), MAX_LOGIT_BIAS, _PAD, np.int32),
        "bias_values_BI": _padded(list(bias.values()), MAX_LOGIT_BIAS, 0, np.float32),
        "stop_ids_BZ": _padded(stop_ids, MAX_STOP_TOKEN_IDS + MAX_EOS_IDS, _PAD, np.int32),
        "min_tokens_B": np.asarray(params.min_tokens, np.int32),
    }


def _padded(values: Sequence[float], size: int, pad: int, dtype: type[np.generic]) -> np.ndarray:
    row = np.full(size, pad, dtype)
    row[: len(values)] = values
    return row


def install(
    state: SamplingState, slot: jax.Array | int, packed: dict[str, np.ndarray], prompt_ids_T: jax.Array
) -> SamplingState:
    """The state with a new request in one slot, its output counts at zero.

    Args:
      slot: int32 scalar; may be traced.
      packed: the request's row, from `pack`.
      prompt_ids_T: int32 tokens of the prompt, padded with -1.
    """
    rows = {name: getattr(state, name).at[slot].set(row) for name, row in packed.items()}
    vocab = state.prompt_BV.shape[1]
    absent_V = jnp.zeros(vocab, jnp.bool_)
    prompt_V = absent_V.at[prompt_ids_T].set(True, mode="drop", wrap_negative_indices=False)
    return dataclasses.replace(
        state,
        **rows,
        counts_BV=state.counts_BV.at[slot].set(0),
        prompt_BV=state.prompt_BV.at[slot].set(prompt_V),
    )


@dataclass(frozen=True)
class Needs:
    """What the requests of a batch ask for together; static, so each value is a program of its own.

    Attributes:
      level: "greedy" takes the likeliest token in every slot; "random" also draws with a temperature; "full"
        also applies penalties, biases, filters and a minimum of tokens.
      logprobs: how many of the likeliest tokens are reported beside the chosen one; 0 reports neither.
    """

    level: Literal["greedy", "random", "full"]
    logprobs: int

    def covers(self, other: "Needs") -> bool:
        """Whether a program for these needs also serves those; its tokens are the same."""
        return _LEVELS.index(self.level) >= _LEVELS.index(other.level) and self.logprobs >= other.logprobs


_LEVELS = ("greedy", "random", "full")
GREEDY = Needs("greedy", 0)
EVERYTHING = Needs("full", MAX_LOGPROBS)


def needs(batch: Iterable[SamplingParams]) -> Needs:
    """The least that serves all requests of a batch. Few values, so that few programs are compiled."""
    batch = list(batch)
    level = "random" if any(not p.greedy for p in batch) else "greedy"
    if any(_adjusts(p) or (_filters(p) and not p.greedy) for p in batch):
        level = "full"
    return Needs(level, MAX_LOGPROBS if any(p.logprobs is not None for p in batch) else 0)


def _adjusts(p: SamplingParams) -> bool:
    penalized = p.repetition_penalty != 1 or p.presence_penalty != 0 or p.frequency_penalty != 0
    return penalized or bool(p.logit_bias) or p.min_tokens > 0


def _filters(p: SamplingParams) -> bool:
    return p.top_k > 0 or p.top_p < 1 or p.min_p > 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """The sampler's choice for each slot.

    Attributes:
      tokens_B: int32.
      logprobs_B: float32, the chosen token's log-probability under the model's own logits; NaN where
        `Needs.logprobs` is 0.
      top_ids_BL, top_logprobs_BL: int32 and float32, the likeliest tokens in falling order, ties by id. L is
        `Needs.logprobs`, or the vocabulary's size if that is less.
    """

    tokens_B: jax.Array
    logprobs_B: jax.Array
    top_ids_BL: jax.Array
    top_logprobs_BL: jax.Array


def sample(logits_BV: jax.Array, state: SamplingState, token_index_B: jax.Array, needs: Needs) -> Sampled:
    """Chooses the next token of every slot.

    A slot's token depends on its own logits, parameters, seed and token index only: not on its neighbours, on
    its place in the batch, or on what else the batch needs.

    Args:
      logits_BV: float32, not sharded over the vocabulary; -inf bars a token.
      token_index_B: int32, how many tokens the slot's output has already.
      needs: what the requests in the batch ask for; `needs(params)` of this module.
    """
    adjusted_BV = adjust(logits_BV, state, token_index_B) if needs.level == "full" else logits_BV
    tokens_B = jax.lax.argmax(adjusted_BV, 1, jnp.int32)
    if needs.level != "greedy":
        scaled_BV = _scale(adjusted_BV, state.temperature_B)
        kept_BV = truncate(scaled_BV, state) if needs.level == "full" else scaled_BV
        # Gumbel-max: argmax(log p + Gumbel noise) is a draw from p (Maddison et al. 2014, section 2).
        noise_BV = _gumbel(state.seed_B, token_index_B, logits_BV.shape[1])
        drawn_B = jax.lax.argmax(kept_BV + noise_BV, 1, jnp.int32)
        tokens_B = jnp.where(state.temperature_B < GREEDY_BELOW, tokens_B, drawn_B)
    return _report(logits_BV, tokens_B, needs.logprobs)


def adjust(logits_BV: jax.Array, state: SamplingState, token_index_B: jax.Array) -> jax.Array:
    """Logits after minimum length, logit bias and penalties, in the order of vLLM's sampler.

    A slot that asks for none of them gets its logits back bit for bit: x - 0 and x / 1 are exact.
    """
    early_B1 = (token_index_B < state.min_tokens_B)[:, None]
    banned_BZ = jnp.where(early_B1, state.stop_ids_BZ, _PAD)
    logits_BV = jax.vmap(_ban)(logits_BV, banned_BZ)
    logits_BV = jax.vmap(_add_at)(logits_BV, state.bias_ids_BI, state.bias_values_BI)

    used_BV = state.counts_BV > 0
    repetition_B1 = state.repetition_B[:, None]
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(used_BV | state.prompt_BV, repeated_BV, logits_BV)
    logits_BV -= state.frequency_B[:, None] * state.counts_BV.astype(jnp.float32)
    return logits_BV - state.presence_B[:, None] * used_BV.astype(jnp.float32)


def _ban(logits_V: jax.Array, ids_Z: jax.Array) -> jax.Array:
    return logits_V.at[ids_Z].set(-jnp.inf, mode="drop", wrap_negative_indices=False)


def _add_at(logits_V: jax.Array, ids_I: jax.Array, values_I: jax.Array) -> jax.Array:
    return logits_V.at[ids_I].add(values_I, mode="drop", wrap_negative_indices=False)


def _scale(logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    divisor_B = jnp.where(temperature_B < GREEDY_BELOW, 1.0, temperature_B)
    return logits_BV / divisor_B[:, None]


def truncate(scaled_BV: jax.Array, state: SamplingState) -> jax.Array:
    """Logits with -inf wherever min-p, top-k and then top-p of what is left filter a token out.

    Each filter keeps the tokens above a threshold, so one sort serves all of them, equal logits are kept or
    filtered together, and the likeliest token always stays. A filter that is off has a threshold that every
    token meets, so such a slot gets its logits back bit for bit.
    """
    vocab = scaled_BV.shape[1]
    sorted_BV = jnp.sort(scaled_BV, axis=1, descending=True)
    min_p_B = sorted_BV[:, 0] + jnp.log(state.min_p_B)
    k_B = jnp.where(state.top_k_B < 1, vocab, jnp.minimum(state.top_k_B, vocab))
    floor_B = jnp.maximum(min_p_B, _at_rank(sorted_BV, k_B))

    left_BV = jnp.where(sorted_BV >= floor_B[:, None], sorted_BV, -jnp.inf)
    probs_BV = jax.nn.softmax(left_BV, axis=1)
    before_BV = jnp.cumsum(probs_BV, axis=1) - probs_BV
    nucleus_B = (before_BV < state.top_p_B[:, None]).sum(axis=1, dtype=jnp.int32)
    # Rounding may take the sum past 1 early, so 1 is no bound for a slot that wants no bound.
    nucleus_B = jnp.where(state.top_p_B < 1, jnp.maximum(nucleus_B, 1), vocab)
    floor_B = jnp.maximum(floor_B, _at_rank(sorted_BV, nucleus_B))
    return jnp.where(scaled_BV >= floor_B[:, None], scaled_BV, -jnp.inf)


def _at_rank(sorted_BV: jax.Array, rank_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(sorted_BV, rank_B[:, None] - 1, axis=1)[:, 0]


def _gumbel(seed_B: jax.Array, token_index_B: jax.Array, vocab: int) -> jax.Array:
    def one(seed: jax.Array, token_index: jax.Array) -> jax.Array:
        # Threefry whatever the process's default: under vmap the rbg generators depend on the batch.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), token_index)
        # The default's 23 bits would tie the best of 100,000 tokens and never draw one rarer than 1e-7.
        return jax.random.gumbel(key, (vocab,), jnp.float32, mode="high")

    return jax.vmap(one)(seed_B, token_index_B)


def _report(logits_BV: jax.Array, tokens_B: jax.Array, top: int) -> Sampled:
    if top == 0:
        slots = tokens_B.shape[0]
        no_ids_BL, no_logprobs_BL = jnp.zeros((slots, 0), jnp.int32), jnp.zeros((slots, 0), jnp.float32)
        return Sampled(tokens_B, jnp.full(slots, jnp.nan, jnp.float32), no_ids_BL, no_logprobs_BL)
    logprobs_BV = jax.nn.log_softmax(logits_BV, axis=1)
    chosen_B = jnp.take_along_axis(logprobs_BV, tokens_B[:, None], axis=1)[:, 0]
    top_logprobs_BL, top_ids_BL = jax.lax.top_k(logprobs_BV, min(top, logits_BV.shape[1]))
    return Sampled(tokens_B, chosen_B, top_ids_BL, top_logprobs_BL)


def count(state: SamplingState, tokens_B: jax.Array, active_B: jax.Array) -> SamplingState:
    """The state after `tokens_B` joined the outputs of the slots where the bool `active_B` holds."""
    slots_B = jnp.arange(tokens_B.shape[0], dtype=jnp.int32)
    counts_BV = state.counts_BV.at[slots_B, tokens_B].add(active_B.astype(jnp.int32))
    return dataclasses.replace(state, counts_BV=counts_BV)
