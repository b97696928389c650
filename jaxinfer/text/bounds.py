"""How much text a token can stand for: it tells of a long text, without tokenizing it, that it has too many tokens."""

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

NFC_SHRINK = 4  # bytes of text over those of its composed form are fewer: 3.5 at the most, where they become U+0390


def longest_token(backend: tokenizers.Tokenizer) -> int | None:
    """Bytes of text that one token stands for, at the most; None where nothing tells that.

    It can be told where all bytes of a text are in its tokens: of byte-level BPE in which every byte has a token.
    Other kinds make one token of an unknown word however long it is, a normalizer may shorten text, and an added token
    may swallow the spaces beside it.
    """
    vocab, added = backend.get_vocab(), backend.get_added_tokens_decoder().values()
    if not isinstance(backend.model, models.BPE) or not vocab.keys() >= set(pre_tokenizers.ByteLevel.alphabet()):
        return None
    if not _keeps_bytes(backend.pre_tokenizer) or any(token.lstrip or token.rstrip for token in added):
        return None
    if not isinstance(backend.normalizer, normalizers.NFC | None):
        return None
    longest = max(*map(len, vocab), *(len(token.content.encode()) for token in added), 1)  # a byte is a letter there
    return longest if backend.normalizer is None else longest * NFC_SHRINK


def _keeps_bytes(pre_tokenizer: pre_tokenizers.PreTokenizer | None) -> bool:
    """Whether a text is cut into pieces of bytes, and none of it left out."""
    pieces = [pre_tokenizer]
    if isinstance(pre_tokenizer, pre_tokenizers.Sequence):
        pieces = list(pre_tokenizer)  # pyright: ignore[reportArgumentType] - by `__getitem__`
    return all(map(_keeps_all, pieces)) and any(isinstance(piece, pre_tokenizers.ByteLevel) for piece in pieces)


def _keeps_all(piece: pre_tokenizers.PreTokenizer | None) -> bool:
    if isinstance(piece, pre_tokenizers.Split):
        return piece.behavior.lower() != "removed"
    return isinstance(piece, pre_tokenizers.ByteLevel | pre_tokenizers.Digits)
