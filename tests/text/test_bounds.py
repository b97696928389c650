"""What is said of a text's length without tokenizing it must hold for every text."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers

from jaxinfer.text import Tokenizer
from jaxinfer.text.bounds import NFC_SHRINK, longest_token
from tests.text.conftest import KINDS, byte_level, save

SHRINKING = "\u1fbe\u0308\u0341"  # 7 bytes, and composed 2: as much as any text shrinks
PIECES = ["<s>", "</s>", " ", "\n", "fibonacci", "the dog", "K\u0327", SHRINKING, "\u1112\u1161\u11ab", "🦊"]


@pytest.fixture(scope="module")
def bounded(tmp_path_factory):
    """By whether they compose: tokenizers of which a bound is known."""
    plain, composing = byte_level(), byte_level()
    composing.normalizer = normalizers.NFC()
    composing.add_tokens([tokenizers.AddedToken("\u0390" * 40)])
    root = tmp_path_factory.mktemp("bounded")
    return [Tokenizer.from_folder(save(backend, root / str(at))) for at, backend in enumerate((plain, composing))]


@pytest.mark.parametrize("composes", [False, True])
@given(parts=st.lists(st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"])), max_size=12))
def test_no_text_has_fewer_tokens(bounded, composes, parts):
    tokenizer, text = bounded[composes], "".join(parts)
    assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False))


def test_the_bound_is_as_near_as_it_can_be(bounded):
    plain, composing = bounded
    longest = max(plain.backend.get_vocab(), key=len)
    text = plain.decode([plain.backend.token_to_id(longest)]) * 50
    assert plain.least_tokens(text) == len(plain.encode(text, add_special_tokens=False)) == 50
    assert longest_token(composing.backend) == 80 * NFC_SHRINK
    text = SHRINKING * 4000  # of the added token, 40 times composed
    ids = composing.encode(text, add_special_tokens=False)
    assert len(ids) == 100
    assert len(ids) * 3.5 / NFC_SHRINK <= composing.least_tokens(text) <= len(ids)


def changed(**parts):
    backend = byte_level()
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def with_a_hole() -> tokenizers.Tokenizer:
    """A byte without a token is left out of a text."""
    whole = byte_level()
    vocab = {token: index for index, token in enumerate(pre_tokenizers.ByteLevel.alphabet()) if token != "a"}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = whole.pre_tokenizer
    return backend


def swallowing() -> tokenizers.Tokenizer:
    backend = byte_level()
    backend.add_tokens([tokenizers.AddedToken("<x>", rstrip=True)])
    return backend


def cut(behavior: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(r"\s+"), behavior)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize(
    "backend",
    [
        *(KINDS[kind]() for kind in ("sentencepiece_bpe", "metaspace_unigram")),
        changed(normalizer=normalizers.NFKC()),
        changed(pre_tokenizer=None),
        changed(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
        changed(pre_tokenizer=cut("removed")),
        with_a_hole(),
        swallowing(),
    ],
)
def test_nothing_is_said_where_text_may_be_lost(backend):
    assert longest_token(backend) is None


def test_cuts_that_keep_all_are_no_hindrance():
    assert longest_token(changed(pre_tokenizer=cut("isolated"))) == longest_token(byte_level())
