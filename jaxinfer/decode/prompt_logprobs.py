"""Log-probabilities of prompt tokens, without ever holding the logits of a whole prompt.

A prompt of 8,192 tokens has 4 GB of float32 logits over 128k tokens of vocabulary. As in the online softmax
(Milakov and Gimelshein 2018, algorithm 3), one pass over chunks of the vocabulary carries all that is needed:
the running log-sum-exp, the target's logit and the largest logits. Besides the letters of `jaxinfer.dims`:
C tokens of a vocabulary chunk, and L, here, the likeliest tokens that are reported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptLogprobs:
    """What the model thought of each target.

    Attributes:
      logprob_T: float32, the target's log-probability.
      top_ids_TL, top_logprobs_TL: int32 and float32, the likeliest tokens in falling order, ties by id.
    """

    logprob_T: jax.Array
    top_ids_TL: jax.Array
    top_logprobs_TL: jax.Array


def prompt_logprobs(
    hidden_TD: Float[Array, "T D"],
    head_VD: Float[Array, "V D"],
    targets_T: Int32[Array, "T"],
    top: int,
    *,
    chunk: int,
    transform: Callable[[jax.Array], jax.Array],
) -> PromptLogprobs:
    """Log-probability of each target, and the likeliest tokens, under softmax(transform(hidden head^T)).

    Runs on the mesh in force, whose axis "tensor" may have size 1; each device that has an own part of the
    vocabulary scans it, and only [T] and [T, L] arrays travel.

    Args:
      hidden_TD: final hidden states, replicated; row t predicts `targets_T[t]`.
      head_VD: output embedding, sharded on the vocabulary (over "tensor", if it is not yet).
      targets_T: replicated. A target outside the vocabulary has log-probability -inf.
      top: how many of the likeliest tokens to return, at least 1; the whole vocabulary if that is less.
      chunk: tokens of vocabulary whose logits exist at a time, on each device.
      transform: maps float32 logits elementwise, as a soft cap or a scale does.

    Raises:
      ValueError: `top` or `chunk` out of range.
    """
    if top < 1:
        raise ValueError(f"top = {top} must be at least 1")
    if chunk < 1:
        raise ValueError(f"chunk = {chunk} must be at least 1")
    axes = jax.typeof(head_VD).sharding.spec[0] or "tensor"
    on_each_device = jax.shard_map(
        partial(_scan_shard, top=min(top, head_VD.shape[0]), chunk=chunk, transform=transform, axes=axes),
        in_specs=(P(), P(axes), P()),
        out_specs=P(),
        check_vma=False,  # what all_gather replicates is typed as varying
    )
    return on_each_device(hidden_TD, jax.reshard(head_VD, P(axes, None)), targets_T)


def _scan_shard(
    hidden_TD: Float[Array, "T D"],
    head_VD: Float[Array, "V D"],
    targets_T: Int32[Array, "T"],
    *,
    top: int,
    chunk: int,
    transform: Callable[[jax.Array], jax.Array],
    axes: str | tuple[str, ...],
) -> PromptLogprobs:
    tokens, shard = hidden_TD.shape[0], head_VD.shape[0]
    chunk = min(chunk, shard)
    offset = jax.lax.axis_index(axes) * shard

    def step(carry: tuple[jax.Array, ...], start: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
        lse_T, target_T, top_TL, top_ids_TL = carry
        # The last chunk moves back to end with the shard; what it then sees twice is barred.
        begin = jnp.minimum(start, shard - chunk)
        head_CD = jax.lax.dynamic_slice_in_dim(head_VD, begin, chunk)
        rows_C = begin + jnp.arange(chunk, dtype=jnp.int32)
        ids_C = offset + rows_C
        logits_TC = transform(jnp.einsum("TD,CD->TC", hidden_TD, head_CD, preferred_element_type=jnp.float32))
        logits_TC = jnp.where((rows_C >= start)[None, :], logits_TC, -jnp.inf)

        hit_TC = ids_C[None, :] == targets_T[:, None]
        lse_T = jnp.logaddexp(lse_T, jax.nn.logsumexp(logits_TC, axis=1))
        target_T = jnp.maximum(target_T, jnp.where(hit_TC, logits_TC, -jnp.inf).max(axis=1))
        ids_TC = jnp.broadcast_to(ids_C[None, :], logits_TC.shape)
        return (lse_T, target_T, *_largest(top, [top_TL, logits_TC], [top_ids_TL, ids_TC])), None

    nothing_T = jnp.full(tokens, -jnp.inf, jnp.float32)
    no_top = (jnp.full((tokens, top), -jnp.inf, jnp.float32), jnp.zeros((tokens, top), jnp.int32))
    starts = jnp.arange(0, shard, chunk, dtype=jnp.int32)
    (lse_T, target_T, top_TL, top_ids_TL), _ = jax.lax.scan(step, (nothing_T, nothing_T, *no_top), starts)

    # Devices in order hold rising ids, so equal logits stay in the order of their ids.
    lse_T = jax.nn.logsumexp(jax.lax.all_gather(lse_T, axes), axis=0)
    target_T = jax.lax.pmax(target_T, axes)
    gather = partial(jax.lax.all_gather, axis_name=axes, axis=1, tiled=True)
    top_TL, top_ids_TL = _largest(top, [gather(top_TL)], [gather(top_ids_TL)])
    return PromptLogprobs(target_T - lse_T, top_ids_TL, top_TL - lse_T[:, None])


def _largest(count: int, logits: list[jax.Array], ids: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The `count` largest of concatenated [T, ...] logits and their ids; of equal logits, the first."""
    values_TL, places_TL = jax.lax.top_k(jnp.concatenate(logits, axis=1), count)
    return values_TL, jnp.take_along_axis(jnp.concatenate(ids, axis=1), places_TL, axis=1)
