"""Small tokenizers of the two kinds in use, made on the spot."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxinfer.text import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n",
    "Grüße aus Köln, café au lait, 東京 🦊",
] * 4


def byte_level() -> tokenizers.Tokenizer:
    """GPT-2's kind: every byte is a token, the space belongs to the word after it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentencepiece_bpe() -> tokenizers.Tokenizer:
    """Llama-2's kind: a mark for the space, bytes for what is not in the vocabulary, first space dropped."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", *"abcdefghijklmnopqrstuvwxyz.,é", "th", "the", "▁the", "▁d", "▁do", "og", "▁▁"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "d"), ("▁d", "o"), ("o", "g"), ("▁", "▁")]
    vocab = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def metaspace_unigram() -> tokenizers.Tokenizer:
    """T5's and XLM-R's kind; its first token loses all its leading marks when decoded."""
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def save(backend: tokenizers.Tokenizer, folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def add_bos(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


KINDS = {kind.__name__: kind for kind in (byte_level, sentencepiece_bpe, metaspace_unigram)}


@pytest.fixture(scope="session")
def tokenizers_by_kind(tmp_path_factory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: Tokenizer.from_folder(save(kind(), root / name)) for name, kind in KINDS.items()}


@pytest.fixture(params=KINDS)
def tokenizer(request, tokenizers_by_kind) -> Tokenizer:
    return tokenizers_by_kind[request.param]


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a byte-level tokenizer with these fields of tokenizer_config.json, and returns its folder."""

    def write(*, with_post_processor: bool = False, **config: object) -> Path:
        backend = byte_level()
        return save(add_bos(backend) if with_post_processor else backend, tmp_path, **config)

    return write
