"""What is counted, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one server, in a registry of their own.

    Parameters
    ----------
    queue_length, n_running : callable
        Read when the metrics are.
    """

    def __init__(self, queue_length: Callable[[], int], n_running: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "sparsevlm_requests", "Requests by path and status.", ("path", "status"), registry=self.registry
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of answered requests.")
        self.visual_tokens = self._counter("visual_tokens", "Visual tokens among them.")
        self.kept_tokens = self._counter(
            "visual_tokens_kept", "Visual tokens that were computed, averaged over the decoder's layers."
        )
        self.generated_tokens = self._counter("generated_tokens", "Generated tokens.")
        self.restarts = self._counter("worker_restarts", "Times that the generating thread was started anew.")
        self.seconds = Histogram(
            "sparsevlm_request_seconds",
            "Seconds of a request: queue (waiting for the model), first_token (from its arrival), total.",
            ("phase",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "sparsevlm_batch_size", "Requests by batch.", buckets=_SIZES, registry=self.registry
        )
        self._gauge("queue_length", "Requests that wait for the model.", queue_length)
        self._gauge("running_requests", "Requests of the batch that is generated.", n_running)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(f"sparsevlm_{name}", help_text, registry=self.registry)

    def _gauge(self, name: str, help_text: str, read: Callable[[], int]) -> None:
        Gauge(f"sparsevlm_{name}", help_text, registry=self.registry).set_function(read)
