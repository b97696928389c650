"""A model of two layers with a tokenizer of single characters, made on the spot and compiled in seconds."""

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from jaxinfer import checkpoint
from jaxinfer.engine import Options, buckets
from jaxinfer.engine.warm_up import WARM
from jaxinfer.llm import LLM
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from tests.model.random_params import random_params

# Printable ASCII, a newline (which byte-level tokenizers write as Ċ) and the two bytes of é.
CHARACTERS = [*(chr(code) for code in range(33, 127)), "Ġ", "Ċ", "Ã", "©"]
BOS, EOS = len(CHARACTERS), len(CHARACTERS) + 1
CONTEXT = 96
CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 104,  # a few more than there are characters, as published models have it
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
ONE_LAYER = CONFIG | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
OPTIONS = Options(
    max_num_seqs=4, max_num_batched_tokens=64, page_size=8, num_pages=33, max_slowdown=2.0, steps_per_dispatch=4
)
# What `warm_up` compiles for them. Admissions: with and without a prompt for the sampler. Steps: of prompts alone and
# beside others, and of few rows without prompts, where the host has a say in what is drawn. Sampling of three kinds.
# Of prompts that are scored: what finishes their rows, and what scores these. Loops: of 1 and 4 slots, with each kind
# of sampling.
TRACES = {
    "admit": 2, "release": 1, "extend": 1, "step": 2 + 1, "mask": 1, "sample": 3, "finish": 1, "score": 1,
    "loop": 2 * 3,
}  # fmt: skip


def write_checkpoint(folder: Path, config: dict = CONFIG) -> Path:
    """A checkpoint of random weights in Hugging Face layout, with its tokenizer."""
    backend = tokenizers.Tokenizer(models.BPE({text: index for index, text in enumerate(CHARACTERS)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    named = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": CHAT_TEMPLATE}
    files = {
        "config.json": json.dumps(config),
        "tokenizer.json": backend.to_str(),
        "tokenizer_config.json": json.dumps(named),
    }
    model = Model(read_config(config), make_mesh(1))
    arrays = dict(zip(model.parameters, random_params(model, 1), strict=True))
    checkpoint.export(folder, model, arrays, files, shard_bytes=1 << 20)
    return folder


@functools.cache
def tiny_folder(root: Path) -> Path:
    """The one checkpoint of a session, whose temporary files lie under `root`."""
    return write_checkpoint(root / "tiny")


@functools.cache
def warm_llm(root: Path) -> LLM:
    """The one engine of a session that most tests share, so that its programs compile once."""
    return LLM(tiny_folder(root), options=OPTIONS, warm_up=True)


@contextmanager
def with_weights(llm: LLM, folder: Path) -> Iterator[LLM]:
    """An engine with the weights of another model of its sizes, for which nothing is compiled anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.engine.runner, "params", llm.model.params(checkpoint.load(folder, llm.model)))
        llm.engine._start_afresh()  # without the keys of its own weights
        yield llm
    llm.engine._start_afresh()


def drawing_alike(llm: LLM) -> LLM:
    """An engine that is not warm yet, with the whole sampler for all requests: fewer programs are compiled."""
    llm.engine._warm = WARM[-1:]
    return llm


@contextmanager
def one_rectangle() -> Iterator[None]:
    """Engines decode in one program, of all slots, however few of them have text to write: there are fewer to
    compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "SPARED", (1, *buckets.SPARED))
        yield


def assert_warm(llm: LLM, traces: dict[str, int] = TRACES) -> None:
    """The shared engine is idle, and whatever it was asked so far, nothing was traced since it was warm."""
    assert dict(llm.engine.runner.programs.traces) == traces
    assert_clean(llm)


def assert_clean(llm: LLM) -> None:
    """Nothing waits, and no request holds a slot or a page, on the host or on the device."""
    scheduler = llm.engine.scheduler
    assert not scheduler.waiting
    assert not scheduler.running
    assert not scheduler.sequences
    assert [pool.used for pool in scheduler.paging.pools] == [0] * len(scheduler.paging.pools)
    assert not jax.device_get(llm.engine.runner.state.active_B).any()
