"""/metrics: the figures of every model in the text format of Prometheus."""

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
        ready = GaugeMetricFamily("suanli_model_ready", "1 if the model is ready.", labels=LABELS)
        waiting = GaugeMetricFamily("suanli_waiting_inputs", "Inputs that wait for an engine.", labels=LABELS)
        memory = GaugeMetricFamily(
            "suanli_engine_memory_bytes", "Resident memory of the engine's process.", labels=LABELS
        )
        inputs = CounterMetricFamily("suanli_inputs", "Answered inputs.", labels=LABELS)
        restarts = CounterMetricFamily("suanli_engine_restarts", "Restarts of engines.", labels=LABELS)
        refused = CounterMetricFamily("suanli_refused", "Requests without an answer.", labels=(*LABELS, "status"))
        for model in models:
            labels, figures = (model.name, model.version), model.figures
            ready.add_metric(labels, float(model.ready))
            waiting.add_metric(labels, model.batcher.waiting)
            memory.add_metric(labels, model.memory_bytes or 0)
            inputs.add_metric(labels, figures.inputs)
            restarts.add_metric(labels, figures.restarts)
            for code, count in sorted(figures.refused.items()):
                refused.add_metric((*labels, str(code)), count)
        yield from (ready, waiting, memory, inputs, restarts, refused)
        for name, help_text, attribute in (
            ("suanli_request_seconds", "Time from a request's body to its answer.", "answered"),
            ("suanli_queue_seconds", "Time that inputs waited for an engine.", "queue"),
            ("suanli_encode_seconds", "Time to decode and resize the inputs of a request.", "encode"),
            ("suanli_engine_seconds", "Time of a batch in the engine.", "infer"),
        ):
            family = HistogramMetricFamily(name, help_text, labels=LABELS)
            for model in models:
                times: Times = getattr(model.figures, attribute)
                family.add_metric(
                    (model.name, model.version), buckets=_cumulative_buckets(times), sum_value=times.total_s
                )
            yield family


def _cumulative_buckets(times: Times) -> list[tuple[str, float]]:
    """Upper bounds, and how many values are at most as large."""
    total, buckets = 0, []
    for bound, count in zip((*map(str, BUCKETS_S), "+Inf"), times.buckets, strict=True):
        total += count
        buckets.append((bound, float(total)))
    return buckets
