"""The figures of every model in Prometheus' text form, made when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from suanli.serving.figures import BUCKETS_S, Times

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from suanli.serving.repository import Repository

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABELS = ("model", "version")


def text(repository: Repository) -> bytes:
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_Collector(repository))
    return generate_latest(registry)


class _Collector:
    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        models = self._repository.models()
        ready = GaugeMetricFamily("suanli_model_ready", "1 if the model answers.", labels=LABELS)
        waiting = GaugeMetricFamily("suanli_waiting_inputs", "Inputs that no engine has yet.", labels=LABELS)
        memory = GaugeMetricFamily("suanli_engine_memory_bytes", "Main memory of the engine's process.", labels=LABELS)
        inputs = CounterMetricFamily("suanli_inputs", "Inputs that were answered.", labels=LABELS)
        restarts = CounterMetricFamily("suanli_engine_restarts", "Engines that were replaced.", labels=LABELS)
        refused = CounterMetricFamily("suanli_refused", "Requests without an answer.", labels=(*LABELS, "status"))
        for model in models:
            at, figures = (model.name, model.version), model.figures
            ready.add_metric(at, float(model.ready))
            waiting.add_metric(at, model.batcher.waiting)
            memory.add_metric(at, model.memory_bytes or 0)
            inputs.add_metric(at, figures.inputs)
            restarts.add_metric(at, figures.restarts)
            for code, count in sorted(figures.refused.items()):
                refused.add_metric((*at, str(code)), count)
        yield from (ready, waiting, memory, inputs, restarts, refused)
        for name, about, pick in (
            ("suanli_request_seconds", "From a request's body to its answer.", "answered"),
            ("suanli_queue_seconds", "That inputs waited for an engine.", "queue"),
            ("suanli_encode_seconds", "Decoding and resizing, of one request.", "encode"),
            ("suanli_engine_seconds", "Of one batch in the engine.", "infer"),
        ):
            family = HistogramMetricFamily(name, about, labels=LABELS)
            for model in models:
                times: Times = getattr(model.figures, pick)
                family.add_metric(
                    (model.name, model.version), buckets=_cumulative_buckets(times), sum_value=times.total_s
                )
            yield family


def _cumulative_buckets(times: Times) -> list[tuple[str, float]]:
    total, found = 0, []
    for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), times.buckets, strict=True):
        total += count
        found.append((bound, float(total)))
    return found
