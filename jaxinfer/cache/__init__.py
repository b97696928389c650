"""The paged cache: the one place that knows how keys and values lie in memory."""

from jaxinfer.cache.attention import attend_pages, move, scheduled, tree_mask
from jaxinfer.cache.pages import CACHE_DTYPES, NULL_PAGE, Pages, View, make_cache, page_bytes

__all__ = [
    "CACHE_DTYPES", "NULL_PAGE", "Pages", "View", "attend_pages", "make_cache", "move", "page_bytes", "scheduled",
    "tree_mask",
]  # fmt: skip
