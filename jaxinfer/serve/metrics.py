"""What the server counts, for Prometheus: seconds, tokens, requests and pages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from jaxinfer import engine

_LATENCY = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0)
_BETWEEN = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)

_Figures = dict[str, tuple[str, Callable[[engine.Metrics], float]]]

# How the engine is.
_GAUGES: _Figures = {
    "running_requests": ("Sequences that the engine runs.", lambda now: now.running),
    "waiting_requests": ("Sequences that wait for a slot or for pages.", lambda now: now.waiting),
    "cache_pages": ("Pages of the cache.", lambda now: now.pages_total),
    "cache_pages_used": ("Pages of the cache that sequences hold.", lambda now: now.pages_used),
    "cache_pages_cached": ("Pages that nobody holds, whose text can be found.", lambda now: now.pages_cached),
    "wasted_slots": ("Slots of used pages that hold no token.", lambda now: now.wasted_slots),
}
# What it has done since it began.
_COUNTERS: _Figures = {
    "prefix_queried_tokens": ("Tokens looked for in the cache.", lambda now: now.counters.prefix_queries),
    "prefix_found_tokens": ("Of them, tokens that were found.", lambda now: now.counters.prefix_hits),
    "evictions": ("Cached pages that were taken away for other texts.", lambda now: now.evictions),
    "preemptions": ("Sequences that gave pages back before they had ended.", lambda now: now.counters.preemptions),
    "timeouts": ("Requests that waited too long.", lambda now: now.counters.timeouts),
    "drafts": ("Proposals of tokens to a sequence.", lambda now: now.counters.drafts),
    "accepted_first": ("Proposals whose first token was right.", lambda now: sum(now.counters.accepted[:1])),
    "accepted_tokens": ("Proposed tokens that were right.", lambda now: sum(now.counters.accepted)),
    "draft_updates": ("Steps of training that gave the draft other weights.", lambda now: now.counters.draft_updates),
    "pipe_ticks": ("Ticks of a pipe of stages.", lambda now: now.counters.pipe_ticks),
    "pipe_filled_ticks": ("Of them, those in which a stage had work.", lambda now: now.counters.pipe_filled),
    "compiled_programs": ("Programs that were traced.", lambda now: now.compilations),
}


class _OfTheEngines(Collector):
    """The replicas' own figures, as they told them last."""

    def __init__(self):
        self.now: dict[int, engine.Metrics] = {}

    def collect(self) -> Iterator[Metric]:
        for kind, figures in ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS)):
            for name, (text, value) in figures.items():
                family = kind(f"jaxinfer_{name}", text, labels=["replica"])
                for replica, now in sorted(self.now.items()):
                    family.add_metric([str(replica)], value(now))
                yield family


class Metrics:
    """Counters and histograms of one server, and what the replicas of its engine tell, in a registry of their own."""

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
        self._engines = _OfTheEngines()
        self.registry.register(self._engines)

    def hold(self, engine: engine.Metrics, replica: int = 0) -> None:
        """Takes how a replica of the engine is, and what it has done."""
        self._engines.now[replica] = engine

    def page(self) -> bytes:
        """All figures in Prometheus's text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"jaxinfer_{name}", text, labels or [], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"jaxinfer_{name}", text, registry=self.registry, buckets=buckets)
