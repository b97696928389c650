"""Pages of keys and values (Kwon et al. 2023, PagedAttention), and how a step's tokens see them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxinfer.cache.quantized import LARGEST, SCALE
from jaxinfer.parallel import CONTEXT, TENSOR
from jaxinfer.parallel.pipeline import staged
from pallas_kernels.blockwise import as_moved
from pallas_kernels.flash_decoding import Schedule

NULL_PAGE = 0  # padding writes here; nothing reads it
CACHE_DTYPES = ("float32", "bfloat16", "float16", *LARGEST)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """The state of one attention layer. Page 0 is the null page.

    Attributes:
        k_PSKH, v_PSKH: keys and values, by page, slot in the page, KV head and head size; 8-bit floats as bytes.
        k_scales_PKS, v_scales_PKS: float32 factors of a quantized cache, by page, KV head and slot, so that those of
            one head lie together; None for a plain one.
    """

    k_PSKH: jax.Array
    v_PSKH: jax.Array
    k_scales_PKS: jax.Array | None = None
    v_scales_PKS: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class View:
    """How the tokens of a step see one group of layers: where each is written, and what each sequence reads.

    The first B x `queries` rows are the decode rectangle, one slot after the other. Where there is a ragged prefill,
    of R sequences, it goes over all rows: a row of the rectangle whose slot is idle may be a row of the prefill, and
    rows that decode are the prefill's as those of a sequence of length 0.

    Where several devices share sequences, a page is named by its number among those of all of them, and every device
    has the whole view, whatever rows of the step it has; see `jaxinfer.cache.dealt`.

    Attributes:
        write_T: where a token's key and value go, page x page size + slot; padding goes to the null page.
        decode_tables_BJ: page table of every slot of the rectangle.
        decode_lengths_B: keys that a slot sees, the step's own included; 0 for an idle slot.
        prefill_tables_RJ: page table of every prefilled sequence.
        prefill_starts_R1: first row of each sequence, from row 0 on, and the end of the last.
        prefill_lengths_R: keys that a sequence's last token sees, those of earlier chunks included.
        queries: tokens per slot of the rectangle.
        tree_mask_BQW: which of its slot's tokens each token of the rectangle sees, where they form a tree, as
            `flash_decoding` takes it; None if each sees those before it.
        implementation: of attention, as `flash_attention` and `flash_decoding` take it.
        schedule: of the decode kernel, which the layers of the group share (`scheduled`); None where each makes its
            own, or has no need of one.
    """

    write_T: jax.Array
    decode_tables_BJ: jax.Array
    decode_lengths_B: jax.Array
    prefill_tables_RJ: jax.Array
    prefill_starts_R1: jax.Array
    prefill_lengths_R: jax.Array
    queries: int = field(default=1, metadata={"static": True})
    tree_mask_BQW: jax.Array | None = None
    implementation: str = field(default="auto", metadata={"static": True})
    schedule: Schedule | None = None


def make_cache(
    mesh: Mesh, groups: tuple[int, ...], num_pages: tuple[int, ...], page_size: int, kv_heads: int, head_size: int,
    dtype: str, stages: int = 1,
) -> tuple[Pages, ...]:  # fmt: skip
    """An empty cache, sharded over KV heads, and its pages over the axis `context`; a quantized one has scales.

    Args:
        mesh: the model's mesh.
        groups: the group of each layer.
        num_pages: pages of each group's layers, the null page included; of all ranks of the axis `context`, each of
            which has an equal part with a null page of its own.
        page_size: tokens per page.
        kv_heads: KV heads, as the mesh repeats them.
        head_size: components of a head.
        dtype: of keys and values, one of CACHE_DTYPES.
        stages: of a pipe, each of which has a layer of these on its devices; see `jaxinfer.parallel.pipeline`.
    """
    as_held = jax.eval_shape(as_moved, jax.ShapeDtypeStruct((), dtype)).dtype

    def zeros(shape: tuple[int, ...], dtype: jnp.dtype, spec: P) -> jax.Array:
        shape, spec = staged(shape, spec, stages) if stages > 1 else (shape, spec)
        return jnp.zeros(shape, dtype, device=NamedSharding(mesh, spec))

    def empty(pages: int) -> Pages:
        shape = (pages, page_size, kv_heads, head_size)
        pools = [zeros(shape, as_held, P(CONTEXT, None, TENSOR, None)) for _ in "kv"]
        if dtype in LARGEST:
            pools += [zeros((pages, kv_heads, page_size), SCALE, P(CONTEXT, TENSOR, None)) for _ in "kv"]
        return Pages(*pools)

    return tuple(empty(num_pages[group]) for group in groups)


def specs_of_pages() -> Pages:
    """How a layer's state lies on the mesh."""
    numbers, scales = P(CONTEXT, None, TENSOR), P(CONTEXT, TENSOR)
    specs: Any = (numbers, numbers, scales, scales)
    return Pages(*specs)


def page_bytes(page_size: int, kv_heads: int, head_size: int, dtype: str) -> int:
    """Bytes of one page of one layer, keys and values with their scales."""
    scale = SCALE.itemsize if dtype in LARGEST else 0
    return 2 * page_size * kv_heads * (head_size * jnp.dtype(dtype).itemsize + scale)
