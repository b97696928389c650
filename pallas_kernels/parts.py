"""Attention over all keys from attention over parts of them (FlashDecoding, Dao et al. 2023)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.blockwise import share


class Part(NamedTuple):
    """Attention over some of the keys, in float32: 0 and -inf where nothing is seen.

    `out` is [..., N, H] and `lse` [..., N].
    """

    out: jax.Array
    lse: jax.Array


def merged(a: Part, b: Part) -> Part:
    """Over two sets of keys, each weighted by its sum of exponentials."""
    lse = jnp.logaddexp(a.lse, b.lse)
    a_out, b_out = (part.out * share(part.lse, lse)[..., None] for part in (a, b))
    return Part(a_out + b_out, lse)


def merged_all(parts: Part) -> Part:
    """Over as many sets of keys as the first axis is long."""
    lse = jax.nn.logsumexp(parts.lse, axis=0)
    return Part(jnp.sum(parts.out * share(parts.lse, lse[None])[..., None], axis=0), lse)


def with_sinks(part: Part, sinks_N: jax.Array | None) -> Part:
    """With a logit for each head that joins the sum, but has no value (gpt-oss)."""
    if sinks_N is None:
        return part
    sinks = sinks_N.astype(jnp.float32).reshape(*(1,) * (part.lse.ndim - 1), -1)
    lse = jnp.where(part.lse > -jnp.inf, jnp.logaddexp(part.lse, sinks), -jnp.inf)
    return Part(part.out * share(part.lse, lse)[..., None], lse)
