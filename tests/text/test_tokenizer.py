import itertools
import json
import threading
import time

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.text import Tokenizer


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_every_unicode_text_survives_the_byte_level_round_trip(tokenizers_by_kind, text):
    tokenizer = tokenizers_by_kind["byte_level"]
    ids = tokenizer.encode(text, add_special_tokens=False)
    # A prompt may spell a special token out; decoding leaves it out.
    assert tokenizer.decode(ids) == text.replace("</s>", "").replace("<s>", "")
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_a_long_text_leaves_other_threads_their_time(tokenizer):
    encoding = threading.Thread(target=tokenizer.encode, args=("a b " * 250_000,))
    moments = [time.monotonic()]
    encoding.start()
    while encoding.is_alive():
        time.sleep(0.001)
        moments.append(time.monotonic())
    gaps = [after - before for before, after in itertools.pairwise(moments)]
    assert max(gaps) < 0.7 * (moments[-1] - moments[0])


def test_vocabulary_counts_the_largest_id(tokenizer):
    assert tokenizer.backend.id_to_token(tokenizer.vocab_size - 1) is not None
    assert tokenizer.backend.id_to_token(tokenizer.vocab_size) is None


@pytest.mark.parametrize("with_post_processor", [False, True])
@pytest.mark.parametrize("flag", [None, False, True])
def test_bos_follows_the_flag_then_the_post_processor(checkpoint, with_post_processor, flag):
    config = {} if flag is None else {"add_bos_token": flag}
    tokenizer = Tokenizer.from_folder(checkpoint(with_post_processor=with_post_processor, **config))
    expected = with_post_processor if flag is None else flag
    assert tokenizer.adds_bos is expected
    for text in ("", "the dog"):
        ids = tokenizer.encode(text)
        assert ids == [tokenizer.bos_id] * expected + tokenizer.encode(text, add_special_tokens=False)


def test_bos_written_in_the_prompt_is_kept(checkpoint):
    tokenizer = Tokenizer.from_folder(checkpoint(add_bos_token=False))
    assert tokenizer.encode("<s>the") == [tokenizer.bos_id, *tokenizer.encode("the")]


def test_tokens_may_be_named_by_objects_and_by_the_older_map(checkpoint):
    folder = checkpoint(bos_token={"content": "<s>", "special": True}, eos_token=None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "</s>"}))
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.bos_id == tokenizer.backend.token_to_id("<s>")
    assert tokenizer.eos_ids == {tokenizer.backend.token_to_id("</s>")}


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, None, {1}),
        ([7, 9], 5, {1, 7, 9}),
        (7, [5], {1, 7}),
        (None, 5, {1, 5}),
        (None, [5, 6], {1, 5, 6}),
        ([], [5], {1}),
    ],
)
def test_eos_ids_are_the_tokenizers_and_the_generation_configs(checkpoint, generation, config, expected):
    folder = checkpoint()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": config}))
    assert Tokenizer.from_folder(folder).eos_ids == expected


@pytest.mark.parametrize("value", ["</s>", -1, 1.0, True, [1, None]])
def test_malformed_eos_is_named(checkpoint, value):
    folder = checkpoint()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id"):
        Tokenizer.from_folder(folder)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("role", ["bos_token", "eos_token"])
def test_a_token_outside_the_vocabulary_is_named_where_it_would_be_used(checkpoint, role, adds_bos):
    folder = checkpoint(add_bos_token=adds_bos, **{role: {"content": "<|none|>"}})
    if role == "bos_token" and not adds_bos:
        tokenizer = Tokenizer.from_folder(folder)
        assert tokenizer.encode("the") == tokenizer.encode("the", add_special_tokens=False)
        return
    message = rf"tokenizer_config\.json: {role} is '<\|none\|>'; it must be in the vocabulary of tokenizer\.json"
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_folder(folder)


def test_a_token_outside_the_vocabulary_is_named_with_the_older_map(checkpoint):
    folder = checkpoint()
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|none|>"}))
    with pytest.raises(ValueError, match=r"special_tokens_map\.json: eos_token is '<\|none\|>'"):
        Tokenizer.from_folder(folder)


def test_truncation_and_padding_of_the_file_are_switched_off(checkpoint):
    folder = checkpoint()
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    }
    plain = Tokenizer.from_folder(folder).encode("the quick brown fox")
    path.write_text(json.dumps(content))
    assert Tokenizer.from_folder(folder).encode("the quick brown fox") == plain
    assert 2 < len(plain) < 64


def test_missing_tokenizer_names_folder_and_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}.*tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("flag", ["false", 1])
def test_malformed_flag_is_named(checkpoint, flag):
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: add_bos_token is {flag!r}; it must be true, fal"):
        Tokenizer.from_folder(checkpoint(add_bos_token=flag))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_malformed_file_is_named(checkpoint, name, content):
    folder = checkpoint()
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        Tokenizer.from_folder(folder)


def test_an_empty_vocabulary_is_named(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a valid tokenizer: its vocabulary is empty"):
        Tokenizer.from_folder(tmp_path)


def test_a_special_token_that_is_no_unicode_is_named(checkpoint):
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: eos_token holds a lone surrogate, U\+D800"):
        Tokenizer.from_folder(checkpoint(eos_token="\ud800"))


@pytest.mark.parametrize(("text", "message"), [("ab\ud800", r"U\+D800, at position 2"), (7, "string")])
def test_prompt_that_is_no_text_is_refused(tokenizer, text, message):
    with pytest.raises(ValueError, match=f"prompt .*{message}"):
        tokenizer.encode(text)
