"""Servers that a benchmark starts, and how long they take to be ready; of scripts in the place of `jaxinfer serve`."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import checkpoint
from benchmarks.serving import __main__ as command
from benchmarks.serving import ready, server
from benchmarks.tables import TABLES
from jaxinfer.engine import Warmed, WarmUp
from jaxinfer.llm import LLM
from jaxinfer.serve.messages import Loading

WAITS = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))
print(sys.argv[1:], os.environ.get("COLOR"), os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE"), file=sys.stderr)
print("serving demo at http://127.0.0.1:1", file=sys.stderr, flush=True)
signal.pause()
"""


def stands_for_a_server(monkeypatch, script: str) -> None:
    monkeypatch.setattr(server, "COMMAND", (sys.executable, "-c", script))


def test_a_server_has_the_device_and_what_it_is_given(monkeypatch):
    stands_for_a_server(monkeypatch, WAITS.format(code=0))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    server.leave_the_device()
    assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    with server.serving("a folder", "--page-size=8", COLOR="red") as found:
        assert found.url == "http://127.0.0.1:1"
        assert found.said[0] == "['a folder', '--page-size=8'] red None\n"
        assert found.seconds > 0
        assert found.process.poll() is None
    assert found.process.poll() == 0


def test_a_server_that_does_not_start_or_end_well_says_so(monkeypatch):
    stands_for_a_server(monkeypatch, "import sys; sys.exit('no such model')")
    with pytest.raises(RuntimeError, match=r"did not start: exit code 1\nno such model"), server.serving():
        pass
    stands_for_a_server(monkeypatch, WAITS.format(code=3))
    with pytest.raises(RuntimeError, match="ended with exit code 3"), server.serving():
        pass


def starts(monkeypatch, *found: int) -> list[Path]:
    """Servers whose starts find so many of their 5 programs; where each keeps what it compiled."""
    folders, left = [], list(found)

    @contextmanager
    def serving(*arguments, **variables):
        folders.append(Path(variables["JAX_COMPILATION_CACHE_DIR"]))
        assert arguments == ("a folder", "--page-size=8")
        assert folders[-1].is_dir()
        warm_up = WarmUp((Warmed("a program", 2.5, 3.0, 5, left.pop(0)),), 20.0, 7)
        said = f"a warning\n{Loading(3.0, 1.5, 4.0)}\n", f"{warm_up}\n", "serving demo at http://127.0.0.1:1\n"
        yield SimpleNamespace(said=said, seconds=30.0)

    monkeypatch.setattr(ready, "serving", serving)
    return folders


def test_two_starts_and_their_parts(monkeypatch):
    folders = starts(monkeypatch, 0, 5)
    records = ready.measure("llama-3-8b", Path("a folder"), ["--page-size=8"])
    assert folders[0] == folders[1]
    assert not folders[0].exists()
    found = {(record.case, record.metric): record.value for record in records}
    first, second = ({what: value for (case, what), value in found.items() if case.endswith(f"{start} start")}
                     for start in ("first", "second"))  # fmt: skip
    assert first == {
        "ready": 30, "imports": 3, "device": 1.5, "weights and cache": 4, "warm-up": 20, "lowering": 2.5,
        "HTTP process": 1.5, "programs": 5, "programs compiled": 5, "kernels": 7,
    }  # fmt: skip
    assert second == first | {"programs compiled": 0}
    assert set(TABLES["ready"].places()) <= found.keys()


def test_a_second_start_that_compiles_is_an_error(monkeypatch):
    starts(monkeypatch, 0, 4)
    with pytest.raises(RuntimeError, match="the second start compiled 1 of 5 programs"):
        ready.measure("llama-3-8b", Path("a folder"), ["--page-size=8"])


def test_a_server_is_started_with_the_options_of_the_engine(monkeypatch):
    seen = []
    monkeypatch.setattr(ready, "measure", lambda *given: seen.append(given))
    options = command.parse(["ready", "FOLDER", "--model", "m", "--num-pages", "9"])
    list(command.measure_ready(options))
    (name, folder, arguments) = seen[0]
    assert (name, folder) == ("m", Path("FOLDER"))
    assert arguments == [
        "--max-num-seqs=256", "--max-num-batched-tokens=8192", "--page-size=64", "--num-pages=9",
        "--steps-per-dispatch=8", "--max-slowdown=1.75", "--tensor-parallel-size=1", "--pipeline-parallel-size=1",
        "--context-parallel-size=1",
    ]  # fmt: skip
    assert command.engine_options(options).num_pages == 9


def test_a_checkpoint_of_random_weights_can_be_served(tmp_path):
    """Of a model that knows more tokens than the demo's tokenizer."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(
        '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 9000, "hidden_size": 16,'
        '"intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,'
        '"head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": false, "torch_dtype": "bfloat16"}'
    )
    checkpoint.write(source, tmp_path / "made")
    llm = LLM(tmp_path / "made")
    assert llm.intake.limits.vocab_size == 9000
    assert llm.tokenizer.encode("def f():") == LLM().tokenizer.encode("def f():")
    assert all(llm.tokenizer.decode([token]).strip() for token in range(4096, 9000))  # who draws one, streams it
    with pytest.raises(ValueError, match="made"):
        checkpoint.write(source, tmp_path / "made")
