"""A whole model with random weights, driven without an engine: what the benchmarks of its steps have in common."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from benchmarks.record import MACHINE, Record
from jaxinfer.decode.batch import StepInput
from jaxinfer.decode.layout import Layout
from jaxinfer.decode.sampling import needs
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.decode.speculative import Speculation, drafts_of
from jaxinfer.decode.step import Programs
from jaxinfer.engine.request import Request
from jaxinfer.engine.sequence import Chunk, Sequence
from jaxinfer.engine.step_input import lay_out
from jaxinfer.machine import measure_machine
from jaxinfer.model import Model, Params, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.roofline import MEASURED, Hardware, Mesh, find_by_device
from jaxinfer.roofline.mesh import ONE
from jaxinfer.roofline.precision import BF16, Precision
from pallas_kernels import dispatch

MODELS = Path(__file__).parents[1] / "configs" / "models"
# Options of commands, and what the cost model calls them.
AXES = {"tensor_parallel_size": "tensor", "pipeline_parallel_size": "pipe", "context_parallel_size": "context"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=2**20, ignore_eos=True)


@dataclass(frozen=True)
class Subject:
    """What is measured, on what.

    Attributes:
        name: of the model in the records.
        steps: decode steps of one dispatch.
        implementation: of attention that is asked for.
        cache_dtype: of keys and values; None is the model's.
        chunk: tokens of a prompt that one step takes at most.
        machine: as timed at the start of this run; predictions are made with it.
        ceilings: those that all figures of such a machine are set against; fractions are of them.
    """

    name: str
    model: Model
    params: Params
    page_size: int
    steps: int
    implementation: str
    cache_dtype: str | None
    chunk: int
    machine: Hardware
    ceilings: Hardware

    @property
    def precision(self) -> Precision:
        return BF16 if self.cache_dtype is None else Precision.all_in("bfloat16", self.cache_dtype)

    @property
    def mesh(self) -> Mesh:
        return mesh_of(self.model)

    def case(self, what: str) -> str:
        """The name of a case in the records."""
        named = f"{self.name} {what}" if self.cache_dtype is None else f"{self.name} {what} {self.precision.cache}"
        return named + on(self.mesh)

    @property
    def attention(self) -> str:
        """The implementation that runs here, as `pallas_kernels` chooses it."""
        return dispatch.automatic()[0] if self.implementation == "auto" else self.implementation

    def timed(self) -> list[Record]:
        """What the machine was timed at."""
        return [
            Record(MACHINE, "measured", "bandwidth", self.machine.bandwidth / 1e12, "TB/s"),
            Record(MACHINE, "measured", "bf16 matmul", self.machine.rate("bf16") / 1e12, "TFLOP/s"),
            Record(MACHINE, "measured", "kernel overhead", self.machine.overhead * 1e6, "us"),
        ]

    @property
    def plan(self) -> str:
        """What the predictions for this attention are called."""
        return "plan with XLA attention" if self.attention == "xla" else "plan"


def load(
    name: str, prompts: list[int], steps: int, page_size: int = 64, implementation: str = "auto",
    cache_dtype: str | None = None, chunk: int = 8192, mesh: Mesh = ONE,
) -> Subject:  # fmt: skip
    """The model of a folder of configs/models, with random weights, on this machine as it is timed now. It takes
    prompts of so many tokens, also longer ones than it was made for."""
    machine = measure_machine()
    longest = max(read_config(MODELS / name).context, *(tokens + 1 for tokens in prompts), 0)
    model, params = random_model(MODELS / name, longest, mesh)
    ceilings = find_by_device(machine.device_kind, MEASURED) or machine
    return Subject(name, model, params, page_size, steps, implementation, cache_dtype, chunk, machine, ceilings)


def random_model(folder: Path, context: int | None = None, mesh: Mesh = ONE) -> tuple[Model, Params]:
    """The model of a folder's `config.json` with random normal weights. They are there when this returns: drawing them
    counts as no case's time or memory.

    Args:
        context: tokens of its longest sequence; None is the config's.
        mesh: of the devices that it is on, the first ones; of one replica.
    """
    devices = make_mesh(mesh.tensor, mesh.pipe, jax.devices()[: mesh.devices], mesh.context)
    model = Model(read_config(folder), devices, context)
    return model, jax.block_until_ready(model.random_params())


def mesh_of(model: Model) -> Mesh:
    """What the cost model calls the devices that a model is on."""
    return Mesh(model.stages, model.tensor, model.ranks)


def on(mesh: Mesh) -> str:
    """The end of a case's name: nothing for one device."""
    return "" if mesh == ONE else f" on {mesh}"


def add_mesh(parser: argparse.ArgumentParser) -> None:
    """Its sizes, as `jaxinfer serve` names them."""
    for name in AXES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=1, help="devices; see `jaxinfer serve`")


def mesh_in(options: argparse.Namespace) -> Mesh:
    """The one that these options ask for."""
    return Mesh(**{axis: getattr(options, name) for name, axis in AXES.items()})


class Bench:
    """One model in one layout: `slots` sequences of up to `length` tokens, whose decode steps may speculate."""

    def __init__(self, subject: Subject, slots: int, length: int, speculation: Speculation | None = None):
        config, row = subject.model.config, -(-(length + drafts_of(speculation)) // subject.page_size)
        pages = (slots * row + 1,) * len(config.windows)
        self.params = [*subject.params, *(speculation.weights if speculation is not None else ())]
        self.subject, self.peak_before = subject, memory_statistics().get("peak_bytes_in_use", 0)
        cache_dtype = subject.cache_dtype or config.dtype
        self.layout = Layout(slots, subject.page_size, pages, length, cache_dtype, subject.implementation, speculation)
        self.programs = Programs(subject.model, self.layout)
        self.state, self.cache = self.programs.new_state()
        self.random = np.random.default_rng(0)

    def prefill(self, tokens: int, chunk: int) -> float:
        """Gives every slot a prompt of `tokens` tokens, `chunk` of them in a step; seconds until the first tokens of
        the outputs are on the host."""
        return self.run(self.admit(tokens, chunk))

    def admit(self, tokens: int, chunk: int) -> list[StepInput]:
        """Gives every slot a new prompt, and says which steps read it."""
        row, sequences, rows = self.layout.pages_per_row, [], {}
        for slot in range(self.layout.slots):
            pages = range(1 + slot * row, 1 + (slot + 1) * row)
            prompt = tuple(self.random.integers(0, self.subject.model.config.vocab_size, tokens).tolist())
            rows[slot] = self.programs.admission(GREEDY, [pages] * len(self.layout.num_pages), prompt)
            sequences.append(Sequence(Request(slot, prompt, GREEDY, (), 0), slot=slot))
        self.state = self.programs.admit(self.state, rows)
        steps = []
        for first in range(0, tokens, chunk):
            chunks = [Chunk(sequence, first, min(chunk, tokens - first)) for sequence in sequences]
            steps.append(lay_out(chunks, chunk * self.layout.slots, self.layout.slots))
        return steps

    def run(self, steps: list[StepInput]) -> float:
        """Seconds until the last of the steps has its tokens on the host."""
        jax.block_until_ready(self.state)
        output, start = None, time.perf_counter()
        for step in steps:
            self.state, self.cache, output = self.programs.step(
                self.params, self.state, self.cache, step, None, needs([GREEDY])
            )
        assert output is not None
        np.asarray(output.sampled.tokens_W)
        return time.perf_counter() - start

    def decode(self, steps: int) -> float:
        """Seconds of so many decode steps of every slot, the last token on the host."""
        start = time.perf_counter()
        self.dispatch(steps // self.subject.steps)
        return time.perf_counter() - start

    def dispatch(self, count: int) -> None:
        """`count` dispatches of decode steps, the last token on the host."""
        output = None
        for _ in range(count):
            self.state, self.cache, output = self.programs.loop(
                self.params, self.state, self.cache, np.arange(self.layout.slots, dtype=np.int32),
                steps=self.subject.steps, needs=needs([GREEDY]), drafts=self.layout.depth,
            )  # fmt: skip
        assert output is not None
        assert np.asarray(output.emits_nW)[:: 1 + self.layout.depth].all()


def memory_statistics() -> dict[str, int]:
    """Of the device; empty where it keeps none."""
    return jax.devices()[0].memory_stats() or {}
