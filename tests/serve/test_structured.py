"""Structured outputs as OpenAI's own client asks for them, at temperature 1."""

import asyncio
import json
import re
from typing import Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from tests.serve.running import MESSAGES

SCHEMAS = {
    "flat": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "nested": {
        "$defs": {
            "point": {
                "type": "object",
                "properties": {"x": {"type": "integer", "minimum": -9, "maximum": 9}, "on": {"type": "boolean"}},
                "required": ["x", "on"],
                "additionalProperties": False,
            }
        },
        "type": "object",
        "properties": {
            "at": {"$ref": "#/$defs/point"},
            "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            "note": {"anyOf": [{"type": "null"}, {"const": 'é\n"quoted"'}]},
        },
        "required": ["at", "code", "note"],
        "additionalProperties": False,
    },
}
EMAIL = r"[a-z]{2,9}@[a-z]{1,9}\.(com|org)"


def formatted(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_follows_its_schema_whatever_is_drawn(client, name):
    completion = client.chat.completions.create(
        model="demo", messages=MESSAGES, seed=100, n=4, max_tokens=400, response_format=formatted(SCHEMAS[name])
    )
    found = [choice.message.content for choice in completion.choices]
    assert {choice.finish_reason for choice in completion.choices} == {"stop"}
    for text in found:
        jsonschema.validate(json.loads(text), SCHEMAS[name])
    assert len(set(found)) == 4


def test_a_model_of_pydantic(client):
    class Sum(BaseModel):
        operator: Literal["+", "-"]
        numbers: list[int] = Field(min_length=2, max_length=3)

    completion = client.chat.completions.parse(
        model="demo", messages=MESSAGES, seed=2, max_tokens=400, response_format=Sum
    )
    assert isinstance(completion.choices[0].message.parsed, Sum)


def test_streams_completions_and_any_object(client):
    options = {"model": "demo", "prompt": "mail = ", "seed": 1, "max_tokens": 60}
    more = {"structured_outputs": {"regex": EMAIL}}
    whole = client.completions.create(**options, extra_body=more).choices[0]
    assert whole.finish_reason == "stop"
    assert re.fullmatch(EMAIL, whole.text)
    with client.completions.create(**options, extra_body=more, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == whole.text
    more = {"structured_outputs": {"json": SCHEMAS["flat"]}}
    (one,) = client.completions.create(**options | {"max_tokens": 400}, extra_body=more).choices
    jsonschema.validate(json.loads(one.text), SCHEMAS["flat"])
    (chat,) = client.chat.completions.create(
        model="demo", messages=MESSAGES, seed=3, max_tokens=60, response_format={"type": "json_object"}
    ).choices
    assert chat.message.content[0] == "{"
    (free,) = client.chat.completions.create(
        model="demo", messages=MESSAGES, seed=3, max_tokens=9, response_format={"type": "text"}
    ).choices
    (same,) = client.chat.completions.create(model="demo", messages=MESSAGES, seed=3, max_tokens=9).choices
    assert free.message.content == same.message.content


def test_neighbours_say_what_they_say_alone(server, client):
    options = {"model": "demo", "prompt": "def f(x):", "seed": 5, "max_tokens": 40}
    structured = {"extra_body": {"structured_outputs": {"regex": EMAIL}}}
    alone = [client.completions.create(**options, **more).choices[0].text for more in ({}, structured)]

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            calls = [client.completions.create(**options, **more) for more in ({}, structured) * 3]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    assert asyncio.run(ask()) == alone * 3
