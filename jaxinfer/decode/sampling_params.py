"""What a request may ask of the sampler: fields named and defaulted as in vLLM's `SamplingParams`."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jaxinfer.decode.arguments import is_integer, is_number
from jaxinfer.decode.structured_params import StructuredOutputsParams, shortened

MAX_N = 1024
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_TOKEN_IDS = 32
MAX_STOP_STRINGS = 32  # each is looked for in every new piece of text
MAX_STOP_LENGTH = 1024  # characters: what may be the beginning of one is looked through again with every new piece
_REPORTED = 8

GREEDY_BELOW = 1e-5
"""Temperatures below this mean greedy decoding: dividing float32 logits by less could overflow."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end.

    Attributes:
      n: how many independent continuations of the prompt to make.
      max_tokens, min_tokens: bounds on the number of new tokens; before `min_tokens` no end-of-sequence or
        stop token can be drawn, and no stop string ends the output.
      temperature: divides the logits; 0 is greedy decoding.
      top_k: keep the k most likely tokens; 0 or -1 keeps all.
      top_p: keep the most likely tokens that together hold this probability (Holtzman et al. 2020,
        section 3.1).
      min_p: keep tokens at least this likely relative to the likeliest (Nguyen et al. 2024, section 3).
      repetition_penalty: divides positive and multiplies negative logits of every token of the prompt or
        the output (Keskar et al. 2019, section 4.1).
      presence_penalty, frequency_penalty: subtracted once from each token of the output, and once for each
        time that it occurs there.
      logit_bias: token id to a value added to its logit.
      seed: makes the request reproducible; None lets the engine draw one.
      stop: a string or strings that end the output, of at most 1024 characters each.
      stop_token_ids: tokens that end the output, besides the model's own end of sequence.
      ignore_eos: go on past the model's own end of sequence.
      logprobs, prompt_logprobs: report each new (prompt) token's log-probability, and this many of the
        likeliest tokens.
      structured_outputs: what the text must look like. It also says when the output may end; log-probabilities
        are those among the tokens that it allows.

    Raises:
      ValueError: on construction, listing every field out of range with its value and what is allowed.
    """

    n: int = 1
    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ValueError("SamplingParams: " + "; ".join(problems))

    @property
    def greedy(self) -> bool:
        """Whether every token is the likeliest one."""
        return self.temperature < GREEDY_BELOW

    @property
    def penalized(self) -> bool:
        """Whether tokens that occurred before count."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whichever way it was given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def problems(self, vocab_size: int, max_model_len: int, prompt_tokens: int = 0) -> list[str]:
        """What a given model cannot serve of these params, one sentence each (`first_few` of each kind).

        Args:
          vocab_size: token ids must be below it.
          max_model_len: tokens that prompt and output may have together.
          prompt_tokens: length of the prompt that the params go with.
        """
        room = max_model_len - prompt_tokens
        found = []
        if self.max_tokens > room:
            found.append(
                f"max_tokens = {self.max_tokens} must be in 1..{room}"
                f" (a context of {max_model_len} tokens less {prompt_tokens} of the prompt)"
            )
        for field in ("logit_bias", "stop_token_ids"):
            wrong = [token for token in getattr(self, field) or () if token >= vocab_size]
            found += first_few([f"{field} has token id {i}; each must be in 0..{vocab_size - 1}" for i in wrong])
        return found


def first_few(problems: list[str]) -> list[str]:
    """Problems of one kind, as one error lists them: the first few, and how many more there are."""
    rest = len(problems) - _REPORTED
    return [*problems[:_REPORTED], f"and {rest} more of this kind"] if rest > 0 else problems


@dataclass(frozen=True)
class _Rule:
    """What one field allows, in words and as a predicate that is total: NaN and wrong types give False."""

    allowed: str
    holds: Callable[[Any], bool]


def _integers(low: int, high: int) -> _Rule:
    return _Rule(f"an integer in {low}..{high}", lambda v: is_integer(v, low, high))


def _reals(low: float, high: float) -> _Rule:
    return _Rule(f"a number in [{low:g}, {high:g}]", lambda v: is_number(v) and low <= v <= high)


def _or_none(rule: _Rule) -> _Rule:
    return _Rule(f"None or {rule.allowed}", lambda v: v is None or rule.holds(v))


_LARGEST_INT32 = 2**31 - 1
_RULES = {
    "n": _integers(1, MAX_N),
    "max_tokens": _integers(1, _LARGEST_INT32),
    "min_tokens": _integers(0, _LARGEST_INT32),
    "temperature": _reals(0, 1e6),
    "top_k": _integers(-1, _LARGEST_INT32),
    "top_p": _Rule("a number in (0, 1]", lambda v: is_number(v) and 0 < v <= 1),
    "min_p": _reals(0, 1),
    "repetition_penalty": _reals(0.01, 100),
    "presence_penalty": _reals(-2, 2),
    "frequency_penalty": _reals(-2, 2),
    "logit_bias": _or_none(
        _Rule(
            f"a dict of at most {MAX_LOGIT_BIAS} entries",
            lambda v: isinstance(v, dict) and len(v) <= MAX_LOGIT_BIAS,
        )
    ),
    "seed": _or_none(_integers(0, 2**32 - 1)),
    "stop": _or_none(
        _Rule(
            f"a string or a list of at most {MAX_STOP_STRINGS} strings",
            lambda v: isinstance(v, str) or (isinstance(v, list | tuple) and len(v) <= MAX_STOP_STRINGS),
        )
    ),
    "stop_token_ids": _or_none(
        _Rule(
            f"a list of at most {MAX_STOP_TOKEN_IDS} token ids",
            lambda v: isinstance(v, list | tuple) and len(v) <= MAX_STOP_TOKEN_IDS,
        )
    ),
    "ignore_eos": _Rule("True or False", lambda v: isinstance(v, bool)),
    "logprobs": _or_none(_integers(0, MAX_LOGPROBS)),
    "prompt_logprobs": _or_none(_integers(0, MAX_LOGPROBS)),
    "structured_outputs": _or_none(
        _Rule("a StructuredOutputsParams", lambda v: isinstance(v, StructuredOutputsParams))
    ),
}

_TOKEN_ID = _integers(0, _LARGEST_INT32)
_BIAS = _reals(-100, 100)
_BIAS_ENTRY = _Rule(
    f"{_TOKEN_ID.allowed} with {_BIAS.allowed}",
    lambda entry: _TOKEN_ID.holds(entry[0]) and _BIAS.holds(entry[1]),
)


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


_STOP_STRING = _Rule(
    f"a string that is not empty, has at most {MAX_STOP_LENGTH} characters and is valid Unicode (no lone surrogates)",
    lambda v: isinstance(v, str) and 0 < len(v) <= MAX_STOP_LENGTH and _is_unicode(v),
)
_ITEM_RULES: dict[str, tuple[_Rule, Callable[[SamplingParams], Iterable[Any]]]] = {
    "logit_bias": (_BIAS_ENTRY, lambda params: (params.logit_bias or {}).items()),
    "stop": (_STOP_STRING, lambda params: params.stop_strings),
    "stop_token_ids": (_TOKEN_ID, lambda params: params.stop_token_ids or ()),
}


def _problems(params: SamplingParams) -> Iterator[str]:
    bad = {field for field, rule in _RULES.items() if not rule.holds(getattr(params, field))}
    for field in (field for field in _RULES if field in bad):
        yield f"{field} = {shortened(getattr(params, field))} must be {_RULES[field].allowed}"
    for field in (field for field in _ITEM_RULES if field not in bad):
        rule, items = _ITEM_RULES[field]
        wrong = [item for item in items(params) if not rule.holds(item)]
        yield from first_few([f"{field} has {shortened(item)}; each must be {rule.allowed}" for item in wrong])
    if not bad & {"min_tokens", "max_tokens"} and params.min_tokens > params.max_tokens:
        yield f"min_tokens = {params.min_tokens} must be in 0..{params.max_tokens}, the value of max_tokens"
    if params.structured_outputs is not None:
        for field in ("min_tokens", "ignore_eos"):
            if value := getattr(params, field):
                neutral = type(value)()
                yield f"{field} = {value!r} must be {neutral!r} with structured_outputs, which say when an output ends"
