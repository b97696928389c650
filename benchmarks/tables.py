"""Writes the README's tables of figures from `benchmarks/results`.

    python -m benchmarks.tables

A table stands between `<!-- table: NAME -->` and `<!-- /table -->`; that of another card than the H200 is named
`CARD/NAME`, by the folder of its results. Its figures come from the records of the files that a benchmark writes, and
of one beside them with other systems' figures, which stand only where there are our own. The marked table `sources`
states the environment of each file, its `what` without the key.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.record import OURS, RESULTS, Record, parts
from benchmarks.serving.latency import Stall
from benchmarks.serving.offline import STATIC
from benchmarks.step_classes import CLASSES

README = Path(__file__).parents[1] / "README.md"
FILES = (  # our own, then those of other systems; rows come in this order
    (("decode.json", "decode_xla.json"), ("anchors.json",)),
    (("serving.json",), ("serving_anchors.json",)),
    (("step.json",), ()),
    (("kernels.json",), ("kernel_anchors.json",)),
    (("speculative.json",), ()),
    (("all_reduce.json",), ()),
    (("collective_matmul.json",), ()),
    (("cross.json",), ()),
)
NAMES = {
    "mosaic_gpu": "**jaxinfer**",
    "xla": "**jaxinfer**, XLA attention",
    OURS: "**jaxinfer**, through the engine",
    "plan": "*predicted*",
    "plan with XLA attention": "*predicted*, XLA attention",
}
KERNEL_NAMES = {
    "mosaic_gpu": "**jaxinfer**",
    "xla": "plain XLA",
    "cudnn": "cuDNN in JAX, contiguous",
    "cudnn_paged": "cuDNN in JAX, paged",
    "streaming_matmul": "jaxinfer, a launch for each product",
}
SERVING_NAMES = {OURS: "**jaxinfer**", STATIC: "**jaxinfer**, static batching"}
GATHERED = ("cudnn", "tokamax")  # take keys in one piece: pages are gathered into one before the clock starts
_MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- /table -->)", re.DOTALL)


@dataclass(frozen=True)
class Table:
    """Figures of one metric: a row for each implementation, a column for each case.

    Attributes:
        metric: of the records that the table shows.
        head: what stands above the names of the rows.
        columns: titles by case.
        others: titles of further columns, by case and metric.
        variants: what the case of a row may add to a column's, and what its title adds then.
        names: of implementations, in the order of their rows; others follow under their own.
    """

    metric: str
    head: str
    columns: dict[str, str]
    others: dict[tuple[str, str], str] = field(default_factory=dict)
    variants: dict[str, str] = field(default_factory=lambda: {"": ""})
    names: dict[str, str] = field(default_factory=lambda: NAMES)

    def places(self, variant: str = "") -> list[tuple[str, str]]:
        """Case and metric of each column of a row."""
        return [
            *((case + variant, self.metric) for case in self.columns),
            *((case + variant, metric) for case, metric in self.others),
        ]

    @property
    def titles(self) -> list[str]:
        """Of the columns."""
        return [*self.columns.values(), *self.others.values()]


def rates(columns: dict[str, str]) -> dict[tuple[str, str], str]:
    """Columns of tokens a second beside those of the same cases."""
    return {(case, "decode"): f"tokens/s, {title}" for case, title in columns.items()}


BATCHES = {f"llama-3-8b B{batch}": f"batch {batch}" for batch in (1, 16, 64, 256)}
PROMPTS = {f"llama-3-8b prompt {tokens}": f"{tokens:,} tokens" for tokens in (512, 2048, 8192)}
ON_TWO = {f"{case} on tensor 2": title for case, title in BATCHES.items()}
FIRST_ON_TWO = {("llama-3-8b prompt 8192 on tensor 2", "first token"): "ms to the first token of 8,192"}
MESSAGES = {
    f"{how}{size} KB": f"{size} KB{said}"
    for how, said in (("", ", with residual and norm"), ("sum ", ""))
    for size in (8, 32, 128, 512)
}
ALL_REDUCES = KERNEL_NAMES | {"mosaic_gpu lasting": "**jaxinfer**, in lasting memory"}
RINGS = {
    "matmul": "products alone",
    "collectives": "**jaxinfer**",
    "ring": "**jaxinfer**, ring",
    "ring, scheduled": "**jaxinfer**, ring, latency hidden",
}
PRODUCTS = {
    f"{name} {tokens}": f"{name}, {tokens:,} tokens" for tokens in (2048, 8192) for name in ("qkv", "output", "mlp")
}
LONG = {"llama-3-8b prompt 131072 in chunks of 8192": "131,072 tokens"}
THROUGHPUT = {
    "llama-3-8b 256 requests": "256 requests, out",
    "qwen3-0.6b 256 requests": "Qwen3-0.6B, 256 requests, out",
    "qwen3-0.6b 1024 requests": "Qwen3-0.6B, 1,024 requests, out",
    "qwen3-0.6b 1024 chats": "Qwen3-0.6B, 1,024 chats, out",
}
IN_AND_OUT = {
    ("llama-3-8b 32 x 8192 in, 64 out", "throughput in and out"): "32 x 8,192 in, 64 out, in and out",
    ("llama-3-8b 64 x 2048 in, of them 1920 shared, 128 out", "throughput in and out"): (
        "64 x 2,048 in, of them 1,920 shared, 128 out, in and out"
    ),
}
BLOCKS = {f" in blocks of {steps}": f"{steps} step{'s' * (steps > 1)} a program" for steps in (1, 2, 4, 8, 16)}
RATES = {f" at {rate} requests/s": f"{rate} requests/s" for rate in (1, 2, 4, 8, 12, 16)}
ONLINE = "llama-3-8b 256 requests"
SERVED = {
    (ONLINE, "goodput"): "goodput, requests/s",
    **{
        (ONLINE, f"{metric} {percentile}"): f"{metric}, ms, {percentile}"
        for metric in ("first token", "time per token")
        for percentile in ("p50", "p99")
    },
}
STALL = f"llama-3-8b {Stall().name}"
STEADY = {STALL: "alone"}
BESIDE = {
    (STALL, "step with the prompt p50"): "beside a prompt of 32,768, p50",
    (STALL, "step with the prompt p99"): "p99",
    (STALL, "step with the prompt, worst"): "worst",
    (STALL, "worst over a decode step"): "worst over alone",
    (STALL, "worst over a decode step on the device"): "worst over alone, on the device",
    (STALL, "first token"): "first token of the prompt, ms",
}
STARTS = {f"llama-3-8b {start} start": f"{start} start" for start in ("first", "second")}
PROGRAMS = {("llama-3-8b first start", metric): metric for metric in ("programs", "kernels")}
READY = {f"llama-3-8b server, {start} start": f"{start} start" for start in ("first", "second")}
PARTS = {
    ("llama-3-8b server, second start", metric): f"of the second start, {metric}"
    for metric in ("HTTP process", "imports", "device", "weights and cache", "warm-up")
}
PREFILL = {
    **{f"flash_attention llama-3-8b {x}": x for x in ("4x2048", "2x4096", "1x8192", "1x16384", "1x32768")},
    "flash_attention mistral-7b 1x32768": "1x32768, window 4096",
}
DECODING = {
    f"flash_decoding llama-3-8b {x}": x for x in ("1x8192", "1x131072", "16x8192", "64x4096", "128x2048", "256x256")
}
OPTIONS = {
    "flash_decoding llama-3-8b 64x4096": "64x4096",
    "flash_decoding llama-3-8b 64x4096 8 queries": "8 queries",
    "flash_decoding llama-3-8b 64x4096 int8": "int8 cache",
    "flash_decoding llama-3-8b 64x4096 fp8": "fp8 cache",
    "flash_decoding llama-3-8b 64 from 128 to 32768": "64 of 128 to 32768",
}
ROW = {
    f"streaming_mlp {model} M={tokens}": f"{model}, {tokens}"
    for model in ("llama-3-8b", "llama-3-70b")
    for tokens in (1, 16, 32)
}
MATMUL = {f"streaming_matmul llama-3-8b {x}": x for x in ("qkv", "o", "up", "down", "head")}
VERIFYING = {
    f"llama-3-8b B{batch} {drafts} drafts": f"{drafts} tokens, batch {batch}"
    for drafts in (8, 4)
    for batch in (1, 4, 16, 64)
}
METHOD_COSTS = {
    **{
        f" {drafts} drafts by {method}": f"{method}, {drafts} tokens"
        for method in ("draft", "early-exit")
        for drafts in (8, 4)
    },
    **{
        f" {drafts} drafts by {method}": f"{method}, a tree of {drafts}"
        for method, drafts in (("medusa", 15), ("eagle", 15), ("lookahead", 55))
    },
}
LOOKUP = {
    OURS: "**jaxinfer**, plain",
    f"{OURS}, lookup": "**jaxinfer**, lookup",
    f"{OURS}, lookup always": "**jaxinfer**, lookup, always",
    "plan": "*predicted*, lookup",
    f"plan, {OURS}, lookup always": "*predicted*, lookup, always",
}
DRAFTED = {
    f"demo drafted by {folder} T={temperature}": f"{made}, temperature {temperature}"
    for folder, made in (("draft", "distilled"), ("ce", "of the text alone"))
    for temperature in ("0", "0.7", "1")
}
METHODS = ("lookup", "lookahead", "early-exit", "draft", "medusa", "eagle")
ACCEPTED = {f"demo drafted by {method}": method for method in METHODS}
TEMPERATURES = {f" T={temperature}": f"temperature {temperature}" for temperature in ("0", "0.7", "1")}
COSTS, COPYING, REPLAYING, DRAFTING, REPLAYING_DRAFTS, RANDOM = (
    {f"{name} B{batch}": f"batch {batch}" for batch in (1, 4, 16, 64)}
    for name in (
        "llama-3-8b",
        "demo copying",
        "llama-3-8b replaying",
        "demo drafting",
        "llama-3-8b replaying drafts",
        "llama-3-8b random text",
    )
)
BY_METHOD = {f" by {method}": method for method in METHODS}
GAINS = {
    **{f"{OURS}, {method}": "**jaxinfer**" for method in METHODS},
    **{f"{OURS}, {method} always": "**jaxinfer**, always" for method in METHODS},
    "plan": "*predicted*",
    **{f"plan, {OURS}, {method} always": "*predicted*, always" for method in METHODS},
}
CROSSED = {"logits": "logits"} | {f"text by {method}": method for method in ("plain", *METHODS)}
SHUFFLED, PAGES_OF_16 = {"": "", " shuffled": "shuffled pages of 64"}, {"": "", " pages of 16": "pages of 16"}
MANY = {f"tiled_matmul llama-3-8b {x}": x for x in ("qkv", "o", "up", "down")}
MANY_TOKENS = {f" M={M}": f"{M:,} tokens" for M in (512, 2048, 8192)}
TOKENS = {f" M={M}": f"{M} token{'s' * (M > 1)}" for M in (1, 16, 64)}
SOURCES = "sources"
TABLES = {
    "decode": Table("decode", "tokens/s", BATCHES),
    "decode-step": Table("decode step", "ms a step", BATCHES),
    "step": Table("time in step", "us of a step", BATCHES | PROMPTS, names={name: name for name in CLASSES}),
    "first-token": Table("first token", "ms to the first token", PROMPTS | LONG),
    "throughput": Table("output throughput", "tokens/s", THROUGHPUT, IN_AND_OUT, names=SERVING_NAMES),
    "blocks": Table(
        "decode",
        "tokens/s",
        BATCHES,
        {("llama-3-8b 256 requests", "output throughput"): "256 requests, out"},
        BLOCKS,
        SERVING_NAMES,
    ),
    "online": Table("output throughput", "requests that arrive", {ONLINE: "tokens/s"}, SERVED, RATES, SERVING_NAMES),
    "beside-a-prompt": Table("decode step", "ms a step of 16 sequences", STEADY, BESIDE, names=SERVING_NAMES),
    "warm-up": Table("warm-up", "seconds to get ready", STARTS, PROGRAMS, names=SERVING_NAMES),
    "ready": Table("ready", "seconds from the start of the process", READY, PARTS, names=SERVING_NAMES),
    "prefill-kernel": Table("arithmetic", "prefill, TFLOP/s", PREFILL, variants=SHUFFLED, names=KERNEL_NAMES),
    "decoding-kernel": Table("time", "decoding, us", DECODING, variants=PAGES_OF_16, names=KERNEL_NAMES),
    "decoding-options": Table("time", "decoding, us", OPTIONS, names=KERNEL_NAMES),
    "row-kernel": Table("time", "layer after attention, us", ROW, names=KERNEL_NAMES),
    "verification": Table("over a plain step", "a step that verifies, over a plain one", VERIFYING),
    "verification-by-method": Table(
        "over a plain step", "a step that verifies, over a plain one", COSTS, variants=METHOD_COSTS
    ),
    "acceptance": Table("tokens of a step", "tokens of a step", ACCEPTED, variants=TEMPERATURES, names=SERVING_NAMES),
    "drafted": Table("proposed tokens right", "proposed tokens that are right, %", DRAFTED, names=SERVING_NAMES),
    "copying": Table("over plain decoding", "times plain decoding", COPYING, rates(COPYING), names=LOOKUP),
    "replay": Table("over plain decoding", "times plain decoding", REPLAYING, rates(REPLAYING), names=LOOKUP),
    "drafting": Table("over plain decoding", "times plain decoding", DRAFTING, variants=BY_METHOD, names=GAINS),
    "replay-by-method": Table(
        "over plain decoding", "times plain decoding", REPLAYING_DRAFTS, variants=BY_METHOD, names=GAINS
    ),
    "random-text": Table("over plain decoding", "times plain decoding", RANDOM, variants=BY_METHOD, names=GAINS),
    "two-devices": Table("decode", "tensor parallel on two, tokens/s", ON_TWO, FIRST_ON_TWO),
    "all-reduce": Table("time", "all-reduce on two, us", MESSAGES, names=ALL_REDUCES),
    "ring": Table("time", "products on two, us", PRODUCTS, names=RINGS),
    "cross": Table("meshes that agree", "meshes, of 19", CROSSED, names={}),
    "matmul-kernel": Table("traffic", "matmul, TB/s", MATMUL, variants=TOKENS, names=KERNEL_NAMES),
    "tiled-kernel": Table("arithmetic", "matmul, TFLOP/s", MANY, variants=MANY_TOKENS, names=KERNEL_NAMES),
}


def main() -> None:
    README.write_text(render(README.read_text(), RESULTS / "h200"))


def render(text: str, folder: Path) -> str:
    """The text with every marked table made from the results in `folder`, or in the one beside it that a mark names; a
    file that is missing adds no rows.

    Raises:
        ValueError: the text marks a table that is not known.
    """

    def table(match: re.Match[str]) -> str:
        card, _, name = match[2].rpartition("/")
        if name not in (*TABLES, SOURCES):
            raise ValueError(f"the text marks table {name!r}; known are {', '.join((*TABLES, SOURCES))}")
        return match[1] + section(name, folder.parent / card if card else folder) + match[3]

    return _MARKED.sub(table, text)


def section(name: str, folder: Path) -> str:
    """One table of one card, or where all of its figures come from."""
    files = [part for names in FILES for part in read(folder, *names)]
    if name == SOURCES:
        return "".join(dict.fromkeys(describe(part["environment"]) for part in files))
    return markdown(TABLES[name], [Record(**record) for part in files for record in part["records"]])


def read(folder: Path, ours: Sequence[str], others: Sequence[str]) -> list[dict[str, Any]]:
    """The parts of our own files and of those of other systems; none without one of our own."""
    paths = [path for name in ours if (path := folder / name).exists()]
    if paths:
        paths += [path for name in others if (path := folder / name).exists()]
    return [part for path in paths for part in parts(json.loads(path.read_text()))]


def markdown(table: Table, records: list[Record]) -> str:
    """One table: a figure, and behind it the fraction of the hardware's limit. Empty without a figure."""
    cells = {(record.case, record.metric, record.implementation): figure(record) for record in records}
    rank = {name: i for i, name in enumerate(table.names)}
    lines = [[table.head, *table.titles], ["---", *["---:"] * len(table.titles)]]
    for variant, addition in table.variants.items():
        places = table.places(variant)
        names = dict.fromkeys(name for case, metric, name in cells if (case, metric) in places)
        for name in sorted(names, key=lambda name: rank.get(name, len(rank))):
            lines.append([title(table, name, addition), *(cells.get((*place, name), "") for place in places)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) if len(lines) > 2 else ""


def title(table: Table, name: str, addition: str) -> str:
    """Of the row of an implementation: what ran, and on what."""
    if "pages" in addition and name in GATHERED:
        addition = f"gathered beforehand from {addition}"
    return ", ".join(filter(None, (table.names.get(name, name), addition)))


def figure(record: Record) -> str:
    """Three digits at least, and whole numbers from 100 on: `4.41`, `227 (75 %)`, `10,445 (81 %)`."""
    number = f"{record.value:,.0f}" if record.value >= 100 else f"{record.value:.3g}"
    return number if record.roofline_fraction is None else f"{number} ({record.roofline_fraction:.0%})"


def describe(environment: dict[str, str]) -> str:
    """Where the figures of one file come from."""
    words = [value if name == "what" else f"{name} {value}" for name, value in environment.items()]
    return f"- {', '.join(words)}\n"


if __name__ == "__main__":
    main()
