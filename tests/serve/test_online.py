"""A server whose draft model learns while it answers."""

from jaxinfer.llm import DEMO
from jaxinfer.text import Tokenizer
from tests.golden.load import load_demo
from tests.serve.running import COMPLETION, serving

FLAGS = ["--speculate=draft", "--num-speculative-tokens=3", "--always-speculate", "--online-draft"]
ROUNDS, NEW = 5, 24


def acceptance(now: dict[str, float], then: dict[str, float]) -> float:
    """Of first proposals between two looks at the figures."""
    drafts, right = (now[name] - then[name] for name in ("jaxinfer_drafts_total", "jaxinfer_accepted_first_total"))
    return right / drafts


def test_answers_stay_the_models_own_while_the_draft_learns():
    """They are what transformers writes with the demo model alone. The draft is asked the same again and again, so
    that it learns what comes."""
    golden, decode = load_demo(), Tokenizer.from_folder(DEMO).backend.decode
    prompts = golden.prompts[:4]
    new = [sequence[len(prompt) :][:NEW] for prompt, sequence in zip(prompts, golden.sequences, strict=False)]
    body = {"prompt": prompts, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
    with serving(*FLAGS, max_model_len=128, online_interval=1, online_batch=2, online_learning_rate=1e-3) as server:
        seen = [server.figures()]
        for _ in range(ROUNDS):
            status, answer = server.post(COMPLETION, body)
            assert status == 200, answer
            assert [choice["text"] for choice in answer["choices"]] == [decode(ids) for ids in new]
            server.wait_for(running_requests=0)
            seen.append(server.figures())
    assert seen[0]["jaxinfer_draft_updates_total"] == 0
    assert seen[-1]["jaxinfer_draft_updates_total"] > 3
    assert acceptance(seen[-1], seen[-2]) > acceptance(seen[1], seen[0]) + 0.1
