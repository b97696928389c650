"""The fields of a `config.json`: checked as they are handed out, and refused where nothing asked for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

# Fields that say nothing about the forward pass of inference.
_WITHOUT_EFFECT = frozenset({
    "_attn_implementation_autoset", "_name_or_path", "architectures", "attention_dropout",
    "attention_softmax_in_fp32", "attn_implementation", "auto_map", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "classifier_dropout", "dtype", "embd_pdrop", "embedding_dropout", "eos_token_id",
    "experts_implementation", "ffn_dropout", "hidden_dropout", "id2label", "initial_context_length",
    "initializer_range", "is_decoder", "label2id", "mlp_dropout", "model_type", "output_attentions",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp", "problem_type", "resid_pdrop",
    "residual_dropout", "return_dict", "router_aux_loss_coef", "router_jitter_noise",
    "scale_attention_softmax_in_fp32", "sep_token_id", "tokenizer_class", "torch_dtype", "transformers_version",
    "unk_token_id", "unsloth_fixed", "unsloth_version", "use_cache",
})  # fmt: skip
_INT32 = 2**31 - 1  # sizes, positions and tokens are int32 on the device
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


class ConfigReader:
    """Hands out the fields of a `config.json` and remembers which were asked for.

    Every method raises a ValueError that names the field, its value and what is allowed.
    """

    def __init__(self, fields: dict[str, Any], within: str = "", outer: dict[str, Any] | None = None):
        """Reads the fields of the file, or those of the object `within` it; `outer` holds what they inherit."""
        self.fields = fields
        self._within = within
        self._outer = outer or {}
        self._asked: set[str] = set()

    def path(self, name: str) -> str:
        """Where a field stands in the file, or would stand: `rope_scaling.factor`."""
        inherited = name not in self.fields and name in self._outer
        return f"{self._within}.{name}" if self._within and not inherited else name

    def get(self, name: str, default: Any = None) -> Any:
        self._asked.add(name)
        return self.fields.get(name, default)

    def integer(self, name: str, default: int | None = None, least: int = 1, most: int = _INT32) -> int:
        """A count; a field that is absent or null takes the default, and without one is an error."""
        value = self.get(name)
        value = default if value is None else value
        if type(value) is not int or not least <= value <= most:
            raise _refused(self.path(name), value, f"an integer of at least {least} and at most {most}")
        return value

    def number(self, name: str, default: float | None = None, least: float = _TINY) -> float:
        """A positive number that float32 holds; a field that is absent without a default, or null, is an error."""
        return _number(self.path(name), self.get(name, default), least)

    def optional(self, name: str, default: float | None = None, least: float = _TINY) -> float | None:
        """A number, or None where the field is null."""
        return None if self.get(name, default) is None else self.number(name, default, least)

    def flag(self, name: str, default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise _refused(self.path(name), value, "true or false")
        return value

    def choice(self, name: str, allowed: dict[str, Any], default: str) -> Any:
        value = self.get(name, default)
        if not isinstance(value, str) or value not in allowed:
            raise _refused(self.path(name), value, f"one of {sorted(allowed)}")
        return allowed[value]

    def require(self, name: str, needed: bool | str) -> None:
        """Refuses a variant of a family that the supported checkpoints do not use; null counts as false."""
        value = self.get(name, needed)
        counts = False if value is None else value
        if type(counts) is not type(needed) or counts != needed:
            raise _refused(self.path(name), value, f"{needed!r}, the only one supported")

    def listed(self, name: str, kind: type) -> tuple[Any, ...]:
        """The items of a list, all of one kind; none where the field is absent or null."""
        value = self.get(name)
        value = [] if value is None else value
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise _refused(self.path(name), value, f"a list of {kind.__name__}")
        return tuple(value)

    def numbers(self, name: str, count: int) -> tuple[float, ...]:
        """The items of a list of `count` positive numbers."""
        value, path = self.get(name), self.path(name)
        if not isinstance(value, list):
            raise _refused(path, value, f"a list of {count} numbers")
        if len(value) != count:
            raise ValueError(f"config.json: {path} has {len(value)} entries; expected {count}")
        return tuple(_number(f"{path}[{i}]", item, _TINY) for i, item in enumerate(value))

    def object(self, name: str) -> dict[str, Any]:
        """Named values; none where the field is absent or null."""
        value = self.get(name)
        value = {} if value is None else value
        if not isinstance(value, dict):
            raise _refused(self.path(name), value, "an object")
        return value

    def refuse_unread(self, architecture: str) -> None:
        unread = self.fields.keys() - self._asked - _WITHOUT_EFFECT
        odd = {self.path(name): self.fields[name] for name in sorted(unread) if self.fields[name] not in (None, False)}
        if odd:
            raise ValueError(
                f"config.json: unsupported fields for {architecture}: {odd}; expected them absent, null, false or 0"
            )


def _number(name: str, value: Any, least: float) -> float:
    if type(value) not in (int, float) or not least <= value <= _HUGE:
        raise _refused(name, value, f"a number of at least {least:g} and at most {_HUGE:g}")
    return float(value)


def _refused(name: str, value: Any, expected: str) -> ValueError:
    found = "is missing or null" if value is None else f"is {value!r}"
    return ValueError(f"config.json: {name} {found}; expected {expected}")


def parse(path: Path) -> dict[str, Any]:
    """The contents of a `config.json`, or of the one in a folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no config.json at {file.resolve()}") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{file} holds {type(fields).__name__}; expected a JSON object")
    return fields
