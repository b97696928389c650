import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxinfer.checkpoint import load
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.text import ChatTemplate, Tokenizer
from jaxinfer.training import demo
from jaxinfer.training.train import DenseRows, Recipe

RECIPE = Recipe(steps=30, batch=4, row=16, learning_rate=1e-2, report=15)


@pytest.fixture(scope="module")
def checkpoint(compiled_once, library_root, tmp_path_factory, sizes):
    """The three commands, in miniature, with shards so small that there are several."""
    root = tmp_path_factory.mktemp("demo")
    work, output = root / "work", root / "output"
    demo.prepare(work, library_root, vocab_size=sizes["vocab_size"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "SHARD_BYTES", 25_000)
        demo.fit(work, RECIPE, sizes)
    demo.export(work, output)
    return output


def read_tensors(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for name in sorted(set(index["weight_map"].values())):
        shard = load_file(folder / name)
        assert all(index["weight_map"][tensor] == name for tensor in shard)
        assert sum(array.nbytes for array in shard.values()) <= 25_000
        tensors |= shard
    assert set(tensors) == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors.values())
    return {name: array.astype(np.float32) for name, array in tensors.items()}


def llama(tensors, config, tokens_T):
    """A Llama by its paper and by Hugging Face's names, one head at a time: logits [T, V]."""
    size, heads = config["head_dim"], config["num_attention_heads"]
    angles = np.arange(len(tokens_T))[:, None] / config["rope_theta"] ** (np.arange(0, size, 2) / size)[None, :]
    cos, sin = np.cos(angles), np.sin(angles)

    def norm(x, name):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"]) * tensors[name][None, :]

    def turn(x):
        a, b = x[:, : size // 2], x[:, size // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)

    x = tensors["model.embed_tokens.weight"][tokens_T]
    for layer in range(config["num_hidden_layers"]):
        w = {name: tensors[f"model.layers.{layer}.{name}.weight"] for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        )}  # fmt: skip
        y, out = norm(x, f"model.layers.{layer}.input_layernorm.weight"), []
        for head in range(heads):
            group = head * config["num_key_value_heads"] // heads
            q = turn(y @ w["self_attn.q_proj"][head * size : (head + 1) * size].T)
            k = turn(y @ w["self_attn.k_proj"][group * size : (group + 1) * size].T)
            v = y @ w["self_attn.v_proj"][group * size : (group + 1) * size].T
            scores = np.where(np.tri(len(q), dtype=bool), q @ k.T / np.sqrt(size), -np.inf)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out.append(weights / weights.sum(1, keepdims=True) @ v)
        x = x + np.concatenate(out, axis=1) @ w["self_attn.o_proj"].T
        y = norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
        gate = y @ w["mlp.gate_proj"].T
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
    return norm(x, "model.norm.weight") @ tensors["model.embed_tokens.weight"].T


def test_the_checkpoint_is_whole_and_its_text_stays_behind(checkpoint):
    names = {path.name for path in checkpoint.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    assert len(shards) > 1
    assert names - shards == {
        "README.md", "config.json", "generation_config.json", "loss.png", "model.safetensors.index.json",
        "tokenizer.json", "tokenizer_config.json", "training_log.json",
    }  # fmt: skip
    log = json.loads((checkpoint / "training_log.json").read_text())
    card = (checkpoint / "README.md").read_text()
    assert f"{log['reports'][-1]['held_out_per_byte']:.4f} nats" in card
    assert "`heapq.py`" in card
    assert "PSF" in card
    assert log["reports"][-1]["loss"] < log["reports"][0]["loss"]


def test_the_checkpoint_is_the_llama_that_was_trained(checkpoint):
    config, tensors = json.loads((checkpoint / "config.json").read_text()), read_tensors(checkpoint)
    log = json.loads((checkpoint / "training_log.json").read_text())
    assert sum(array.size for array in tensors.values()) == log["parameters"]
    tokenizer = Tokenizer.from_folder(checkpoint)
    text = "def add(a, b):\n    return a + b\n"
    tokens_T = np.asarray(tokenizer.encode(text)[:16])
    logits_TV = llama(tensors, config, tokens_T)
    log_softmax = logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))
    loss = -log_softmax[np.arange(len(tokens_T) - 1), tokens_T[1:]].mean()
    # Trained on little else than this text, the mean is far below a guess. A wrong tensor would not be.
    assert loss < 0.5 * np.log(config["vocab_size"])


def test_the_loader_reads_the_checkpoint_and_computes_that_llama(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    model = Model(read_config(checkpoint), make_mesh(), dtype="float32")
    params = model.params(load(checkpoint, model))
    tokens_BS = np.random.default_rng(1).integers(0, config["vocab_size"], (2, 16))

    @jax.jit
    def logits(params, tokens_BS):
        cache = (None,) * model.config.num_layers
        return model.logits(params, model.forward(params, DenseRows(tokens_BS), cache)[0])

    with jax.set_mesh(model.mesh):
        logits_TV = np.asarray(logits(params, jnp.asarray(tokens_BS, jnp.int32)))
    expected = np.concatenate([llama(read_tensors(checkpoint), config, row) for row in tokens_BS])
    # float32 at highest precision; the bound that every family is held to, on logits of unit variance
    np.testing.assert_allclose(logits_TV, expected, atol=1e-4 * expected.std())


def test_the_tokenizer_begins_a_prompt_as_a_document_begins(checkpoint):
    tokenizer = Tokenizer.from_folder(checkpoint)
    end = json.loads((checkpoint / "config.json").read_text())["eos_token_id"]
    assert tokenizer.eos_ids == {end}
    assert tokenizer.encode("x = 1")[0] == end
    assert tokenizer.decode(tokenizer.encode("für 🐍\n")) == "für 🐍\n"
    chat = [{"role": "user", "content": "add\ntwo"}, {"role": "assistant", "content": "a + b"}]
    assert ChatTemplate.from_folder(checkpoint).render(chat) == "<|endoftext|># add\n# two\na + b\n"


def test_without_matplotlib_nothing_is_trained_or_written(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(demo, "prepare", started.append)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for call in (demo.train_demo, lambda output: demo.export(tmp_path / "work", output)):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxinfer\[plots\]'"):
            call(tmp_path / "output")
    assert not started
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("held", ["a file in it", "a file in its place"])
def test_what_the_output_holds_is_found_before_anything_is_computed(tmp_path, monkeypatch, held):
    started = []
    monkeypatch.setattr(demo, "prepare", started.append)
    output = tmp_path / "output"
    if held == "a file in it":
        output.mkdir()
    kept = output if held == "a file in its place" else output / "config.json"
    kept.write_text("mine")
    with pytest.raises(ValueError, match=rf"{output} is .*; it must be absent or an empty folder"):
        demo.train_demo(output)
    assert not started
    assert kept.read_text() == "mine"


@pytest.mark.parametrize("exists", [False, True])
def test_an_absent_or_empty_output_is_trained_into(tmp_path, monkeypatch, exists):
    calls = []
    for step in ("prepare", "fit", "export"):
        monkeypatch.setattr(demo, step, lambda *arguments, step=step: calls.append(step))
    if exists:
        (tmp_path / "output").mkdir()
    demo.train_demo(tmp_path / "output")
    assert calls == ["prepare", "fit", "export"]
