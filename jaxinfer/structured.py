"""Outputs that follow a schema, an expression or a grammar: constraints of the tokens, by llguidance."""

from __future__ import annotations

from functools import cached_property, lru_cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

import numpy as np

from jaxinfer.decode.masks import WORD, allows, no_masks
from jaxinfer.decode.structured_params import StructuredOutputsParams
from jaxinfer.text import Tokenizer

if TYPE_CHECKING:
    from llguidance import GrammarFormat, LLMatcher, LLTokenizer

KEPT = 128  # grammars that are kept for those who ask again
# Between the parts of JSON: what separates words or indents lines. With any whitespace a model can go on for ever.
WHITESPACE = r"( |\n[ \t]{0,16})"
NO_TOKEN = "no token of the model can come next"
_SHOWN = 300  # characters of what llguidance says


class GrammarConstraint:
    """Which tokens may follow those of one output; see `jaxinfer.engine.constraints.Constraint`."""

    def __init__(self, matcher: LLMatcher, end_U: np.ndarray, useless: str):
        """Args:
        matcher: of nothing yet.
        end_U: uint32, the mask that allows the end of the sequence alone.
        useless: how a sentence begins that says why it cannot be used.
        """
        self.failed: str | None = None
        self._matcher, self._end_U, self._useless = matcher, end_U, useless

    def mask(self) -> np.ndarray:
        """uint32 [U]. Where nothing can follow, the end of the sequence can."""
        words_U, problem = _next(self._matcher, len(self._end_U))
        if problem is not None:
            self._fail(problem)
        return words_U if self.failed is None else self._end_U

    def accept(self, token: int) -> None:
        if allows(self._end_U, token):
            self.mask()  # an end that comes of a failure: maybe only a copy, which came first, knows of that
        if self.failed is None and not self._matcher.consume_token(token):
            self._fail(_said(self._matcher.get_error()))

    def copy(self) -> GrammarConstraint:
        copy = GrammarConstraint(self._matcher.deep_copy(), self._end_U, self._useless)
        copy.failed = self.failed
        return copy

    def _fail(self, reason: str) -> None:
        self.failed = self._useless + reason


class Grammars:
    """Makes constraints for one model."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]):
        """Args:
        vocab_size: of the model.
        eos_ids: tokens that end an output, where the grammar allows it.
        """
        self._tokenizer, self._vocab, self._eos_ids = tokenizer, vocab_size, eos_ids
        self._compiled = lru_cache(KEPT)(self._compile)

    @property
    def possible(self) -> bool:
        """Whether any can be made: llguidance is there, and outputs of the model have an end."""
        return find_spec("llguidance") is not None and bool(self._eos_ids)

    def problem(self, asked: StructuredOutputsParams) -> str | None:
        """Why no output can be held to it, in words."""
        try:
            self.constraint(asked)
        except ValueError as error:
            return str(error)
        return None

    def constraint(self, asked: StructuredOutputsParams) -> GrammarConstraint:
        """Of an output that begins.

        Raises:
            ValueError: llguidance is not installed, or cannot do it.
        """
        if find_spec("llguidance") is None:
            raise ValueError("structured_outputs has no llguidance here; install jaxinfer[structured]")
        if not self._eos_ids:
            raise ValueError("structured_outputs has no end here: the model has no end-of-sequence token")
        matcher = self._compiled(asked.kind, asked.text).deep_copy()
        return GrammarConstraint(matcher, self._end_U, _useless(asked.kind))

    def _compile(self, kind: str, text: str) -> LLMatcher:
        """A matcher of nothing yet. Its first mask is computed here, where most of what is too large is found out."""
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._tokens, _grammar(kind, text), log_level=0)
        except ValueError as error:
            raise ValueError(_useless(kind) + _said(str(error))) from None
        _, problem = _next(matcher, len(self._end_U))
        if problem is not None:
            raise ValueError(_useless(kind) + problem)
        return matcher

    @cached_property
    def _tokens(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        size = max(self._vocab, self._tokenizer.vocab_size)
        return LLTokenizer(self._tokenizer.backend.to_str(), n_vocab=size, eos_token=list(self._eos_ids))

    @cached_property
    def _end_U(self) -> np.ndarray:
        """The mask that allows the end of the sequence alone."""
        words_U = np.zeros_like(no_masks(1, self._vocab)[0])
        for token in self._eos_ids:
            words_U[token // WORD] |= np.uint32(1 << token % WORD)
        return words_U


_NAMED = {
    "json": "a JSON schema",
    "json_object": "a JSON object",
    "regex": "a regex",
    "choice": "a choice",
    "grammar": "a grammar",
}


def _useless(kind: str) -> str:
    return f"structured_outputs has {_NAMED[kind]} that cannot be used: "


def _grammar(kind: str, text: str) -> str:
    """In llguidance's own form. Raises ValueError for text that is no JSON where it must be."""
    from llguidance import LLMatcher, grammar_from

    if kind in ("json", "json_object"):
        schema = '{"type": "object"}' if kind == "json_object" else text
        return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITESPACE})
    return grammar_from(cast("GrammarFormat", kind), text)  # which has the other kinds under our names


def _next(matcher: LLMatcher, count: int) -> tuple[np.ndarray, str | None]:
    """The mask of the tokens that may come next, in the `count` words of the model's vocabulary; or what is wrong."""
    words_U = np.frombuffer(matcher.compute_bitmask(), "<u4")[:count].astype(np.uint32)
    if matcher.is_error():
        return words_U, _said(matcher.get_error())
    return words_U, None if words_U.any() else NO_TOKEN


def _said(message: str) -> str:
    """One line of what llguidance says, without the state that it adds."""
    line = " ".join(message.partition("<state>")[0].split())
    if line == "NoExtensionBias":
        return NO_TOKEN
    return line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."
