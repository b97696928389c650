"""A server whose draft model learns while it answers."""

from typing import Any

from tests.golden.load import load_demo
from tests.serve.running import COMPLETION, Running, serving

FLAGS = ["--speculate=draft", "--num-speculative-tokens=3", "--always-speculate", "--online-draft"]
ROUNDS, NEW = 5, 24


def acceptance(now: dict[str, float], then: dict[str, float]) -> float:
    """Of first proposals between two looks at the figures."""
    drafts, right = (now[name] - then[name] for name in ("jaxinfer_drafts_total", "jaxinfer_accepted_first_total"))
    return right / drafts


def texts(server: Running, body: dict[str, Any]) -> list[str]:
    status, answer = server.post(COMPLETION, body)
    assert status == 200, answer
    return [choice["text"] for choice in answer["choices"]]


def test_answers_stay_the_models_own_while_the_draft_learns(folder, server):
    """They are those of a server without a draft. The draft is asked the same again and again, so that it learns what
    comes."""
    body = {"prompt": load_demo().prompts[:4], "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    expected = texts(server, body)
    assert len({*expected}) == 4
    sizes = {"max_model_len": 128, "online_interval": 1, "online_batch": 2, "online_learning_rate": 1e-3}
    with serving(str(folder), *FLAGS, served_model_name="demo", **sizes) as learning:
        seen = [learning.figures()]
        for _ in range(ROUNDS):
            assert texts(learning, body) == expected
            learning.wait_for(running_requests=0)
            seen.append(learning.figures())
    assert seen[0]["jaxinfer_draft_updates_total"] == 0
    assert seen[-1]["jaxinfer_draft_updates_total"] > 3
    assert acceptance(seen[-1], seen[-2]) > acceptance(seen[1], seen[0]) + 0.1
