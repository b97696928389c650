"""From logits to tokens: penalties, filters and a random draw for each row of a step that needs logits.

Everything is a pure function of arrays. Besides the letters of `jaxinfer.dims`: I logit-bias entries of a
slot, Z stop tokens of a slot, and L, here, the likeliest tokens that are reported.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jaxinfer.decode.likeliest import likeliest, likeliest_token
from jaxinfer.decode.sampling_params import (
    GREEDY_BELOW,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_STOP_TOKEN_IDS,
    SamplingParams,
)

MAX_EOS_IDS = 8
_PAD = -1
_LARGEST_ID, _LARGEST_SEED = 2**31 - 1, 2**32 - 1


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
      ValueError: there are `problems`.
    """
    if found := problems(eos_ids, seed):
        raise ValueError("; ".join(found))
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


def problems(eos_ids: Sequence[int], seed: int, prompt_ids: Sequence[int] = ()) -> list[str]:
    """Why a request's row cannot be made, in words: what `SamplingParams` do not say themselves. Empty if it can."""
    found = []
    if len(eos_ids) > MAX_EOS_IDS:
        found.append(f"eos_ids has {len(eos_ids)} tokens; at most {MAX_EOS_IDS} are allowed")
    if not 0 <= seed <= _LARGEST_SEED:
        found.append(f"seed = {seed} must be in 0..{_LARGEST_SEED}")
    for name, ids in (("eos_ids", eos_ids), ("prompt_ids", prompt_ids)):
        if ids and not 0 <= min(ids) <= max(ids) <= _LARGEST_ID:
            found.append(f"{name} has token ids in {min(ids)}..{max(ids)}; each must be in 0..{_LARGEST_ID}")
    return found


def _padded(values: Sequence[float], size: int, pad: int, dtype: type[np.generic]) -> np.ndarray:
    row = np.full(size, pad, dtype)
    row[: len(values)] = values
    return row


def install(
    state: SamplingState,
    slots_A: Int32[Array, "A"],
    packed: Mapping[str, jax.Array | np.ndarray],
    prompt_ids_AT: Int32[Array, "A T"],
    output_ids_AT: Int32[Array, "A _"],
) -> SamplingState:
    """The state with requests in some slots, whose output begins, or goes on after an interruption.

    Args:
      slots_A: one past the last slot pads.
      packed: the requests' rows, each as of `pack`, with a leading axis A.
      prompt_ids_AT, output_ids_AT: tokens of the prompts, and of the outputs so far, padded with -1.
    """
    slots_A1 = slots_A[:, None]
    counts_BV, prompt_BV = put(slots_A, state.counts_BV, 0), put(slots_A, state.prompt_BV, False)
    counts_BV = counts_BV.at[slots_A1, output_ids_AT].add(1, mode="drop", wrap_negative_indices=False)
    prompt_BV = prompt_BV.at[slots_A1, prompt_ids_AT].set(True, mode="drop", wrap_negative_indices=False)
    rows = {name: put(slots_A, getattr(state, name), rows_A) for name, rows_A in packed.items()}
    return dataclasses.replace(state, **rows, counts_BV=counts_BV, prompt_BV=prompt_BV)


def put(slots_A: jax.Array, kept_B: jax.Array, new_A: Any) -> jax.Array:
    """`kept_B` with other rows for some slots; one past the last slot pads."""
    return kept_B.at[slots_A].set(new_A, mode="drop")


@dataclass(frozen=True)
class Needs:
    """What the requests of a batch ask for together; static, so each value is a program of its own.

    Attributes:
      level: "greedy" takes the likeliest token in every slot; "random" also draws with a temperature, after
        penalties, biases and a minimum of tokens; "full" also applies filters, for which it sorts the vocabulary.
      logprobs: how many of the likeliest tokens are reported beside the chosen one; 0 reports neither.
    """

    level: Literal["greedy", "random", "full"]
    logprobs: int

    def covers(self, other: "Needs") -> bool:
        """Whether a program for these needs also serves those; its tokens are the same."""
        return _LEVELS.index(self.level) >= _LEVELS.index(other.level) and self.logprobs >= other.logprobs


_LEVELS = ("greedy", "random", "full")
GREEDY = Needs("greedy", 0)
UNFILTERED = Needs("random", MAX_LOGPROBS)
EVERYTHING = Needs("full", MAX_LOGPROBS)


def needs(batch: Iterable[SamplingParams]) -> Needs:
    """The least that serves all requests of a batch. Few values, so that few programs are compiled."""
    batch = list(batch)
    level = "random" if any(_adjusts(p) or not p.greedy for p in batch) else "greedy"
    if any(_filters(p) and not p.greedy for p in batch):
        level = "full"
    return Needs(level, MAX_LOGPROBS if any(p.logprobs is not None for p in batch) else 0)


def _adjusts(p: SamplingParams) -> bool:
    return p.penalized or bool(p.logit_bias) or p.min_tokens > 0


def _filters(p: SamplingParams) -> bool:
    return p.top_k > 0 or p.top_p < 1 or p.min_p > 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """The sampler's choice for each row.

    Attributes:
      tokens_W: int32.
      logprobs_W: float32, the chosen token's log-probability under the model's own logits; NaN where
        `Needs.logprobs` is 0.
      top_ids_WL, top_logprobs_WL: int32 and float32, the likeliest tokens in falling order, ties by id. L is
        `Needs.logprobs`, or the vocabulary's size if that is less.
    """

    tokens_W: jax.Array
    logprobs_W: jax.Array
    top_ids_WL: jax.Array
    top_logprobs_WL: jax.Array


def sample(
    logits_WV: Float32[Array, "W V"], state: SamplingState, token_index_W: Int32[Array, "W"], needs: Needs
) -> Sampled:
    """Chooses the next token of every row.

    A row's token depends on its own logits, parameters, seed and token index only: not on its neighbours, on
    its place in the batch, or on what else the batch needs.

    Args:
      logits_WV: not sharded over the vocabulary, save where no more than `GREEDY` is needed; -inf bars a token.
      state: that of each row's slot, row for row; its fields keep the names that they have for all slots.
      token_index_W: how many tokens the row's output has already.
      needs: what the requests in the batch ask for; `needs(params)` of this module.
    """
    if needs.level == "greedy":
        return report(logits_WV, likeliest_token(logits_WV), needs)
    kept_WV = kept(logits_WV, state, token_index_W, needs)
    return report(logits_WV, draw(kept_WV, state, token_index_W), needs)


def kept(
    logits_WV: Float32[Array, "W V"], state: SamplingState, token_index_W: Int32[Array, "W"], needs: Needs
) -> Float32[Array, "W V"]:
    """Unnormalized logarithms of the probabilities that a row's token is drawn with, -inf for what is filtered; of a
    greedy row its likeliest token is the choice. Arguments are those of `sample`, `needs` not greedy."""
    scaled_WV = _scale(adjust(logits_WV, state, token_index_W), state.temperature_B)
    return truncate(scaled_WV, state) if needs.level == "full" else scaled_WV


def draw(
    kept_WV: Float32[Array, "W V"], state: SamplingState, token_index_W: Int32[Array, "W"], stream: int = 0
) -> Int32[Array, "W"]:
    """A token of every row, with the probabilities that `kept` tells; the likeliest of a greedy row.

    Args:
      stream: draws of different streams are independent.
    """
    # Gumbel-max: argmax(log p + Gumbel noise) is a draw from p (Maddison et al. 2014, section 2).
    noise_WV = _gumbel(state.seed_B, token_index_W, kept_WV.shape[1], stream)
    greedy_W1 = (state.temperature_B < GREEDY_BELOW)[:, None]
    return jax.lax.argmax(kept_WV + jnp.where(greedy_W1, 0.0, noise_WV), 1, jnp.int32)


def uniform(state: SamplingState, token_index_W: Int32[Array, "W"], stream: int) -> Float32[Array, "W"]:
    """A number of [0, 1) for every row; see `draw`."""
    one = lambda seed, token_index: jax.random.uniform(_key(seed, token_index, stream))  # noqa: E731
    return jax.vmap(one)(state.seed_B, token_index_W)


def adjust(
    logits_WV: Float32[Array, "W V"], state: SamplingState, token_index_W: Int32[Array, "W"]
) -> Float32[Array, "W V"]:
    """Logits after minimum length, logit bias and penalties, in the order of vLLM's sampler.

    A row that asks for none of them gets its logits back bit for bit: x - 0 and x / 1 are exact.
    """
    early_W1 = (token_index_W < state.min_tokens_B)[:, None]
    banned_WZ = jnp.where(early_W1, state.stop_ids_BZ, _PAD)
    logits_WV = jax.vmap(_ban)(logits_WV, banned_WZ)
    logits_WV = jax.vmap(_add_at)(logits_WV, state.bias_ids_BI, state.bias_values_BI)

    used_WV = state.counts_BV > 0
    repetition_W1 = state.repetition_B[:, None]
    repeated_WV = jnp.where(logits_WV > 0, logits_WV / repetition_W1, logits_WV * repetition_W1)
    logits_WV = jnp.where(used_WV | state.prompt_BV, repeated_WV, logits_WV)
    logits_WV -= state.frequency_B[:, None] * state.counts_BV.astype(jnp.float32)
    return logits_WV - state.presence_B[:, None] * used_WV.astype(jnp.float32)


def _ban(logits_V: Float32[Array, "V"], ids_Z: Int32[Array, "Z"]) -> Float32[Array, "V"]:
    return logits_V.at[ids_Z].set(-jnp.inf, mode="drop", wrap_negative_indices=False)


def _add_at(
    logits_V: Float32[Array, "V"], ids_I: Int32[Array, "I"], values_I: Float32[Array, "I"]
) -> Float32[Array, "V"]:
    return logits_V.at[ids_I].add(values_I, mode="drop", wrap_negative_indices=False)


def _scale(logits_WV: Float32[Array, "W V"], temperature_W: Float32[Array, "W"]) -> Float32[Array, "W V"]:
    divisor_W = jnp.where(temperature_W < GREEDY_BELOW, 1.0, temperature_W)
    return logits_WV / divisor_W[:, None]


def truncate(scaled_WV: Float32[Array, "W V"], state: SamplingState) -> Float32[Array, "W V"]:
    """Logits with -inf wherever min-p, top-k and then top-p of what is left filter a token out.

    Each filter keeps the tokens above a threshold, so one sort serves all of them, equal logits are kept or
    filtered together, and the likeliest token always stays. A filter that is off has a threshold that every
    token meets, so such a row gets its logits back bit for bit.
    """
    vocab = scaled_WV.shape[1]
    sorted_WV = jnp.sort(scaled_WV, axis=1, descending=True)
    min_p_W = sorted_WV[:, 0] + jnp.log(state.min_p_B)
    k_W = jnp.where(state.top_k_B < 1, vocab, jnp.minimum(state.top_k_B, vocab))
    floor_W = jnp.maximum(min_p_W, _at_rank(sorted_WV, k_W))

    left_WV = jnp.where(sorted_WV >= floor_W[:, None], sorted_WV, -jnp.inf)
    probs_WV = jax.nn.softmax(left_WV, axis=1)
    before_WV = jnp.cumsum(probs_WV, axis=1) - probs_WV
    nucleus_W = (before_WV < state.top_p_B[:, None]).sum(axis=1, dtype=jnp.int32)
    # Rounding may take the sum past 1 early, so 1 is no bound for a row that wants no bound.
    nucleus_W = jnp.where(state.top_p_B < 1, jnp.maximum(nucleus_W, 1), vocab)
    floor_W = jnp.maximum(floor_W, _at_rank(sorted_WV, nucleus_W))
    return jnp.where(scaled_WV >= floor_W[:, None], scaled_WV, -jnp.inf)


def _at_rank(sorted_WV: Float32[Array, "W V"], rank_W: Int32[Array, "W"]) -> Float32[Array, "W"]:
    return jnp.take_along_axis(sorted_WV, rank_W[:, None] - 1, axis=1)[:, 0]


def _gumbel(
    seed_W: UInt32[Array, "W"], token_index_W: Int32[Array, "W"], vocab: int, stream: int
) -> Float32[Array, "W V"]:
    def one(seed: jax.Array, token_index: jax.Array) -> jax.Array:
        # The default's 23 bits would tie the best of 100,000 tokens and never draw one rarer than 1e-7.
        return jax.random.gumbel(_key(seed, token_index, stream), (vocab,), jnp.float32, mode="high")

    return jax.vmap(one)(seed_W, token_index_W)


def _key(seed: jax.Array, token_index: jax.Array, stream: int) -> jax.Array:
    # Threefry whatever the process's default: under vmap the rbg generators depend on the batch.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), token_index)
    return key if stream == 0 else jax.random.fold_in(key, stream)


def report(logits_WV: Float32[Array, "W V"], tokens_W: Int32[Array, "W"], needs: Needs) -> Sampled:
    """The chosen tokens with the log-probabilities that are asked for.

    Args:
      logits_WV: the model's own.
    """
    if (top := needs.logprobs) == 0:
        rows = tokens_W.shape[0]
        no_ids_WL, no_logprobs_WL = jnp.zeros((rows, 0), jnp.int32), jnp.zeros((rows, 0), jnp.float32)
        return Sampled(tokens_W, jnp.full(rows, jnp.nan, jnp.float32), no_ids_WL, no_logprobs_WL)
    logprobs_WV = jax.nn.log_softmax(logits_WV, axis=1)
    chosen_W = jnp.take_along_axis(logprobs_WV, tokens_W[:, None], axis=1)[:, 0]
    top_logprobs_WL, top_ids_WL = likeliest(logprobs_WV, min(top, logits_WV.shape[1]))
    return Sampled(tokens_W, chosen_W, top_ids_WL, top_logprobs_WL)


def count(state: SamplingState, tokens_B: Int32[Array, "B"], active_B: Bool[Array, "B"]) -> SamplingState:
    """The state after `tokens_B` joined the outputs of the slots where the bool `active_B` holds."""
    slots_B = jnp.arange(tokens_B.shape[0], dtype=jnp.int32)
    counts_BV = state.counts_BV.at[slots_B, tokens_B].add(active_B.astype(jnp.int32))
    return dataclasses.replace(state, counts_BV=counts_BV)
