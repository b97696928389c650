"""Bodies that a parser would be long at, and with it every other caller, are found before."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from jaxinfer.serve.http import crowded
from jaxinfer.serve.protocol import ChatBody, CompletionBody

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text('a"\\[{,\né'),
    lambda inner: st.lists(inner) | st.dictionaries(st.text('k"\\:,}'), inner),
)


def counted(value):
    """Strings, lists and objects of a value, and how often one thing follows another in these."""
    if not isinstance(value, list | dict):
        return int(isinstance(value, str)), 0
    inner = [counted(one) for one in (value.values() if isinstance(value, dict) else value)]
    keys = len(value) if isinstance(value, dict) else 0
    return 1 + keys + sum(parts for parts, _ in inner), max(len(value) - 1, 0) + sum(values for _, values in inner)


@given(VALUES, st.booleans())
def test_parts_and_values_are_counted_as_json_has_them(value, ascii_only):
    """Whatever stands in strings: quotes, backslashes and brackets."""
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    parts, values = counted(value)
    assert not crowded(body, parts, values + 1)
    assert crowded(body, parts - 1, values + 1)
    assert crowded(body, parts, values)


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"prompt": "a", "metadata": {f"k{i}": 1 for i in range(20_000)}}),
        json.dumps({f"k{i}": 1 for i in range(20_000)}),
        '{"prompt": ' + "[" * 20_000,
        '{"prompt": "a", "store": [' + "[], " * 20_000,
        '{"prompt": [' + "1," * 1_000_000 + "1]}",
    ],
    ids=["an object", "the body", "deep lists", "short lists", "numbers"],
)
def test_what_would_take_long_is_crowded(text):
    assert crowded(text.encode())


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"messages": [{"role": "user", "content": "a"}] * 3_900}),
        '{"prompt": "' + '[\\"a, {b: c}]\\n' * 500_000 + '"}',
        '{"prompt": [' + "1," * 999_000 + "1]}",
    ],
    ids=["a chat", "a text", "numbers"],
)
def test_long_prompts_are_not(text):
    assert not crowded(text.encode())


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionBody, b'{"prompt": [%s]}'),
        (CompletionBody, b'{"prompt": [[%s]]}'),
        (CompletionBody, b'{"prompt": "a", "stop": [%s]}'),
        (CompletionBody, b'{"prompt": "a", "stop_token_ids": [%s]}'),
        (CompletionBody, b'{"prompt": "a", "structured_outputs": {"choice": [%s]}}'),
        (ChatBody, b'{"messages": [%s]}'),
        (ChatBody, b'{"messages": [{"role": "user", "content": [%s]}]}'),
    ],
)
def test_of_many_wrong_entries_one_is_told(kind, body):
    """An error for each would keep the process for minutes over a body of some MB."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(body % b",".join([b"{}"] * 1000))
    assert caught.value.error_count() <= 6
