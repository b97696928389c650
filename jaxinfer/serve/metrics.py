"""What the server counts, for Prometheus: seconds, tokens, requests and pages."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jaxinfer import engine

_LATENCY = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0)
_BETWEEN = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


_OF_THE_ENGINE = {
    "running_requests": "Sequences that the engine runs.",
    "waiting_requests": "Sequences that wait for a slot or for pages.",
    "cache_pages": "Pages of the cache.",
    "cache_pages_used": "Pages of the cache that sequences hold.",
    "cache_pages_cached": "Pages that nobody holds, whose text can be found.",
    "prefix_queried_tokens": "Tokens of texts that were looked for in the cache, since the start.",
    "prefix_found_tokens": "Of them, tokens that were found.",
    "preemptions": "Sequences that gave their pages back before they had ended, since the start.",
    "drafts": "Proposals of tokens to a sequence, since the start.",
    "accepted_tokens": "Proposed tokens that were right, since the start.",
    "compiled_programs": "Programs that were traced, since the start.",
}


class Metrics:
    """Counters, gauges and histograms of one server, in a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Continuations that ended, by their reason.", ["reason"])
        self.rejected = self._counter("rejected", "HTTP requests that were refused, by status.", ["status"])
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were queued.")
        self.tokens = self._counter("tokens", "New tokens.")
        self.queued = self._histogram("queue_seconds", "From a request's arrival to its first slot.", _LATENCY)
        self.first_token = self._histogram("time_to_first_token_seconds", "From queue to first token.", _LATENCY)
        self.between = self._histogram(
            "time_between_tokens_seconds", "Mean over the tokens that one step brought.", _BETWEEN
        )
        self.whole = self._histogram("request_seconds", "From queue to last token.", _LATENCY)
        self._engine = {name: self._gauge(name, text) for name, text in _OF_THE_ENGINE.items()}

    def hold(self, engine: engine.Metrics) -> None:
        """Sets the gauges to how the engine is."""
        figures = {
            "running_requests": engine.running,
            "waiting_requests": engine.waiting,
            "cache_pages": engine.pages_total,
            "cache_pages_used": engine.pages_used,
            "cache_pages_cached": engine.pages_cached,
            "prefix_queried_tokens": engine.counters.prefix_queries,
            "prefix_found_tokens": engine.counters.prefix_hits,
            "preemptions": engine.counters.preemptions,
            "drafts": engine.counters.drafts,
            "accepted_tokens": sum(engine.counters.accepted),
            "compiled_programs": engine.compilations,
        }
        for name, value in figures.items():
            self._engine[name].set(value)

    def page(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"jaxinfer_{name}", text, labels or [], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"jaxinfer_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"jaxinfer_{name}", text, registry=self.registry, buckets=buckets)
