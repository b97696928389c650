"""What a checkpoint's chat template does to its callers."""

import re

import pytest

from jaxinfer.intake import Intake, Limits
from jaxinfer.llm import DEMO
from jaxinfer.serve.errors import ApiError
from jaxinfer.serve.prompts import Prompts
from jaxinfer.serve.protocol import ChatBody, CompletionBody, TokenizeBody
from jaxinfer.text import ChatTemplate, Tokenizer
from jaxinfer.text.chat import _environment

MESSAGES = [{"role": "user", "content": "hello"}]
INTAKE = Intake(Tokenizer.from_folder(DEMO), Limits(4096, 1024, (0,)))


def answer(template):
    prompts = Prompts(INTAKE, template, 1024)
    return prompts.chat(ChatBody.model_validate({"messages": MESSAGES}))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('no user may speak') }}", "no user may speak"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ messages[0].content.encode('ascii').decode('no-codec') }}", "cannot render"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    ],
)
def test_a_template_that_fails(source, words):
    template = ChatTemplate(_environment().from_string(source), {})
    with pytest.raises(ApiError, match=words) as caught:
        answer(template)
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize("param", ["prompt", "messages"])
def test_a_text_that_cannot_fit_is_not_tokenized(monkeypatch, param):
    """Except where only its tokens are asked for."""
    prompts, text = Prompts(INTAKE, ChatTemplate.from_folder(DEMO), 1024), "a b " * 20_000
    count = len(prompts.tokens(TokenizeBody(prompt=text)))
    messages = [{"role": "user", "content": text}]
    read = {
        "prompt": lambda: prompts.completion(CompletionBody(prompt=[text])),
        "messages": lambda: prompts.chat(ChatBody.model_validate({"messages": messages})),
    }[param]
    assert len(prompts.tokens(TokenizeBody.model_validate({"messages": messages}))) > count
    with monkeypatch.context() as patched:
        patched.setattr(Tokenizer, "encode", None)
        with pytest.raises(ApiError) as caught:
            read()
    found = re.fullmatch(
        r"the prompt has at least (\d+) tokens; at most 1023 leave .* context of 1024", str(caught.value)
    )
    assert found is not None
    assert 1024 <= int(found[1]) <= count
    assert (caught.value.status, caught.value.param) == (400, param)
    assert caught.value.code == "context_length_exceeded"


def test_a_checkpoint_without_a_template():
    with pytest.raises(ApiError, match="give a prompt instead") as caught:
        answer("it has no template: give a prompt instead of messages")
    assert (caught.value.status, caught.value.code) == (400, "no_chat_template")
