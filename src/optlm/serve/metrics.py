"""`/metrics` for Prometheus, under vLLM's names where they mean the same."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from optlm.engine.aio import AsyncLLM
from optlm.engine.outputs import RequestOutput
from optlm.serve.limits import Admission

__all__ = ["Metrics", "Watch"]

_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 60)
_WHOLE = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 60, 120, 300)
_COUNTERS = {
    "prompt_tokens": ("vllm:prompt_tokens", "Tokens of prompts that were begun"),
    "generated_tokens": ("vllm:generation_tokens", "Tokens generated"),
    "prefix_queries": ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_hits": ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    "preemptions": ("vllm:num_preemptions", "Sequences that gave their blocks back"),
}


class Watch:
    """Times one request from its arrival."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begun = time.perf_counter()
        self._first: float | None = None

    def first_token(self) -> None:
        if self._first is None:
            self._first = time.perf_counter() - self._begun
            self._metrics.first.observe(self._first)

    def done(self, outputs: Sequence[RequestOutput]) -> None:
        self._metrics.whole.observe(time.perf_counter() - self._begun)
        for output in outputs:
            for completion in output.outputs:
                self._metrics.finished.labels(completion.finish_reason).inc()


class Metrics(Collector):
    """Numbers of the engine as they are when asked, and of requests as they pass."""

    def __init__(self, engine: AsyncLLM, admission: Admission, model: str) -> None:
        self._engine = engine
        self._admission = admission
        self._labels = {"model_name": model}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self.first = Histogram(
            "vllm:time_to_first_token_seconds",
            "From arrival to the first token of streamed requests",
            ["model_name"],
            buckets=_FIRST,
            registry=self._registry,
        ).labels(model)
        self.whole = Histogram(
            "vllm:e2e_request_latency_seconds",
            "From arrival to the end",
            ["model_name"],
            buckets=_WHOLE,
            registry=self._registry,
        ).labels(model)
        self.finished = Counter(
            "vllm:request_success",
            "Choices that were finished, by reason",
            ["finished_reason"],
            registry=self._registry,
        )
        self.answers = Counter(
            "optlm:http_responses", "Answers by status", ["status"], registry=self._registry
        )

    def collect(self) -> Iterable[Metric]:
        stats = self._engine.stats()
        gauges = (
            ("vllm:num_requests_running", "Sequences that hold KV blocks", stats.running),
            ("vllm:num_requests_waiting", "Sequences that wait for them", stats.waiting),
            (
                "vllm:kv_cache_usage_perc",
                "KV blocks in use, 1 for all",
                stats.blocks_used / stats.blocks_total,
            ),
            ("optlm:kv_blocks_used", "KV blocks in use", stats.blocks_used),
            ("optlm:requests_admitted", "Requests that run or wait", self._admission.requests),
            ("optlm:tokens_admitted", "Tokens that they may take", self._admission.tokens),
        )
        for name, what, value in gauges:
            gauge = GaugeMetricFamily(name, what, labels=list(self._labels))
            gauge.add_metric(list(self._labels.values()), value)
            yield gauge
        for field, (name, what) in _COUNTERS.items():
            counter = CounterMetricFamily(name, what, labels=list(self._labels))
            counter.add_metric(list(self._labels.values()), getattr(stats, field))
            yield counter

    def page(self) -> bytes:
        return generate_latest(self._registry)
