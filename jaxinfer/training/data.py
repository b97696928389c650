"""The demo model's text: the source of the Python standard library that runs this program."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers

END_OF_TEXT = "<|endoftext|>"

# Never trained on; what the model makes of them is its held-out loss. Their tests are left out altogether.
HELD_OUT = (
    "bisect.py",
    "calendar.py",
    "cmd.py",
    "csv.py",
    "fractions.py",
    "glob.py",
    "graphlib.py",
    "heapq.py",
    "queue.py",
    "shlex.py",
    "textwrap.py",
    "zipapp.py",
)

# Other people's packages, tables that a program wrote, and test data that is odd on purpose.
EXCLUDED = (
    "site-packages",
    "dist-packages",
    "encodings",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "html/entities.py",
    "stringprep.py",
    "test/encoded_modules",
    "test/tokenizedata",
    "test/test_lib2to3",
    "_sysconfigdata*.py",
    "config-*",
    "bad*.py",
    "*_bad*.py",
)


@dataclass(frozen=True)
class Document:
    """One source file: its path below the standard library's folder, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Library:
    """The standard library in two parts that share no module, each ordered by name."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]


@dataclass(frozen=True)
class TokenData:
    """Token streams `end doc end doc ... end`, uint16, and the size of the held-out text in bytes."""

    train_T: np.ndarray
    held_out_T: np.ndarray
    held_out_bytes: int


def read_library(root: Path | None = None) -> Library:
    """Reads the library at `root`, by default the running interpreter's.

    Raises:
      ValueError: a held-out module is not there, so that `root` is no standard library.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    documents = tuple(_documents(root))
    held_out = tuple(document for document in documents if document.name in HELD_OUT)
    missing = set(HELD_OUT) - {document.name for document in held_out}
    if missing:
        raise ValueError(f"root {root} is no standard library: it lacks {sorted(missing)}")
    their_tests = {f"test_{name}" for name in HELD_OUT}
    train = tuple(
        document
        for document in documents
        if document.name not in HELD_OUT and Path(document.name).name not in their_tests
    )
    return Library(train, held_out)


def tokenize_library(library: Library, tokenizer: tokenizers.Tokenizer) -> TokenData:
    """Encodes both parts. A vocabulary of more than 65,536 entries does not fit the 16-bit ids."""
    if tokenizer.get_vocab_size() > 1 << 16:
        raise ValueError(f"tokenizer has {tokenizer.get_vocab_size()} entries; at most 65536 fit")
    return TokenData(
        train_T=_stream(library.train, tokenizer),
        held_out_T=_stream(library.held_out, tokenizer),
        held_out_bytes=sum(len(document.text.encode()) for document in library.held_out),
    )


def end_of_text(tokenizer: tokenizers.Tokenizer) -> int:
    """Id of the token that stands between documents; a ValueError for a tokenizer without it."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
        raise ValueError(f"tokenizer has no token {END_OF_TEXT}")
    return end


def epochs(num_tokens: int, row: int, batch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yields `starts_B`, int32: where the rows of one training step begin in the stream, without end.

    Rows of `row + 1` tokens overlap in one token, so that every token is predicted once an epoch. Each epoch
    cuts the stream at another offset and takes the rows in another order; the last few make no full batch.

    Raises:
      ValueError: the stream holds less than one batch.
    """
    rows = whole_rows(num_tokens, row, batch)
    while True:
        offset = rng.integers(row)
        starts_N = (offset + row * rng.permutation(rows)).astype(np.int32)
        yield from starts_N[: rows // batch * batch].reshape(-1, batch)


def whole_rows(num_tokens: int, row: int, batch: int) -> int:
    """Rows of an epoch, wherever it begins to cut; a ValueError where they are less than one batch."""
    rows = (num_tokens - 1) // row - 1
    if rows < batch:
        raise ValueError(f"batch is {batch}; a stream of {num_tokens} tokens gives at most {rows} rows")
    return rows


def held_out_rows(tokens_T: np.ndarray, row: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Cuts a stream into rows that together predict each token after the first exactly once.

    Returns:
      tokens_NBS with S = `row + 1`, int32, the end filled with zeros, and counted_NBS with S = `row`, bool:
      which predictions count.
    """
    predicted = len(tokens_T) - 1
    steps = -(-predicted // (row * batch))
    index_RS = row * np.arange(steps * batch)[:, None] + np.arange(row + 1)[None, :]
    padded_T = np.zeros(steps * batch * row + 1, np.int32)
    padded_T[: len(tokens_T)] = tokens_T
    shape = (steps, batch, row)
    return padded_T[index_RS].reshape(steps, batch, row + 1), (index_RS[:, :-1] < predicted).reshape(shape)


def _documents(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if any(_covers(pattern, name) for pattern in EXCLUDED):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a test of other encodings
        if text.strip():
            yield Document(name.as_posix(), text)


def _covers(pattern: str, name: Path) -> bool:
    """Whether `pattern` matches the file, or a folder that it lies in."""
    return any(part.match(pattern) for part in (name, *name.parents[:-1]))


def _stream(documents: tuple[Document, ...], tokenizer: tokenizers.Tokenizer) -> np.ndarray:
    end = end_of_text(tokenizer)
    encoded = tokenizer.encode_batch([document.text for document in documents], add_special_tokens=False)
    parts = [[end], *([*document.ids, end] for document in encoded)]
    return np.concatenate([np.asarray(part, np.uint16) for part in parts])
