"""What a checkpoint's chat template does to its callers."""

from types import SimpleNamespace

import pytest

from jaxinfer.intake import Intake, Limits
from jaxinfer.llm import DEMO
from jaxinfer.serve.app import Service
from jaxinfer.serve.errors import ApiError
from jaxinfer.text import ChatTemplate, Tokenizer
from jaxinfer.text.chat import _environment

MESSAGES = [{"role": "user", "content": "hello"}]


def service(template):
    client = SimpleNamespace(intake=Intake(Tokenizer.from_folder(DEMO), Limits(4096, 1024, (0,))))
    return Service("demo", client, template, 0)


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
        service(template).encode_chat(MESSAGES, True, {})
    assert (caught.value.status, caught.value.param) == (400, "messages")


def test_a_checkpoint_without_a_template():
    with pytest.raises(ApiError, match="give a prompt instead") as caught:
        service("it has no template: give a prompt instead of messages").encode_chat(MESSAGES, True, {})
    assert (caught.value.status, caught.value.code) == (400, "no_chat_template")
