"""What the server counts, for Prometheus: seconds, tokens, requests and pages."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from jaxinfer.serve.messages import Usage

_LATENCY = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0)
_BETWEEN = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


class Metrics:
    """Counters, gauges and histograms of one server, in a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Continuations that ended, by their reason.", ["reason"])
        self.rejected = self._counter("rejected", "HTTP requests that were refused, by status.", ["status"])
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were queued.")
        self.tokens = self._counter("tokens", "New tokens.")
        self.first_token = self._histogram("time_to_first_token_seconds", "From queue to first token.", _LATENCY)
        self.between = self._histogram(
            "time_between_tokens_seconds", "Mean over the tokens that one step brought.", _BETWEEN
        )
        self.whole = self._histogram("request_seconds", "From queue to last token.", _LATENCY)
        self._usage = {
            "running": self._gauge("running_requests", "Sequences that the engine runs."),
            "waiting": self._gauge("waiting_requests", "Sequences that wait for a slot or for pages."),
            "pages_used": self._gauge("cache_pages_used", "Pages of the cache that sequences hold."),
            "pages": self._gauge("cache_pages", "Pages of the cache."),
        }

    def hold(self, usage: Usage) -> None:
        """Sets the gauges."""
        for name, gauge in self._usage.items():
            gauge.set(getattr(usage, name))

    def page(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"jaxinfer_{name}", text, labels or [], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"jaxinfer_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"jaxinfer_{name}", text, registry=self.registry, buckets=buckets)
