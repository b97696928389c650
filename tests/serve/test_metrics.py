"""The figures that the server keeps."""

import re

from jaxinfer.engine import Counters
from jaxinfer.engine import Metrics as EngineMetrics
from jaxinfer.serve.metrics import Metrics

GROWING = {
    "prefix_queried_tokens": 4, "prefix_found_tokens": 5, "evictions": 9, "preemptions": 2, "timeouts": 3, "drafts": 8,
    "accepted_first": 5, "accepted_tokens": 7, "draft_updates": 12, "compiled_programs": 11, "pipe_ticks": 14,
    "pipe_filled_ticks": 13,
}  # fmt: skip


def test_what_only_grows_is_a_counter_and_all_else_of_the_engine_a_gauge():
    """All that the engine tells is there."""
    metrics = Metrics()
    counters = Counters(
        2, 3, prefix_queries=4, prefix_hits=5, drafts=8, accepted=(5, 2), draft_updates=12, pipe_ticks=14,
        pipe_filled=13,
    )  # fmt: skip
    metrics.hold(EngineMetrics(counters, 21, 22, 23, 24, 25, evictions=9, wasted_slots=10, compilations=11))
    lines = metrics.page().decode().splitlines()
    for name, value in GROWING.items():
        assert f"# TYPE jaxinfer_{name}_total counter" in lines
        assert f'jaxinfer_{name}_total{{replica="0"}} {float(value)}' in lines
    gauges = {line.split()[2]: line for line in lines if line.endswith(" gauge")}
    names = [name for name in gauges if not name.endswith("_created")]
    found = {name: metrics.registry.get_sample_value(name, {"replica": "0"}) for name in names}
    assert found == {
        "jaxinfer_waiting_requests": 21, "jaxinfer_running_requests": 22, "jaxinfer_cache_pages": 23,
        "jaxinfer_cache_pages_used": 24, "jaxinfer_cache_pages_cached": 25, "jaxinfer_wasted_slots": 10,
    }  # fmt: skip


def test_metrics_count_what_was_asked(server, client):
    server.wait_for(running_requests=0)
    before = server.figures()
    client.completions.create(model="demo", prompt=[1, 2, 3], max_tokens=9, n=2, extra_body={"ignore_eos": True})
    after = server.figures()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["jaxinfer_prompt_tokens_total"] == 3
    assert grown["jaxinfer_tokens_total"] == 18
    assert grown['jaxinfer_requests_total{reason="length"}'] == 2
    assert grown["jaxinfer_time_to_first_token_seconds_count"] == 2
    assert grown["jaxinfer_queue_seconds_count"] == 2
    assert 0 < grown["jaxinfer_queue_seconds_sum"] < grown["jaxinfer_time_to_first_token_seconds_sum"]
    assert after["jaxinfer_cache_pages"] > 0
    assert after["jaxinfer_cache_pages_used"] == 0


def test_the_page_draws_what_the_metrics_have(server):
    """Its script names figures that are there, under no name but these."""
    status, headers, page = server.ask("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    named = re.findall(r"\bjaxinfer_\w+", page.decode())
    found = server.figures()
    assert len(named) >= 7
    assert [name for name in named if name not in found and f"{name}_sum" not in found] == []
