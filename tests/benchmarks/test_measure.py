"""What is made of one case: figures, disagreements, and failures with their reasons."""

import re
import sys
import threading
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from benchmarks.kernels import measure
from benchmarks.kernels.measure import Agreement, WrongResult, measure_case, start_case, to_records
from benchmarks.kernels.op import Run, Unsupported
from benchmarks.kernels.ops import OPS
from benchmarks.kernels.timing import Timing
from benchmarks.record import Failure
from pallas_kernels.flash_attention.problems import Problem as Prefill
from pallas_kernels.flash_decoding.problems import Problem as Decode
from pallas_kernels.models import Heads
from pallas_kernels.streaming_matmul.problems import Problem as Product
from pallas_kernels.streaming_matmul.problems import Row
from pallas_kernels.tiled_matmul.problems import Problem as LargeProduct
from tests.benchmarks.tiny import BENCH, MACHINE, TINY, arguments

DECODING = TINY["flash_decoding"]
pytestmark = pytest.mark.usefixtures("short_programs")


def measured(op, name: str, implementations: list[str]) -> list:
    return [*measure_case(start_case(op, name, implementations, BENCH), BENCH)]


def test_rates_and_fractions_follow_from_the_time():
    problem = SimpleNamespace(flops=4e12, bytes=2e9)
    time, arithmetic, traffic = to_records("a case", "ours", problem, Timing(8e-3, 7e-3, 10e-3, 10), MACHINE)
    assert (time.value, time.low, time.high, time.samples, time.unit) == (8000, 7000, 10000, 10, "us")
    assert (arithmetic.value, arithmetic.unit) == (pytest.approx(500), "TFLOP/s")
    assert (traffic.value, traffic.unit) == (pytest.approx(0.25), "TB/s")
    assert [record.roofline_fraction for record in (time, arithmetic, traffic)] == pytest.approx([500 / 746] * 3)


def test_a_case_bound_by_memory_is_held_against_the_bandwidth():
    problem = SimpleNamespace(flops=1e9, bytes=4.54e9)
    time, *_ = to_records("a case", "ours", problem, Timing(2e-3, 2e-3, 2e-3, 10), MACHINE)
    assert time.roofline_fraction == pytest.approx(0.5)


def broken(problem) -> Run:
    raise RuntimeError("no such card\nand a long trace")


def unsupported(problem) -> Run:
    raise Unsupported("takes no small cases")


def without_the_last_page(problem) -> Run:
    run = DECODING.implementations["xla"](problem)
    return Run(lambda arguments: run.call(arguments | {"lengths_B": arguments["lengths_B"] - 8}))


def not_a_number(problem) -> Run:
    return Run(lambda arguments: arguments["q_BQNH"] * jnp.nan)


def one_query(problem) -> Run:
    return Run(lambda arguments: arguments["q_BQNH"][:1])


def test_what_fails_is_kept_with_its_reason_and_ends_nothing():
    bad = {
        "cudnn": broken,
        "cudnn_paged": unsupported,
        "short": without_the_last_page,
        "nan": not_a_number,
        "shape": one_query,
    }
    op = replace(DECODING, implementations=DECODING.implementations | bad)
    outcomes = measured(op, "small 2x32", ["mosaic_gpu", *bad, "xla", "reference"])
    *figures, cudnn, paged, short, nan, shape, ours = outcomes
    assert [records[0].implementation for records in figures] == ["reference", "xla"]
    assert all(isinstance(outcome, Failure) for outcome in (cudnn, paged, short, nan, shape, ours))
    assert cudnn == Failure("flash_decoding small 2x32", "cudnn", "RuntimeError: no such card")
    assert paged.reason == "takes no small cases"
    assert short.reason.startswith("WrongResult: differs from reference by 0.")
    assert nan.reason == "WrongResult: differs from reference by nan of its size"
    assert shape.reason == "WrongResult: shape (1, 1, 4, 16) where that of reference is (2, 1, 4, 16)"
    assert "mosaic_gpu" in ours.reason  # no GPU here


def test_ours_is_compared_also_where_nothing_else_is_timed(monkeypatch):
    """With XLA's output, and where there is none, it is not trusted."""
    wrong = replace(DECODING, implementations=DECODING.implementations | {"mosaic_gpu": without_the_last_page})
    (ours,) = measured(wrong, "small 2x32", ["mosaic_gpu"])
    assert ours.reason.startswith("WrongResult: differs from xla by 0.")
    broken_at_run = lambda problem: Run(lambda arguments: jnp.ones(3) + jnp.ones(4))  # noqa: E731
    alone = {"mosaic_gpu": DECODING.implementations["xla"], "xla": broken_at_run}
    xla, ours = measured(replace(DECODING, implementations=alone), "small 2x32", ["mosaic_gpu", "xla"])
    assert "xla" in xla.implementation
    assert ours.reason == "WrongResult: there is no other output to compare with"


def test_a_device_that_hangs_ends_the_run(monkeypatch, capsys):
    ended = threading.Event()
    monkeypatch.setattr(measure, "PATIENCE", 0.01)
    monkeypatch.setattr(measure.os, "_exit", lambda code: ended.set())
    with measure.watched("a case"):
        assert ended.wait(timeout=60)
    assert "a case did not end within 0.01 s" in capsys.readouterr().out


def test_shapes_of_equal_size_are_compared():
    agreement = Agreement()
    agreement.check("first", jnp.ones((2, 6)))
    agreement.check("second", jnp.ones((3, 4)))
    with pytest.raises(WrongResult, match=r"differs from first by 0\.5 of its size"):
        agreement.check("third", jnp.full((2, 6), 1.5))


@pytest.fixture
def peers_on_a_cpu(monkeypatch):
    """XLA's attention under the names of the peers: what reaches them is what the op is asked for."""
    dot_product_attention = jax.nn.dot_product_attention

    def plain(*arguments, **options):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return dot_product_attention(*arguments, **options)

    def attend(q, k, v, *, implementation, logits_soft_cap=None, **options):
        assert implementation in ("cudnn", "mosaic")
        return plain(q, k, v, implementation="xla", **options)

    def attend_paged(q, k, v, q_lengths, kv_lengths, k_table, v_table, *, scale, mask_type, sliding_window_length):
        B, _, J, _ = k_table.shape
        assert k.shape[0] == B * J
        k, v = (x[table[:, 0, :, 0]].reshape(B, -1, *x.shape[2:]) for x, table in ((k, k_table), (v, v_table)))
        window = None if sliding_window_length is None else (sliding_window_length - 1, 0)
        lengths = {"query_seq_lengths": q_lengths, "key_value_seq_lengths": kv_lengths}
        causal = mask_type == cudnn.MaskType.PADDING_CAUSAL
        return plain(q, k, v, scale=scale, is_causal=causal, local_window_size=window, **lengths)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attend)
    monkeypatch.setattr(cudnn, "paged_attention", attend_paged)
    monkeypatch.setitem(sys.modules, "tokamax", SimpleNamespace(dot_product_attention=attend))


@pytest.mark.parametrize(
    ("op", "name", "peers"),
    [
        ("flash_attention", "small 2x32 shuffled", ["cudnn", "cudnn_paged"]),
        ("flash_attention", "small 1x48 window", ["cudnn", "cudnn_paged", "tokamax"]),
        ("flash_attention", "small 2x16 in 8 bits", ["xla"]),
        ("flash_attention", "small 7 behind 41", ["xla"]),
        ("flash_decoding", "small 2x32", ["cudnn", "cudnn_paged"]),
        ("flash_decoding", "small 2x32 3 queries", ["cudnn", "tokamax"]),
        ("flash_decoding", "small 5 from 4 to 60", ["cudnn"]),
    ],
)
def test_peers_are_asked_for_the_same(peers_on_a_cpu, op, name, peers):
    problem, agreement = TINY[op].problems[name], Agreement()
    for implementation in ("reference", *peers):
        run = TINY[op].implementations[implementation](problem)
        inputs = arguments(problem)
        if run.prepare is not None:
            inputs = jax.jit(run.prepare)(inputs)
        output = jax.jit(run.call)(inputs)
        agreement.check(implementation, output)


@pytest.mark.parametrize(
    ("op", "name", "peer", "reason"),
    [
        ("flash_attention", "small 2x16 in 8 bits", "cudnn_paged", "cuDNN in JAX takes no quantized cache"),
        ("flash_attention", "small 7 behind 41", "cudnn", "aligns a causal mask with the first key"),
        ("flash_decoding", "small 2x32 int8", "cudnn", "cuDNN in JAX takes no quantized cache"),
        ("flash_decoding", "small 2x32 fp8", "tokamax", "tokamax takes no quantized cache"),
        ("flash_decoding", "small 2x32 3 queries", "cudnn_paged", "aligns the causal mask"),
        ("flash_decoding", "small 5 from 4 to 60", "cudnn_paged", "as many pages as the table has entries"),
    ],
)
def test_what_a_peer_does_not_take_is_said(op, name, peer, reason):
    with pytest.raises(Unsupported, match=reason):
        TINY[op].implementations[peer](TINY[op].problems[name])


def test_a_missing_tokamax_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    (outcome, _) = measured(DECODING, "small 2x32", ["tokamax", "mosaic_gpu"])
    assert isinstance(outcome, Failure)
    assert outcome.reason.endswith("pip install tokamax")


ON_A_CARD = {
    "flash_attention": Prefill(Heads(8, 2, 128), 2, 512, 128, shuffled=False),
    "flash_decoding": Decode(Heads(8, 2, 128), 4, 512, 64),
    "streaming_matmul": Product(16, 1024, 1024),
    "streaming_mlp": Row(16, 1024, 2048, 1024),
    "tiled_matmul": LargeProduct(256, 1024, 1024, residual=True),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_on_a_gpu_ours_and_the_peers_agree_and_nothing_large_is_copied(name):
    op = replace(OPS[name], problems={"small": ON_A_CARD[name]})
    peers = [peer for peer in op.peers(ON_A_CARD[name]) if peer != "cudnn_paged"]
    case = start_case(op, "small", [*peers, "mosaic_gpu"], BENCH)
    text = case.runs["mosaic_gpu"].program.result().as_text()
    largest = max(jax.tree.leaves(case.generate.result()(jax.random.key(0))), key=lambda array: array.nbytes)
    dimensions = ",".join(map(str, largest.shape))
    assert not re.search(rf"\[{dimensions}\]\S* copy\(", text)
    assert [outcome for outcome in measure_case(case, BENCH) if isinstance(outcome, Failure)] == []
