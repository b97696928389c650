"""What cannot be served gets an error body in OpenAI's form, which names the field."""

import http.client
import json
import socket

import openai
import pytest

from tests.serve.bad_bodies import BAD
from tests.serve.running import COMPLETION


@pytest.mark.parametrize("name", BAD)
def test_bad_input(server, name):
    path, body, status, param, words = BAD[name]
    found, answer = server.post(path, body)
    assert list(answer) == ["error"]
    assert sorted(answer["error"]) == ["code", "message", "param", "type"]
    assert words in answer["error"]["message"]
    assert (found, answer["error"]["type"]) == (status, "invalid_request_error")
    if param is not None:
        assert answer["error"]["param"] == param
    assert len(answer["error"]["message"]) < 1000
    assert "Traceback" not in answer["error"]["message"]


@pytest.mark.parametrize("sent", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\na b: c\r\n\r\n"])
def test_what_is_no_http(server, sent):
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(sent)
        response = http.client.HTTPResponse(connection)
        response.begin()
        error = json.load(response)["error"]
    assert (response.status, response.headers["Content-Type"]) == (400, "application/json")
    assert error == {
        "message": "Invalid HTTP request received.",
        "type": "invalid_request_error",
        "param": None,
        "code": "invalid_http",
    }


def test_a_body_of_another_type(server):
    status, answer = server.post(COMPLETION, {"prompt": "a"}, content_type="text/plain")
    assert status == 415
    assert "'text/plain'; it must be application/json" in answer["error"]["message"]


def test_the_client_raises_what_the_server_says(client):
    with pytest.raises(openai.NotFoundError, match="'gpt' does not exist here"):
        client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError, match="max_tokens = 0 must be") as caught:
        client.completions.create(model="demo", prompt="a", max_tokens=0, stream=True)
    assert caught.value.param == "max_tokens"
