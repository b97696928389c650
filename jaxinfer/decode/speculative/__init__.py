"""Speculative decoding: guess some tokens, compute them all in one step, keep those that are right.

A step that decodes reads all weights for one token of each sequence; a step of k + 1 tokens costs about the same. A
method proposes the k tokens that may follow, and `verify` lets the model draw after each of them. The draws are those
of plain decoding: a token depends on the logits, the request's seed and the token's index alone. Where a draw is the
proposed token the next draw counts, too, and where it is another one the rest is dropped. So speculation never changes
an output, greedy or sampled, but for what rounding in steps of another size does (Daliri et al. 2024, "Coupling
without Communication and Drafter-Invariant Speculative Decoding", arXiv 2408.07978). A token that is proposed
for certain is accepted with the probability that the model gives it, and no exact rule accepts it more often.

Each method is a file. It says how many tokens it proposes, and which.
"""

from jaxinfer.decode.speculative.lookup import PromptLookup
from jaxinfer.decode.speculative.method import MOST_DRAFTS, Speculation, drafts_of
from jaxinfer.decode.speculative.verify import verify

METHODS = {"lookup": PromptLookup}

__all__ = ["METHODS", "MOST_DRAFTS", "PromptLookup", "Speculation", "by_name", "drafts_of", "verify"]


def by_name(name: str | None, num_speculative_tokens: int | None = None) -> Speculation | None:
    """The method of that name in METHODS; None for none.

    Args:
        num_speculative_tokens: of each proposal; the method's own number by default.

    Raises:
        ValueError: there is no such method, or it proposes no such number.
    """
    if name is None:
        if num_speculative_tokens is not None:
            raise ValueError(f"num_speculative_tokens = {num_speculative_tokens!r} has no use without a method")
        return None
    if name not in METHODS:
        raise ValueError(f"speculate = {name!r} must be one of {', '.join(METHODS)}")
    return METHODS[name]() if num_speculative_tokens is None else METHODS[name](num_speculative_tokens)
