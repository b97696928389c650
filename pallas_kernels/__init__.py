"""Attention kernels over a paged cache of keys and values; this package depends on jax alone.

Arrays carry their axes as a suffix: B sequences, Q queries per sequence, T flat tokens, R ragged sequences,
N query heads, K KV heads, g query heads per KV head, H head size, P pages in the pool, S slots in a page,
J pages in a row of the page table, C keys gathered from the pages of one sequence.
"""
