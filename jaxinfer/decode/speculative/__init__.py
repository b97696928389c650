"""Speculative decoding: guess some tokens, compute them all in one step, keep those that are right.

A step that decodes reads all weights for one token of each sequence; a step of k + 1 tokens costs about the same. A
method proposes the k tokens that may follow, and `verify` lets the model draw after each of them. Where a draw is the
proposed token the next draw counts, too, and where it is another one the rest is dropped.

The draws are those of plain decoding: a token depends on the logits, the request's seed and the token's index alone.
So what is proposed never changes an output, greedy or sampled, but for what rounding in steps of another size does
(Daliri et al. 2024, "Coupling without Communication and Drafter-Invariant Speculative Decoding", arXiv 2408.07978). A
token that is proposed for certain is accepted with the probability that the model gives it, and no exact rule accepts
it more often. One that a draft drew at random is accepted more often by the rule of Leviathan et al. and Chen et al.;
its method says which of the two it takes. By that rule sampled outputs are other draws of the same distribution.

A proposal may also be a tree of tokens, of which several may follow the same one. The draws walk it: each leads on to
the token that it is, if that was proposed there. What is on the path that was taken is then moved to its place in the
cache; outputs are those of plain decoding all the same.

Where a constraint says which tokens may be drawn, the host gives every draw the mask that the proposed tokens before
it bring: draws are those of plain decoding again.

Each method is a file. It says how many tokens it proposes, and which.
"""

from typing import Any

from jaxinfer.decode.speculative.draft import DraftModel
from jaxinfer.decode.speculative.eagle import Eagle
from jaxinfer.decode.speculative.early_exit import EarlyExit
from jaxinfer.decode.speculative.lookahead import Lookahead
from jaxinfer.decode.speculative.lookup import PromptLookup
from jaxinfer.decode.speculative.medusa import Medusa
from jaxinfer.decode.speculative.method import (
    Loader,
    Observed,
    Pass,
    Pool,
    Proposal,
    Speculation,
    Typical,
    beyond_of,
    check_ranks,
    depth_of,
    drafts_of,
    tree_of,
)
from jaxinfer.decode.speculative.step import SpeculativeStep, remembering
from jaxinfer.decode.speculative.verify import verify
from jaxinfer.decode.tree import MOST_DRAFTS, Tree

METHODS: dict[str, type[Speculation]] = {
    "draft": DraftModel, "eagle": Eagle, "early-exit": EarlyExit, "lookup": PromptLookup, "lookahead": Lookahead,
    "medusa": Medusa,
}  # fmt: skip

__all__ = [
    "METHODS", "MOST_DRAFTS", "DraftModel", "Eagle", "EarlyExit", "Loader", "Lookahead", "Medusa", "Observed", "Pass",
    "Pool", "PromptLookup", "Proposal", "Speculation", "SpeculativeStep", "Tree", "Typical", "beyond_of", "by_name",
    "check_ranks", "depth_of", "drafts_of", "remembering", "tree_of", "verify",
]  # fmt: skip


def by_name(speculate: str | None = None, **settings: Any) -> Speculation | None:
    """The method of that name in METHODS; None for none.

    Args:
        settings: of the method, see `Speculation.settings`; None leaves one to it.

    Raises:
        ValueError: there is no such method, or it has no use for one of the settings, or not for this value.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if speculate is None:
        for name, value in given.items():
            raise ValueError(f"{name} = {value!r} has no use without a method")
        return None
    if speculate not in METHODS:
        raise ValueError(f"speculate = {speculate!r} must be one of {', '.join(METHODS)}")
    for name, value in given.items():
        if name not in METHODS[speculate].settings():
            users = [method for method in METHODS if name in METHODS[method].settings()]
            raise ValueError(
                f"{name} = {value!r} has no use where speculate = {speculate!r}, but with {' or '.join(users)}"
            )
    return METHODS[speculate].of(**given)
