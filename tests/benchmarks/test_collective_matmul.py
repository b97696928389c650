"""The benchmark of products under which tokens go round a ring, on virtual devices."""

import json

import numpy as np
import pytest

from benchmarks import all_reduce, collective_matmul
from benchmarks.collective_matmul import COLLECTIVES, MATMUL, MLP, OUTPUT, QKV, RING, Case, check, inputs, overlaps
from jaxinfer.parallel import make_mesh

SMALL = ["--tokens", "64", "--sizes", "32", "48", "64", "--calls", "2"]


def test_times_of_every_product_are_kept(tmp_path, monkeypatch):
    """Each is right first."""
    monkeypatch.setattr(all_reduce, "SECONDS", 0.0)
    products, names = (QKV, OUTPUT, MLP), (MATMUL, COLLECTIVES, RING)
    chosen = ["--products", *products, "--implementations", *names]
    collective_matmul.main([*SMALL, *chosen, "--output", str(tmp_path)])
    written = json.loads((tmp_path / "collective_matmul.json").read_text())
    assert written["failures"] == []
    assert [(record["case"], record["implementation"], record["metric"]) for record in written["records"]] == [
        (f"{kind} 64", name, "time") for kind in products for name in names
    ]
    assert all(0 < record["low"] <= record["value"] <= record["high"] for record in written["records"])


def test_no_case_begins_after_the_limit(tmp_path, capsys):
    collective_matmul.main([*SMALL, "--limit", "0", "--output", str(tmp_path)])
    assert "the time is up" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [MLP, OUTPUT])
def test_a_wrong_product_is_refused(kind):
    case = Case(kind, 64, (32, 48, 64))
    _, expected = inputs(make_mesh(2), case)
    result = np.zeros((case.tokens, expected.shape[-1]), np.float32)
    result[collective_matmul.rows(case)] = expected
    check(case, result, expected, RING)
    result[63, 0] += 1.0
    with pytest.raises(ValueError, match="differs from the product"):
        check(case, result, expected, RING)


SCHEDULE = """ENTRY %main {
  %collective-permute-start.1 = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) collective-permute-start(%x), channel_id=1
  %product.1 = (bf16[4,8]{1,0}, s8[64]{0}) custom-call(%x, %w), custom_call_target="__cublas$gemm"
  %collective-permute-done.1 = bf16[4,8]{1,0} collective-permute-done(%collective-permute-start.1), metadata={a="(b)"}
  %collective-permute-start.2 = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) collective-permute-start(%y), channel_id=2
  %collective-permute-done.2 = bf16[4,8]{1,0} collective-permute-done((bf16[4,8]) %collective-permute-start.2)
  %gemm_fusion_dot.2 = bf16[4,8]{1,0} fusion(%y, %w), kind=kCustom, calls=%gemm_fusion_dot.2_computation
}"""


def test_messages_under_products_are_counted_in_the_order_of_a_program():
    assert overlaps(SCHEDULE) == (2, 1)
