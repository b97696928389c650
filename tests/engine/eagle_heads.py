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


def nearly_right_third(hidden: int, rest: float, embedded_VD: np.ndarray, follows_V: np.ndarray, tokens_V: np.ndarray):
    """One of EAGLE-3 for such a model, with the output matrix of some of its tokens: each token sees itself most of
    all, and what that brings to the feature says what follows."""
    tensors = nearly_right(hidden, rest)
    rng, empty = np.random.default_rng(1), np.zeros((1, hidden), np.float32)
    seen = {name: rng.normal(size=(KV_HEADS * SIZE, hidden)) * hidden**-0.5 for name in "kv"}
    seen["k"] *= 3
    seen["q"] = np.repeat(seen["k"].reshape(KV_HEADS, SIZE, -1), HEADS // KV_HEADS, axis=0).reshape(HEADS * SIZE, -1)
    found = {name.replace("layers.0", "midlayer"): tensor for name, tensor in tensors.items() if "layers" in name}
    for name, own in seen.items():
        features = rest * rng.normal(size=own.shape) * hidden**-0.5
        found[f"midlayer.self_attn.{name}_proj.weight"] = np.concatenate([own, features], axis=1).astype(np.float32)
    o_DM = (rng.normal(size=(hidden, HEADS * SIZE)) * SIZE**-0.5).astype(np.float32)
    normed_VD = embedded_VD / np.sqrt((embedded_VD**2).mean(axis=1, keepdims=True) + EPS)
    values_VKH = (normed_VD @ seen["v"].T).reshape(len(embedded_VD), KV_HEADS, SIZE)
    brought_VD = np.repeat(values_VKH, HEADS // KV_HEADS, axis=1).reshape(len(embedded_VD), -1) @ o_DM.T
    output_VD = np.zeros_like(embedded_VD)
    output_VD[follows_V] = 2 * brought_VD / np.linalg.norm(brought_VD, axis=1, keepdims=True)
    noise = lambda: (1 + rest * rng.normal(size=hidden)).astype(np.float32)  # noqa: E731
    return found | {
        "fc.weight": (rest * rng.normal(size=(hidden, 3 * hidden)) * hidden**-0.5).astype(np.float32),
        "midlayer.self_attn.o_proj.weight": o_DM,
        "midlayer.input_layernorm.weight": np.ones_like(empty[0]),
        "midlayer.hidden_norm.weight": noise(),
        "norm.weight": noise(),
        "lm_head.weight": output_VD[tokens_V].astype(np.float32),
        "d2t": tokens_V - np.arange(len(tokens_V)),
        "t2d": np.isin(np.arange(len(embedded_VD)), tokens_V),
    }


def write_head(folder: Path, tensors: dict[str, np.ndarray], vocab: int, **fields) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    hidden = tensors["fc.weight"].shape[0]
    (folder / "config.json").write_text(json.dumps(config(hidden, vocab) | fields))
    save_file(tensors, folder / "model.safetensors")
    return folder


def features(tensors: dict[str, np.ndarray], shown_TE: np.ndarray) -> np.ndarray:
    """The model's, of what a head is shown of it."""
    return shown_TE @ tensors["fc.weight"].T if "norm.weight" in tensors else shown_TE


def ranked(tensors: dict[str, np.ndarray], feature_D: np.ndarray, head_VD: np.ndarray) -> list[tuple[int, float]]:
    """All tokens that may be proposed after a feature, with their log-probabilities, the likeliest first.

    Args:
        head_VD: the model's output matrix.
    """
    if "norm.weight" not in tensors:
        logits_V, ids_V = head_VD @ feature_D, np.arange(len(head_VD))
    else:
        logits_V = tensors["lm_head.weight"] @ _normed(feature_D, tensors["norm.weight"])
        ids_V = np.arange(len(logits_V)) + tensors["d2t"]
    logprobs_V = logits_V - np.logaddexp.reduce(logits_V)
    return [(int(ids_V[place]), float(logprobs_V[place])) for place in np.argsort(-logits_V, kind="stable")]


def _normed(x: np.ndarray, scale_D: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * scale_D


def by_hand(
    tensors: dict[str, np.ndarray], embedded_TD: np.ndarray, features_TD: np.ndarray, window: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What the head expects of a text, of each token's embedding and the feature before it; its keys, [T, K, H].

    Args:
        window: tokens that one sees, itself included; None sees all.
    """
    layer = {
        name.removeprefix("layers.0.").removeprefix("midlayer.").removesuffix(".weight"): tensor
        for name, tensor in tensors.items()
    }
    if "hidden_norm" in layer:
        normed = _normed(embedded_TD, layer["input_layernorm"]), _normed(features_TD, layer["hidden_norm"])
        x_TD, read_TE = features_TD, np.concatenate(normed, axis=1)
    else:
        read_TE = np.concatenate([embedded_TD, features_TD], axis=1) @ tensors["fc.weight"].T + tensors["fc.bias"]
        x_TD = read_TE
    q_TNH, k_TKH, v_TKH = ((read_TE @ layer[f"self_attn.{one}_proj"].T).reshape(len(x_TD), -1, SIZE) for one in "qkv")
    q_TNH, k_TKH = _rotated(q_TNH), _rotated(k_TKH)
    keys_TNH, values_TNH = (np.repeat(one, HEADS // KV_HEADS, axis=1) for one in (k_TKH, v_TKH))
    scores_NTT = np.einsum("TNH,tNH->NTt", q_TNH, keys_TNH) * SIZE**-0.5
    seen_TT = np.tri(len(x_TD), dtype=bool) & ~np.tri(len(x_TD), k=-(window or len(x_TD)), dtype=bool)
    weights_NTT = np.exp(np.where(seen_TT, scores_NTT, -np.inf))
    weights_NTT /= weights_NTT.sum(axis=2, keepdims=True)
    x_TD = (
        x_TD + np.einsum("NTt,tNH->TNH", weights_NTT, values_TNH).reshape(len(x_TD), -1) @ layer["self_attn.o_proj"].T
    )
    y_TD = _normed(x_TD, layer["post_attention_layernorm"])
    gate_TF, up_TF = (y_TD @ layer[f"mlp.{one}_proj"].T for one in ("gate", "up"))
    return x_TD + (gate_TF / (1 + np.exp(-gate_TF)) * up_TF) @ layer["mlp.down_proj"].T, k_TKH


def _rotated(x_TXH: np.ndarray) -> np.ndarray:
    half = SIZE // 2
    angles_Tr = np.arange(len(x_TXH))[:, None] / THETA ** (np.arange(half) / half)
    cos, sin = np.cos(angles_Tr)[:, None], np.sin(angles_Tr)[:, None]
    low, high = x_TXH[..., :half], x_TXH[..., half:]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2)
