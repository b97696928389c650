"""The likeliest tokens of a vocabulary, for which it is not sorted: most of it is read once."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

GROUP = 64  # tokens; with a vocabulary of 128,000, the 20 likeliest are searched in 2,000 maxima and 1,280 candidates


def likeliest(values_WV: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` largest values of each row and their ids, [W, L], in falling order, ties by id.

    They are in the `count` groups that have the largest maxima: what is in another has as many before it.

    Args:
        values_WV: of all tokens; not sharded over the vocabulary.
        count: at most the vocabulary's size.
    """
    rows, vocab = values_WV.shape
    if vocab <= count * GROUP:
        top_WL, ids_WL = jax.lax.top_k(values_WV, count)
        return top_WL, ids_WL
    values_WV = jnp.pad(values_WV, ((0, 0), (0, -vocab % GROUP)), constant_values=-jnp.inf)
    grouped_WGn = values_WV.reshape(rows, -1, GROUP)
    _, groups_WL = jax.lax.top_k(grouped_WGn.max(axis=2), count)
    groups_WL = jnp.sort(groups_WL, axis=1)  # in the order of their ids, which ties go by
    candidates_WLn = jnp.take_along_axis(grouped_WGn, groups_WL[:, :, None], axis=1)
    top_WL, places_WL = jax.lax.top_k(candidates_WLn.reshape(rows, -1), count)
    return top_WL, jnp.take_along_axis(groups_WL, places_WL // GROUP, axis=1) * GROUP + places_WL % GROUP


def likeliest_token(logits_WV: jax.Array) -> jax.Array:
    """The token of the largest logit of each row, int32 [W], the first of those that are equal.

    Where the vocabulary is sharded every device looks for it in its own part, and they tell each other what they found
    and not the logits: two numbers for each row.
    """
    axes = jax.typeof(logits_WV).sharding.spec[1]
    if axes is None:
        return lax.argmax(logits_WV, 1, jnp.int32)

    def on_device(logits_WV: jax.Array) -> jax.Array:
        own_W = lax.argmax(logits_WV, 1, jnp.int32)
        found_W = jnp.take_along_axis(logits_WV, own_W[:, None], axis=1)[:, 0]
        token_W = own_W + lax.axis_index(axes) * logits_WV.shape[1]
        both_2W = jnp.stack([lax.bitcast_convert_type(found_W, jnp.int32), token_W])
        all_N2W = lax.all_gather(both_2W, axes)
        device_W = lax.argmax(lax.bitcast_convert_type(all_N2W[:, 0], jnp.float32), 0, jnp.int32)
        return jnp.take_along_axis(all_N2W[:, 1], device_W[None, :], axis=0)[0]

    return jax.shard_map(on_device, in_specs=P(None, axes), out_specs=P(None), check_vma=False)(logits_WV)
