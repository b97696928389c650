import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.continuation import Continuation
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Request, Update
from jaxinfer.text import IncrementalDecoder, StopChecker

TEXTS = [
    "",
    "the dog  the   dog\n\tthe",
    "naïve café, Grüße",  # two bytes a character
    "東京は日本の首都です",  # three
    "🦊🐍👩‍👩‍👧 the 🇩🇪 dog",  # four, and joined ones
    "e\u0301 a\u0308\u0323 n\u0303",  # combining marks
    "\ufffd the \ufffd\ufffd",  # the replacement character as such
]
KINDS = st.sampled_from(["byte_level", "sentencepiece_bpe", "metaspace_unigram"])
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def stream(tokenizer, ids, prompt_ids=()):
    decoder = IncrementalDecoder(tokenizer, prompt_ids)
    return [*(decoder.push(i) for i in ids), decoder.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_and_make_up_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@given(kind=KINDS, text=UNICODE)
def test_pieces_make_up_any_text(tokenizers_by_kind, kind, text):
    tokenizer = tokenizers_by_kind[kind]
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["the dog the  dog", *TEXTS[2:6]])
def test_pieces_add_to_the_text_of_a_prompt(tokenizer, text):
    """The space before the first word is not lost. A prompt may end within a character, but shows none of its own."""
    ids = [*sorted(tokenizer.special_ids), *tokenizer.encode(text, add_special_tokens=False)]
    for cut in range(len(ids)):
        before, after = tokenizer.decode(ids[:cut]), "".join(stream(tokenizer, ids[cut:], ids[:cut]))
        if not before.endswith("\ufffd"):
            assert before + after == tokenizer.decode(ids)


def test_a_continuation_keeps_the_space_after_its_prompt(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["sentencepiece_bpe"]
    the, dog = tokenizer.encode("the", add_special_tokens=False), tokenizer.encode("the dog", add_special_tokens=False)
    request = Request(0, (*the,), SamplingParams(), (), 0)
    continuation = Continuation.start(request, 0, tokenizer)
    continuation.push(Update(request, tuple(dog[len(the) :]), (), None, "length"))
    assert continuation.text == " dog"


@given(kind=KINDS, text=UNICODE)
def test_a_prompt_is_never_repeated(tokenizers_by_kind, kind, text):
    tokenizer = tokenizers_by_kind[kind]
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, [], ids)) == ""


@given(kind=KINDS, data=st.data())
def test_any_tokens_stream_to_their_text_when_it_is_valid(tokenizers_by_kind, kind, data):
    tokenizer = tokenizers_by_kind[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    text, streamed = tokenizer.decode(ids), "".join(stream(tokenizer, ids))
    # Byte by byte nothing is lost even in invalid text, except where byte fallback takes back characters
    # before an invalid byte (it replaces the whole run of bytes).
    if "\ufffd" not in text or kind == "byte_level":
        assert streamed == text


def test_a_character_is_shown_by_its_last_byte(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["sentencepiece_bpe"]
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(tokenizer.backend.token_to_id(f"<0x{byte:02X}>")) for byte in "a🦊".encode()]
    assert pieces == ["a", "", "", "", "🦊"]


def test_an_unfinished_character_shows_at_the_end(tokenizers_by_kind):
    tokenizer = tokenizers_by_kind["byte_level"]
    ids = tokenizer.encode("a🦊", add_special_tokens=False)[:-1]
    pieces = stream(tokenizer, ids)
    assert pieces[0] == "a"
    assert pieces[-1] == "\ufffd"
    assert "".join(pieces) == "a\ufffd"


def test_spaces_survive_special_tokens(tokenizer):
    words = tokenizer.encode("the dog", add_special_tokens=False)
    ids = [words[0], *sorted(tokenizer.special_ids) * 20, *words[1:]]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids) == "the dog"


@pytest.mark.parametrize("text", ["the lazy dog " * 300, "\ufffd" * 300])
def test_cost_of_a_token_does_not_grow(tokenizer, text, monkeypatch):
    sizes = []
    decode = type(tokenizer).decode

    def counting(self, ids):
        sizes.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(type(tokenizer), "decode", counting)
    ids = tokenizer.encode(text)
    streamed = "".join(stream(tokenizer, ids))
    assert max(sizes) <= 40
    assert len(sizes) <= 2 * len(ids) + 1
    # A long run of U+FFFD is not waited out, so byte fallback shows each of its bytes.
    assert streamed == decode(tokenizer, ids) or set(streamed) == {"\ufffd"}


def naive_stop(text, stops, early=0):
    """The definition: read character by character, end at the first stop string that is complete past `early`."""
    for end in range(early + 1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


def check_pieces(pieces, stops):
    checker, shown = StopChecker(stops), ""
    for piece in pieces:
        emitted, finished = checker.push(piece)
        shown += emitted
        if finished:
            return shown, True
    return shown + checker.flush(), False


LETTERS = st.text("ab", max_size=5)


@given(pieces=st.lists(LETTERS, max_size=8), stops=st.lists(LETTERS.filter(bool), max_size=3))
def test_stops_do_not_depend_on_where_pieces_are_cut(pieces, stops):
    assert check_pieces(pieces, stops) == naive_stop("".join(pieces), stops)


@given(
    early=st.lists(LETTERS, max_size=4),
    pieces=st.lists(LETTERS, max_size=4),
    stops=st.lists(LETTERS.filter(bool), max_size=3),
)
def test_no_stop_ends_early_and_each_may_begin_there(early, pieces, stops):
    checker, shown = StopChecker(stops), ""
    for piece in early:
        emitted, stopped = checker.push(piece, may_end=False)
        assert not stopped
        shown += emitted
    for piece in pieces:
        emitted, stopped = checker.push(piece)
        shown += emitted
        if stopped:
            break
    else:
        shown, stopped = shown + checker.flush(), False
    assert (shown, stopped) == naive_stop("".join(early + pieces), stops, len("".join(early)))


@given(pieces=st.lists(LETTERS, max_size=8), stops=st.lists(LETTERS.filter(bool), max_size=3))
def test_only_the_possible_beginning_of_a_stop_is_held(pieces, stops):
    checker, shown, text = StopChecker(stops), "", ""
    for piece in pieces:
        emitted, finished = checker.push(piece)
        if finished:
            return
        shown, text = shown + emitted, text + piece
        held = text[len(shown) :]
        assert shown + held == text
        assert not held or any(stop.startswith(held) for stop in stops)


def test_a_stop_over_three_pieces():
    checker = StopChecker(["\n\ndef"])
    assert checker.push("x = 1\n") == ("x = 1", False)
    assert checker.push("\nd") == ("", False)
    assert checker.push("ef g") == ("", True)


@pytest.mark.parametrize("stops", [[""], ["a", ""], [3]])
def test_empty_stop_is_refused(stops):
    with pytest.raises(ValueError, match="stop must"):
        StopChecker(stops)
