"""Prompt lookup: what followed the same few tokens earlier in the text may follow again (Saxena 2023, "Prompt Lookup
Decoding"; Yang et al. 2023, "Inference with Reference", arXiv 2304.04487).

The text of each slot is on the device, and so is the search. It costs no model, and pays where outputs copy: edits of
code, summaries, answers that quote.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxinfer.decode.arguments import check_size
from jaxinfer.decode.forward import Cache, Forward
from jaxinfer.decode.sampling import Needs
from jaxinfer.decode.slots import SlotState
from jaxinfer.decode.speculative.method import Proposal, Speculation, check_drafts
from jaxinfer.model import Params

LONGEST = 64


@dataclass(frozen=True)
class PromptLookup(Speculation):
    """Proposes what followed the latest earlier occurrence of the text's last tokens: of as many of them as occur
    together, up to `prompt_lookup_max`. Where not even the last one occurred before, that token is proposed again.

    Attributes:
        num_speculative_tokens: k, 1..MOST_DRAFTS.
        prompt_lookup_max: 1..LONGEST tokens that are looked for, in vLLM's name.

    Raises:
        ValueError: one of them is out of range.
    """

    num_speculative_tokens: int = 8
    prompt_lookup_max: int = 4
    adapts = True
    shares_sequences = True
    reads_text = True

    def __post_init__(self):
        check_drafts(self.num_speculative_tokens)
        check_size("prompt_lookup_max", self.prompt_lookup_max, 1, LONGEST)

    def propose(
        self, target: Forward, params: Params, needs: Needs, state: SlotState, cache: Cache
    ) -> tuple[Proposal, Cache]:
        assert state.text_BT is not None
        drafts_Bk = propose(state.text_BT, state.length_B, self.num_speculative_tokens, self.prompt_lookup_max)
        return Proposal(drafts_Bk), cache


def propose(text_BT: jax.Array, last_B: jax.Array, count: int, longest: int) -> jax.Array:
    """The `count` tokens that followed the latest of the longest earlier occurrences of what each text ends with. A
    continuation that reaches the end of the text goes round: after "abcab" follow "c", "a", "b", "c" and so on.

    Args:
        text_BT: int32 tokens.
        last_B: where the newest token of each text is, with all others before it.
        count: k.
        longest: tokens of an occurrence that are compared.

    Returns:
        int32 [B, k].
    """
    place_T = jnp.arange(text_BT.shape[1], dtype=jnp.int32)
    at_B1 = last_B[:, None]
    alike_BT, matched_BT = place_T[None] < at_B1, jnp.zeros_like(text_BT)
    for back in range(longest):
        wanted_B1 = jnp.take_along_axis(text_BT, jnp.maximum(at_B1 - back, 0), axis=1)
        earlier_BT = jnp.pad(text_BT, ((0, 0), (back, 0)))[:, : text_BT.shape[1]]
        alike_BT &= (earlier_BT == wanted_B1) & (place_T[None] >= back)
        matched_BT += alike_BT.astype(jnp.int32)
    # The latest of the best. Where nothing matches, the place before the newest token: what follows is that token.
    best_B = jnp.max(matched_BT, axis=1)
    latest_B = jnp.max(jnp.where(matched_BT == best_B[:, None], place_T[None], -1), axis=1)
    found_B = jnp.where(best_B > 0, latest_B, last_B - 1)
    step_k = jnp.arange(count, dtype=jnp.int32)
    follows_Bk = (found_B + 1)[:, None] + step_k[None] % (last_B - found_B)[:, None]
    return jnp.take_along_axis(text_BT, follows_Bk, axis=1)
