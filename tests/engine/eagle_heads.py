"""Draft heads in the published layout of EAGLE: written, and computed by hand in NumPy."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.engine.tiny import CONTEXT

HEADS, KV_HEADS, SIZE, INNER = 4, 2, 6, 40  # none of them the tiny model's
EPS, THETA = 1e-5, 500.0


def config(hidden: int, vocab: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "bias": True,
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": SIZE,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPS,
        "rope_theta": THETA,
        "torch_dtype": "float32",
    }


def nearly_right(hidden: int, rest: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Of a model whose features are its embeddings, nearly, which are of the length one: the head expects the token's
    own, as it is after a norm, and of `rest` the feature before it and the layer have a say."""
    rng = np.random.default_rng(seed)

    def random(*shape: int) -> np.ndarray:
        return (rng.normal(size=shape) * shape[-1] ** -0.5).astype(np.float32)

    fc_DE = rest * random(hidden, 2 * hidden)
    fc_DE[:, :hidden] += hidden**0.5 * np.eye(hidden, dtype=np.float32)
    layer = {
        "self_attn.q_proj": random(HEADS * SIZE, hidden),
        "self_attn.k_proj": random(KV_HEADS * SIZE, hidden),
        "self_attn.v_proj": random(KV_HEADS * SIZE, hidden),
        "self_attn.o_proj": rest * random(hidden, HEADS * SIZE),
        "mlp.gate_proj": random(INNER, hidden),
        "mlp.up_proj": random(INNER, hidden),
        "mlp.down_proj": rest * random(hidden, INNER),
        "post_attention_layernorm": 1 + random(hidden),
    }
    named = {f"layers.0.{name}.weight": tensor for name, tensor in layer.items()}
    return {"fc.weight": fc_DE, "fc.bias": rest * random(hidden)} | named


def write_head(folder: Path, tensors: dict[str, np.ndarray], vocab: int, **fields) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    hidden = tensors["fc.weight"].shape[0]
    (folder / "config.json").write_text(json.dumps(config(hidden, vocab) | fields))
    save_file(tensors, folder / "model.safetensors")
    return folder


def by_hand(
    tensors: dict[str, np.ndarray], embedded_TD: np.ndarray, features_TD: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """What the head expects of a text, of each token's embedding and the feature before it; its keys, [T, K, H]."""
    layer = {name.removeprefix("layers.0.").removesuffix(".weight"): tensor for name, tensor in tensors.items()}
    x_TD = np.concatenate([embedded_TD, features_TD], axis=1) @ tensors["fc.weight"].T + tensors["fc.bias"]
    q_TNH, k_TKH, v_TKH = ((x_TD @ layer[f"self_attn.{one}_proj"].T).reshape(len(x_TD), -1, SIZE) for one in "qkv")
    q_TNH, k_TKH = _rotated(q_TNH), _rotated(k_TKH)
    keys_TNH, values_TNH = (np.repeat(one, HEADS // KV_HEADS, axis=1) for one in (k_TKH, v_TKH))
    scores_NTT = np.einsum("TNH,tNH->NTt", q_TNH, keys_TNH) * SIZE**-0.5
    weights_NTT = np.exp(np.where(np.tri(len(x_TD), dtype=bool), scores_NTT, -np.inf))
    weights_NTT /= weights_NTT.sum(axis=2, keepdims=True)
    x_TD = (
        x_TD + np.einsum("NTt,tNH->TNH", weights_NTT, values_TNH).reshape(len(x_TD), -1) @ layer["self_attn.o_proj"].T
    )
    y_TD = x_TD / np.sqrt((x_TD**2).mean(axis=1, keepdims=True) + EPS) * layer["post_attention_layernorm"]
    gate_TF, up_TF = (y_TD @ layer[f"mlp.{one}_proj"].T for one in ("gate", "up"))
    return x_TD + (gate_TF / (1 + np.exp(-gate_TF)) * up_TF) @ layer["mlp.down_proj"].T, k_TKH


def _rotated(x_TXH: np.ndarray) -> np.ndarray:
    half = SIZE // 2
    angles_Tr = np.arange(len(x_TXH))[:, None] / THETA ** (np.arange(half) / half)
    cos, sin = np.cos(angles_Tr)[:, None], np.sin(angles_Tr)[:, None]
    low, high = x_TXH[..., :half], x_TXH[..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2)
