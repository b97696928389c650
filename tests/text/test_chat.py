import json
from datetime import datetime

import pytest

from jaxinfer.text import ChatTemplate

CHATML = """{{ bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('unknown role ' + message.role) }}
    {%- endif %}
    {{- '<' + message.role + '>' + message.content | trim + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " Hi 🦊 "}]


@pytest.fixture
def template(tmp_path):
    def write(source, **config):
        config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}} | config
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": source}))
        return ChatTemplate.from_folder(tmp_path)

    return write


def test_messages_become_a_prompt(template):
    chat = template(CHATML)
    text = "<s><system>Be brief.\n<user>Hi 🦊\n"
    assert chat.render(MESSAGES) == text + "<assistant>"
    assert chat.render(MESSAGES, add_generation_prompt=False) == text


def test_the_jinja_file_decides_and_of_several_the_default(template, tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert template(named).render(MESSAGES) == "plain"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.from_folder(tmp_path).render(MESSAGES) == "file"


def test_blocks_leave_no_whitespace_and_loops_can_break(template):
    lines = ["{% for m in messages %}", "  {% if loop.index > 1 %}", "  {% break %}", "  {% endif %}"]
    source = "\n".join([*lines, "{{ m.role }}", "{% endfor %}"])
    assert template(source).render(MESSAGES) == "system\n"


def test_functions_and_variables_of_the_template_language(template):
    chat = template("{{ eos_token }}|{{ x | tojson }}|{{ strftime_now('%Y') }}|{{ tools is none }}")
    years = {datetime.now().year}
    text = chat.render(MESSAGES, x={"a": "<é>"})
    years |= {datetime.now().year}
    assert text in {f'</s>|{{"a": "<é>"}}|{year}|True' for year in years}


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append.__globals__ }}{{ messages.__init__.__globals__['x'] }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'root'}) }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_template_cannot_leave_the_sandbox(template, attack):
    chat, messages = template(attack), [dict(message) for message in MESSAGES]
    with pytest.raises(ValueError, match="chat_template"):
        chat.render(messages)
    assert messages == MESSAGES


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ 'a' * 10**10 }}", r"'\*' makes 10000000000 characters or items; at most 100000"),
        ("{{ 10**10 * 'ab' }}", r"'\*' makes 20000000000 characters or items"),
        ("{{ ([1, 2] * 50001) | length }}", r"'\*' makes 100002 characters or items"),
        ("{{ (9 ** (9 ** 9)) > 1 }}", r"'\*\*' makes \d+ bits of an integer"),
        ("{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", r"bits of"),
    ],
)
def test_what_an_operator_makes_is_bounded(template, source, words):
    with pytest.raises(ValueError, match=f"chat_template cannot render these messages: .*{words}"):
        template(source).render(MESSAGES)


def test_what_templates_multiply_is_computed(template):
    source = "{{ '=' * 3 }}{{ 3 * '-' }}{{ '=' * -1 }}{{ 6 * 7 }}{{ 2 ** 10 }}{{ 0.5 * 3 }}{{ 2 ** -1 }}{{ 2.0 ** 3 }}"
    assert template(source).render(MESSAGES) == "===---4210241.50.58.0"


def test_refusal_of_the_template_is_told(template):
    with pytest.raises(ValueError, match="unknown role root"):
        template(CHATML).render([{"role": "root", "content": ""}])


def test_without_a_template_the_error_says_so(tmp_path, template):
    with pytest.raises(ValueError, match=f"{tmp_path} has no chat template"):
        ChatTemplate.from_folder(tmp_path)
    with pytest.raises(ValueError, match="has no chat template"):
        template(None)


def test_a_template_that_is_no_text_names_its_file(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ messages }}\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not valid UTF-8: "):
        ChatTemplate.from_folder(tmp_path)


def test_invalid_template_is_told_with_its_line(template):
    with pytest.raises(ValueError, match="line 2"):
        template("\n{% if %}")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ([{"name": "x"}], r"chat_template\[0\] is {'name': 'x'}; .*name and template are strings"),
        ([{"name": "default", "template": "x"}, 5], r"chat_template\[1\] is 5; .*name and template"),
        ([{"name": ["x"], "template": "x"}], r"chat_template\[0\] is .*name and template"),
        (
            [{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "y"}],
            "chat_template names 'tool_use', 'rag'; one of its templates must be named 'default'",
        ),
        ([], "chat_template names none at all; one of its templates must be named 'default'"),
        (5, "chat_template is 5; it must be a string, null, or a list"),
        ({"default": "x"}, "chat_template is {'default': 'x'}; it must be a string, null, or a list"),
    ],
)
def test_malformed_template_names_its_file_and_field(template, source, words):
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {words}"):
        template(source)


@pytest.mark.parametrize("value", [{"x": 1}, {"content": 3}, 5, ["<s>"], True])
def test_malformed_special_token_names_its_file_and_field(template, value):
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: bos_token is .* must be a string, null, or an obj"):
        template(CHATML, bos_token=value)


def test_a_flag_named_like_a_token_is_none(template):
    assert template("{{ use_eot_token is defined }}", use_eot_token=True).render(MESSAGES) == "False"


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("hello", "messages"),
        ({"role": "user", "content": ""}, "messages"),
        (["hello"], r"messages\[0\]"),
        ([{"role": "user"}], r"messages\[0\]\.content is missing"),
        ([MESSAGES[0], {"content": "x"}], r"messages\[1\]\.role is missing"),
        ([{"role": "", "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": 3, "content": "x"}], r"messages\[0\]\.role must be a string, got int"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content must be a string"),
        ([{"role": "user", "content": "a\udfff"}], r"messages\[0\]\.content .*position 1"),
    ],
)
def test_malformed_message_names_its_field(template, messages, field):
    with pytest.raises(ValueError, match=field):
        template(CHATML).render(messages)
