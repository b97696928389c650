import itertools

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.training.data import HELD_OUT, end_of_text, epochs, held_out_rows, read_library, tokenize_library
from jaxinfer.training.tokenizer import train_tokenizer


def test_parts_share_nothing_and_leave_out_what_is_listed(library_root):
    library = read_library(library_root)
    assert [document.name for document in library.held_out] == sorted(HELD_OUT)
    assert [document.name for document in library.train] == [
        "json/decoder.py",
        *(f"module{i}.py" for i in range(8)),
    ]


def test_a_folder_that_is_no_library_is_refused(tmp_path):
    for name in HELD_OUT[1:]:
        (tmp_path / name).write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"lacks \['bisect\.py'\]"):
        read_library(tmp_path)


def test_streams_are_the_documents_between_end_tokens(library_root):
    library = read_library(library_root)
    tokenizer = train_tokenizer((document.text for document in library.train), 300)
    data, end = tokenize_library(library, tokenizer), end_of_text(tokenizer)
    for stream_T, documents in ((data.train_T, library.train), (data.held_out_T, library.held_out)):
        bounds = np.flatnonzero(stream_T == end)
        assert bounds[0] == 0
        assert bounds[-1] == len(stream_T) - 1
        texts = [tokenizer.decode(stream_T[a + 1 : b]) for a, b in itertools.pairwise(bounds)]
        assert texts == [document.text for document in documents]
    assert data.held_out_bytes == sum(len(document.text.encode()) for document in library.held_out)
    assert data.train_T.dtype == np.uint16


def test_a_tokenizer_without_the_end_token_is_refused():
    with pytest.raises(ValueError, match="endoftext"):
        end_of_text(tokenizers.Tokenizer(tokenizers.models.BPE()))


@given(
    row=st.integers(1, 9),
    batch=st.integers(1, 4),
    rows=st.integers(4, 12),
    rest=st.integers(0, 8),
    seed=st.integers(0, 9),
)
def test_an_epoch_predicts_each_token_at_most_once(row, batch, rows, rest, seed):
    num_tokens = (rows + 1) * row + 1 + rest % row
    per_epoch = rows // batch
    steps = epochs(num_tokens, row, batch, np.random.default_rng(seed))
    for _ in range(2):
        starts = np.concatenate(list(itertools.islice(steps, per_epoch)))
        predicted = (starts[:, None] + 1 + np.arange(row)[None, :]).reshape(-1)
        assert len(starts) == per_epoch * batch
        assert len(set(predicted.tolist())) == predicted.size
        assert starts.min() >= 0
        assert predicted.max() < num_tokens


def test_rows_come_in_an_order_of_the_seed():
    first, again, other = (next(epochs(1000, 10, 8, np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_stream_shorter_than_a_batch_is_refused():
    with pytest.raises(ValueError, match=r"batch is 5; .* at most 4 rows"):
        next(epochs(51, 10, 5, np.random.default_rng(0)))


@given(length=st.integers(2, 60), row=st.integers(1, 9), batch=st.integers(1, 4))
def test_held_out_rows_predict_each_token_once(length, row, batch):
    tokens_T = np.arange(1, length + 1, dtype=np.uint16)
    rows_NBS, counted_NBS = held_out_rows(tokens_T, row, batch)
    assert rows_NBS.shape[1:] == (batch, row + 1)
    pairs = np.stack([rows_NBS[..., :-1][counted_NBS], rows_NBS[..., 1:][counted_NBS]])
    assert np.array_equal(pairs, np.stack([tokens_T[:-1], tokens_T[1:]]))
