"""The tokenizer of a Hugging Face checkpoint: `tokenizer.json` and the small files beside it."""

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

import tokenizers

from jaxinfer.text.bounds import longest_token
from jaxinfer.text.files import check_text, read_json, special_token_file, special_tokens


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids and back.

    Attributes:
      backend: the compiled tokenizer, without truncation or padding.
      vocab_size: one more than the largest id. A model may have more rows, which decode to nothing.
      special_ids: ids that mark structure and are never shown as text.
      bos_id: the beginning-of-sequence token, if the checkpoint has one.
      eos_ids: every id that ends a generation.
      adds_bos: whether `encode` begins with `bos_id`.
    """

    backend: tokenizers.Tokenizer = field(repr=False)
    vocab_size: int
    special_ids: frozenset[int]
    bos_id: int | None
    eos_ids: frozenset[int]
    adds_bos: bool

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Reads the tokenizer of the checkpoint in `folder`.

        Raises:
          FileNotFoundError: there is no `tokenizer.json`.
          ValueError: a file is malformed, or names a token that is not in the vocabulary to begin or end a
            sequence with; the message names file, field and value.
        """
        folder = Path(folder)
        backend = _read_backend(folder)
        special = special_tokens(folder)
        bos_id = _token_id(backend, special, "bos_token")
        # A flag written down decides; else the post-processor of tokenizer.json does.
        config = folder / "tokenizer_config.json"
        adds_bos = read_json(config).get("add_bos_token")
        if not isinstance(adds_bos, bool | None):
            raise ValueError(f"{config}: add_bos_token is {adds_bos!r}; it must be true, false or null")
        if adds_bos is None:
            adds_bos = _post_processor_adds(backend, bos_id)
        for role in ("bos_token", "eos_token") if adds_bos else ("eos_token",):
            _check_known(folder, backend, special, role)
        return cls(
            backend=backend,
            vocab_size=max(backend.get_vocab().values()) + 1,
            special_ids=frozenset(i for i, t in backend.get_added_tokens_decoder().items() if t.special),
            bos_id=bos_id,
            eos_ids=_eos_ids(folder, backend, special),
            adds_bos=bos_id is not None and adds_bos,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt.

        Args:
          add_special_tokens: False for text that already has them, such as a rendered chat template.

        Raises:
          ValueError: `text` is not a string, or holds a lone surrogate (its position is named).
        """
        check_text(text, "prompt")
        # `encode` would hold Python's lock meanwhile: seconds for a text of some MB.
        (encoding,) = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        ids = encoding.ids
        if not add_special_tokens or self.bos_id is None:
            return ids
        begun = _post_processor_adds(self.backend, self.bos_id)
        return [self.bos_id] * self.adds_bos + ids[begun:]

    def least_tokens(self, text: str) -> int:
        """Tokens that a text has at the least, without tokenizing it; 0 where that cannot be told."""
        return 0 if self._longest is None else -(-len(text.encode(errors="surrogatepass")) // self._longest)

    @cached_property
    def _longest(self) -> int | None:
        return longest_token(self.backend)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; special tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(ids, skip_special_tokens=True)


def _read_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer in {folder}: {path.name} is missing")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(f"{path} is not a valid tokenizer: {error}") from error
    if not backend.get_vocab_size():
        raise ValueError(f"{path} is not a valid tokenizer: its vocabulary is empty; it must have at least one token")
    # Files saved after training may carry both, and would cut or pad prompts silently.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _token_id(backend: tokenizers.Tokenizer, special: dict[str, str], role: str) -> int | None:
    """The id of a special token; None where there is none, or the vocabulary lacks it."""
    return backend.token_to_id(special[role]) if role in special else None


def _check_known(folder: Path, backend: tokenizers.Tokenizer, special: dict[str, str], role: str) -> None:
    """Refuses a special token that the vocabulary lacks: it would be dropped without a word."""
    if role in special and _token_id(backend, special, role) is None:
        file, found = special_token_file(folder, role), reprlib.repr(special[role])
        raise ValueError(f"{file}: {role} is {found}; it must be in the vocabulary of tokenizer.json")


def _post_processor_adds(backend: tokenizers.Tokenizer, bos_id: int | None) -> bool:
    return backend.encode("").ids[:1] == [bos_id]


def _eos_ids(folder: Path, backend: tokenizers.Tokenizer, special: dict[str, str]) -> frozenset[int]:
    """The tokenizer's own end token and the ids of `generation_config.json`, or else of `config.json`.

    Chat checkpoints end a turn with a token that often only one of the two names, so both count.
    """
    own = _token_id(backend, special, "eos_token")
    ids = frozenset() if own is None else frozenset([own])
    for name in ("generation_config.json", "config.json"):
        listed = read_json(folder / name).get("eos_token_id")
        if listed is None:
            continue
        listed = listed if isinstance(listed, list) else [listed]
        if not all(type(i) is int and i >= 0 for i in listed):
            raise ValueError(f"{folder / name}: eos_token_id must be token ids (0 or more), got {listed}")
        return ids | frozenset(listed)
    return ids
