"""How a server begins and ends: keys, TLS, ports, deadlines, and an engine process that dies."""

import json
import os
import re
import signal
import socket
import ssl
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jaxinfer.cli import app
from jaxinfer.serve import devices, server
from jaxinfer.serve.processes import StartError
from jaxinfer.serve.server import bind, listen
from tests.engine.tiny import ONE_LAYER, write_checkpoint
from tests.serve.running import serving
from tests.serve.stub_replica import LINGERS, served_by

PEM = Path(__file__).parent / "localhost.pem"  # a key that is no secret, and its certificate
KEY = "a key"
GRACE = 0.5  # seconds, where a test need not wait longer
CONTEXT = 8192  # tokens that take longer than all else in a test
LONG = {"prompt": "a", "max_tokens": CONTEXT - 2, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory):
    """A model of one layer and a long context."""
    config = ONE_LAYER | {"max_position_embeddings": CONTEXT}
    return str(write_checkpoint(tmp_path_factory.mktemp("long") / "model", config))


def maps(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


def data(event: bytes):
    """What an event says."""
    return json.loads(event.strip().removeprefix(b"data: "))


def test_a_server_with_a_key_and_tls_and_the_death_of_its_engine(long_folder):
    context = ssl.create_default_context(cafile=PEM)
    options = {"api_key": KEY, "ssl_certfile": PEM, "ssl_keyfile": PEM, "served_model_name": "tiny"}
    with serving(long_folder, **options, context=context, steps_per_dispatch=1) as server:
        assert server.url.startswith("https://127.0.0.1:")
        for wrong in (
            {},
            {"authorization": "Bearer a kez"},
            {"authorization": f"Basic {KEY}"},
            {"authorization": "é"},
        ):
            for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
                status, answer = server.post(path, {"prompt": "a"}, **wrong)
                assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
            assert server.ask("GET", "/v1/models", **wrong)[0] == 401
            assert server.ask("GET", "/metrics", **wrong)[0] == 401
        assert server.ask("GET", "/health")[0] == 200
        status, _, models = server.ask("GET", "/v1/models", authorization=f"Bearer {KEY}")
        assert (status, [model["id"] for model in json.loads(models)["data"]]) == (200, ["tiny"])

        (engine,) = server.engines
        assert "jaxlib" in maps(engine)
        assert "jaxlib" not in maps(server.process.pid)

        connection, response, first = server.begin(LONG, authorization=f"Bearer {KEY}")
        assert data(first)["choices"][0]["finish_reason"] is None
        os.kill(engine, signal.SIGKILL)
        *_, error, done, _ = response.read().split(b"\n\n")
        connection.close()
        assert "the engine failed while the request ran" in data(error)["error"]["message"]
        assert done == b"data: [DONE]"
        assert server.wait() == 1
    assert "error: the engine process was ended by SIGKILL" in "".join(server.said)


def test_the_event_loop_does_not_wait_for_a_process_that_ends():
    with serving(code=served_by("lingering")) as server:
        assert server.ask("GET", "/health")[0] == 200
        asking = threading.Thread(target=server.post, args=("/v1/completions", {"prompt": "a"}))
        asking.start()
        asked, answers, slowest = time.monotonic(), 0, 0.0
        while time.monotonic() < asked + LINGERS - 1:
            begun = time.monotonic()
            assert server.ask("GET", "/health")[0] == 200
            slowest, answers = max(slowest, time.monotonic() - begun), answers + 1
        assert (answers > 3, slowest < LINGERS / 2) == (True, True)
        asking.join()
        assert server.wait() == 1
    assert "error: the engine process ended with exit code 0; its log above says why" in "".join(server.said)


SLOW = (
    f"processes.GRACE = {GRACE}; import sys, time; from jaxinfer.structured import Grammars; "
    "Grammars.problem = lambda *given: print('reading', file=sys.stderr, flush=True) or time.sleep(600)"
)


def test_a_grammar_that_takes_long_does_not_hold_up_the_end():
    with serving(code=served_by("main", SLOW), shutdown_timeout=0) as server:
        body = json.dumps({"prompt": "a", "structured_outputs": {"regex": "a"}})
        asking = server.connect()
        asking.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        while "reading\n" not in server.said:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        asking.close()


def test_a_request_that_outlasts_the_deadline_is_told_so(long_folder):
    with serving(long_folder, shutdown_timeout=0, steps_per_dispatch=1) as server:
        connection, response, _ = server.begin(LONG, authorization=f"Bearer {KEY}")
        server.process.send_signal(signal.SIGTERM)
        *_, error, _, _ = response.read().split(b"\n\n")
        connection.close()
        assert "the server was shut down before" in data(error)["error"]["message"]
        assert server.wait() == 0
        assert any("stopping: what runs has 0 s to end" in line for line in server.said)


def run(*arguments: str):
    result = CliRunner().invoke(app, ["serve", *arguments], env={"COLUMNS": "300", "TERM": "dumb", "NO_COLOR": "1"})
    assert "Traceback" not in result.output
    return result.exit_code, " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, said = run("--port", str(port))
    assert code == 2
    assert f"cannot listen on port {port} of 127.0.0.1: Address already in use" in said


def test_of_two_servers_that_start_on_one_port_the_later_says_so():
    """The system lets both bind it while their models load."""
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with bind("127.0.0.1", port) as second:
            listen(first)
            with pytest.raises(StartError, match=f"cannot listen on port {port} of 127.0.0.1: Address already"):
                listen(second)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "256.0.0.1"], "cannot listen on port 8000 of 256.0.0.1"),
        (["--port", "70000"], "Invalid value for '--port': 70000 must be an integer in 0..65535"),
        (["--data-parallel-size", "0"], "Invalid value for '--data-parallel-size': 0 must be an integer, at least 1"),
        (["--shutdown-timeout", "nan"], "Invalid value for '--shutdown-timeout': nan must be a number, at least 0"),
        (["--api-key", ""], "api_key is empty"),
        (["--api-key", "schlüssel"], "api_key must be printable ASCII"),
        (["--api-key", "a\nb"], "api_key must be printable ASCII"),
        (["--api-key", "ab "], "api_key must be printable ASCII"),
        (["--ssl-certfile", str(PEM)], "ssl_certfile and ssl_keyfile belong together"),
        (["--ssl-certfile", "no.pem", "--ssl-keyfile", "no.pem"], "cannot use no.pem with no.pem: "),
        (["no-such-model", "--port", "0"], "no-such-model"),
    ],
)
def test_bad_options_are_one_sentence(arguments, message):
    code, said = run(*arguments)
    assert code == 2
    assert message in said


def test_replicas_are_alike_but_for_their_gpus(monkeypatch):
    asked = []
    monkeypatch.setattr(devices, "visible_gpus", lambda: ["0", "1", "2", "3", "4"])
    monkeypatch.setattr(server, "run", lambda setups, *others: asked.extend(setups) or 0)
    assert run("--data-parallel-size", "2", "--tensor-parallel-size", "2", "--port", "0")[0] == 0
    assert [setup.devices for setup in asked] == ["0,1", "2,3"]
    assert replace(asked[0], devices="2,3") == asked[1]


def test_more_replicas_than_there_are_gpus_for_are_refused_before_anything_starts(monkeypatch):
    monkeypatch.setattr(devices, "visible_gpus", lambda: ["0", "1", "2"])
    monkeypatch.setattr(server, "run", None)
    code, said = run("--data-parallel-size", "2", "--tensor-parallel-size", "2", "--port", "0")
    assert code == 2
    sizes = "--data-parallel-size = 2 replicas with --tensor-parallel-size = 2"
    assert f"{sizes} need 4 GPUs, and there are 3; replicas that would fit: 1" in said


def test_the_extra_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "jaxinfer.serve.server", raising=False)
    code, said = run()
    assert (code, "pip install 'jaxinfer[serve]'" in said) == (2, True)
