"""What is crossed: a small random model of each family, every mesh of up to eight devices, every way to decode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.speculative.methods import random_weights
from jaxinfer import checkpoint
from jaxinfer.decode.speculative import (
    DraftModel,
    Eagle,
    EarlyExit,
    Loader,
    Lookahead,
    Medusa,
    PromptLookup,
    Speculation,
)
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from tests.golden.families import CASES

DEVICES = 8
# Eight query heads and experts, for eight devices. Two KV heads, or one: more devices have copies of them.
SIZES = {"num_attention_heads": 8}
EXPERTS = {"num_local_experts": 8}


@dataclass(frozen=True)
class Family:
    """Attributes:
    fields: of its `config.json`.
    period: layers after which they are alike again.
    pattern: of `layer_types`, where the config lists them.
    """

    fields: dict[str, Any]
    period: int = 1
    pattern: tuple[str, ...] = ()

    def layers(self, pipe: int) -> int:
        """As few as make equal stages, and at least two."""
        return self.period * max(pipe, 2 if self.period == 1 else 1)

    def config(self, layers: int) -> dict[str, Any]:
        repeated = {"layer_types": list(self.pattern * (layers // len(self.pattern)))} if self.pattern else {}
        return self.fields | SIZES | {"num_hidden_layers": layers} | repeated


ALTERNATING = ("sliding_attention", "full_attention")
FAMILIES = {
    "llama": Family(CASES["llama3_1"]),
    "mistral": Family(CASES["mistral"]),
    "qwen2": Family(CASES["qwen2_window"]),  # a full layer below those with windows: its stages are never alike
    "qwen3": Family(CASES["qwen3"]),
    "gemma": Family(CASES["gemma"]),
    "gemma-2": Family(CASES["gemma2"], period=2),
    "gemma-3": Family(CASES["gemma3_v5"], 2, ALTERNATING),
    "phi-3": Family(CASES["phi3"]),
    "olmo-2": Family(CASES["olmo2"]),
    "falcon": Family(CASES["falcon"]),
    "starcoder2": Family(CASES["starcoder2"]),
    "mixtral": Family(CASES["mixtral"] | EXPERTS),
    "qwen3-moe": Family(CASES["qwen3_moe"] | {"mlp_only_layers": []}, period=2),
    "olmoe": Family(CASES["olmoe"]),
    "gpt-oss": Family(CASES["gpt_oss"] | EXPERTS, 2, ALTERNATING),
}
COVERING = ("mistral", "gemma-2", "gpt-oss")  # a dense model, windows on every other layer, experts beside them
METHODS: dict[str, Speculation | None] = {
    "plain": None,
    "lookup": PromptLookup(3),
    "draft": DraftModel("the model itself", 3),
    "early-exit": EarlyExit(2, 1),
    "lookahead": Lookahead(window_size=3, ngram_size=3, max_verification_set_size=2, pool_size=16),
    "medusa": Medusa(num_speculative_tokens=6),
    "eagle": Eagle(num_speculative_tokens=6, depth=3, branches=2),
}


@dataclass(frozen=True)
class Sizes:
    """Of a mesh."""

    pipe: int = 1
    tensor: int = 1
    context: int = 1

    def __str__(self) -> str:
        named = [f"{name} {size}" for name, size in vars(self).items() if size > 1]
        return " x ".join(named) or "one device"

    def model(self, folder: Path, pipelined: bool = True) -> Model:
        mesh = make_mesh(self.tensor, self.pipe, context=self.context)
        return Model(read_config(folder), mesh, pipelined=pipelined)


def meshes() -> Iterator[Sizes]:
    """Of all numbers of devices that are powers of two, but one device."""
    sizes = [1 << shift for shift in range(DEVICES.bit_length())]
    for pipe, tensor, context in product(sizes, repeat=3):
        if 1 < pipe * tensor * context <= DEVICES:
            yield Sizes(pipe, tensor, context)


def loader(target: Model, folder: Path, sizes: Sizes) -> Loader:
    """Weights for methods: the draft is the model itself, so that all that it proposes is right; heads are random."""
    return random_weights(target)._replace(
        model=lambda _: sizes.model(folder, pipelined=False),
        params=lambda _, model: model.params(checkpoint.load(folder, model)),
    )
