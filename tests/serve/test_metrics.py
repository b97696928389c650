"""The figures that the server keeps."""

import re


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
