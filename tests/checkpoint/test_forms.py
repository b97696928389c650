"""Every form against its definition, element by element: the index of an entry in ours and in the published tensor."""

import numpy as np
import pytest

from jaxinfer.checkpoint import forms, slots
from jaxinfer.model import read_config
from tests.golden.load import load

D, F, E = 5, 7, 3
SIZES = forms.Sizes.of(read_config(load("llama3").config))
N, K, H = SIZES.num_heads, SIZES.num_kv_heads, SIZES.head_size
G = N // K


def tensors(*shapes):
    """Arrays of distinct numbers, on the host: nothing is compiled to look into them."""
    sizes = [int(np.prod(shape)) for shape in shapes]
    starts = np.cumsum([0, *sizes])
    return [
        np.arange(start, start + size, dtype=np.int32).reshape(shape)
        for start, size, shape in zip(starts, sizes, shapes, strict=False)
    ]


def head(q, k, v, slot, entry, component):
    """The published row of an entry of a KV head: one of its queries, its key or its value."""
    if entry < G:
        return q[(slot * G + entry) * H + component]
    return (k if entry == G else v)[slot * H + component]


def test_separate_and_fused_projections_hold_queries_then_key_then_value_of_each_kv_head():
    q, k, v = tensors((N * H, D), (K * H, D), (K * H, D))
    qkv_DKgH = forms.QKV.join(SIZES, q, k, v)
    expected = np.stack([[[head(q, k, v, s, g, h) for h in range(H)] for g in range(G + 2)] for s in range(K)])
    np.testing.assert_array_equal(qkv_DKgH, expected.transpose(3, 0, 1, 2))
    np.testing.assert_array_equal(forms.FUSED_QKV.join(SIZES, np.concatenate([q, k, v])), qkv_DKgH)


def test_biases_follow_the_projections():
    q, k, v = tensors((N * H,), (K * H,), (K * H,))
    expected = [[[head(q, k, v, s, g, h) for h in range(H)] for g in range(G + 2)] for s in range(K)]
    np.testing.assert_array_equal(forms.QKV_BIAS.join(SIZES, q, k, v), expected)


def test_norm_scales_and_sinks_follow_the_heads():
    scale_M, keys, sinks_N = tensors((N * H,), (K * H,), (N,))
    scale_KgH, keys_KgH = forms.QUERY_SCALE.join(SIZES, scale_M), forms.KEY_SCALE.join(SIZES, keys)
    sinks_Kg = forms.SINKS.join(SIZES, sinks_N)
    for slot in range(K):
        np.testing.assert_array_equal(keys_KgH[slot, 0], keys[slot * H : (slot + 1) * H])
        for query in range(G):
            first = (slot * G + query) * H
            np.testing.assert_array_equal(scale_KgH[slot, query], scale_M[first : first + H])
            assert sinks_Kg[slot, query] == sinks_N[slot * G + query]


def test_up_projections_hold_gate_then_up():
    gate, up = tensors((F, D), (F, D))
    up_DcF = forms.UP.join(SIZES, gate, up)
    np.testing.assert_array_equal(up_DcF[:, 0], gate.T)
    np.testing.assert_array_equal(up_DcF[:, 1], up.T)
    np.testing.assert_array_equal(forms.FUSED_UP.join(SIZES, np.concatenate([gate, up])), up_DcF)
    np.testing.assert_array_equal(forms.UP_BIAS.join(SIZES, gate[:, 0], up[:, 0]), up_DcF[0])


def test_experts_are_stacked_in_order():
    tables = tensors(*[(F, D)] * (2 * E))
    up_EDcF = forms.EXPERTS_UP.join(SIZES, *tables)
    down_EFD = forms.EXPERTS_DOWN.join(SIZES, *(table.T for table in tables[:E]))
    for expert in range(E):
        np.testing.assert_array_equal(up_EDcF[expert, :, 0], tables[2 * expert].T)
        np.testing.assert_array_equal(up_EDcF[expert, :, 1], tables[2 * expert + 1].T)
        np.testing.assert_array_equal(down_EFD[expert], tables[expert])


def test_interleaved_experts_alternate_gate_and_up():
    (up,) = tensors((E, D, 2 * F))
    up_EDcF = forms.INTERLEAVED_UP.join(SIZES, up)
    np.testing.assert_array_equal(up_EDcF[:, :, 0], up[..., ::2])
    np.testing.assert_array_equal(up_EDcF[:, :, 1], up[..., 1::2])


@pytest.mark.parametrize("times", [1, 2, 4])
def test_slots_repeat_kv_heads_and_divide_their_queries_in_order(times):
    queries, kv_heads = 4, 2
    (qkv_DKgH,) = tensors((D, kv_heads, queries + 2, H))
    spread = slots.spread("layers.0.attention.qkv_DKgH", qkv_DKgH, times)
    share = queries // times
    assert spread.shape == (D, kv_heads * times, share + 2, H)
    for slot in range(kv_heads * times):
        kv_head, part = divmod(slot, times)
        mine = qkv_DKgH[:, kv_head, part * share : (part + 1) * share]
        np.testing.assert_array_equal(spread[:, slot, :share], mine)
        np.testing.assert_array_equal(spread[:, slot, share:], qkv_DKgH[:, kv_head, queries:])
    np.testing.assert_array_equal(slots.gather("layers.0.attention.qkv_DKgH", spread, times), qkv_DKgH)


FORMS = {name: form for name, form in vars(forms).items() if isinstance(form, forms.Form)}
PARAMETERS = {
    "SAME": (F, D), "TRANSPOSED": (F, D), "QKV": (D, K, G + 2, H), "QKV_BIAS": (K, G + 2, H),
    "FUSED_QKV": (D, K, G + 2, H), "QUERY_SCALE": (K, G, H), "KEY_SCALE": (K, 1, H), "SINKS": (K, G),
    "UP": (D, 2, F), "FUSED_UP": (D, 2, F), "UP_BIAS": (2, F), "EXPERTS_UP": (E, D, 2, F),
    "EXPERTS_DOWN": (E, F, D), "INTERLEAVED_UP": (E, D, 2, F),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_join_and_split_are_inverse(name):
    (parameter,) = tensors(PARAMETERS[name])
    form = FORMS[name]
    published = form.split(SIZES, parameter)
    np.testing.assert_array_equal(form.join(SIZES, *published), parameter)
