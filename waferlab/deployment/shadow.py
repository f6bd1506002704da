"""What the service counts, and a second model that answers in the shadow of the first."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import prometheus_client as prometheus

from waferlab.deployment.predictor import Predictor
from waferlab.errors import printable

LOG = logging.getLogger(__name__)
WAITING = 4  # requests whose maps the shadow has not answered yet; what comes beyond is not asked, but counted
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Metrics:
    """What /metrics shows, of one service: its counters, and the memory and processor time of its process."""

    def __init__(self) -> None:
        self.registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self.registry)
        counter = partial(prometheus.Counter, registry=self.registry)
        self.requests = counter("wafer_requests", "Requests to /predict, by the status of the answer", ["status"])
        self.rejected = counter("wafer_bodies_rejected", "Requests that got no answer, by reason", ["reason"])
        self.maps = counter("wafer_maps", "Maps answered, by their likeliest class", ["class"])
        self.abstentions = counter("wafer_abstentions", "Maps of them whose set is not their likeliest class alone")
        self.shadow_maps = counter("wafer_shadow_maps", "Maps that the shadow answered, too")
        self.disagreements = counter("wafer_shadow_disagreements", "Maps that the shadow gave another class")
        self.shadow_dropped = counter("wafer_shadow_dropped", "Maps that the shadow was too busy for")
        self.shadow_failures = counter("wafer_shadow_failures", "Requests at which the shadow failed")
        self.in_work = prometheus.Gauge("wafer_in_work", "Requests read or answered now", registry=self.registry)
        self.seconds = prometheus.Histogram(
            "wafer_seconds", "From the head of a request to /predict to its answer", buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip

    def count(self, answers: Sequence[Mapping[str, Any]]) -> None:
        """Adds the answers to one request."""
        for name, maps in Counter(answer["class"] for answer in answers).items():
            self.maps.labels(name).inc(maps)
        self.abstentions.inc(sum(answer["abstain"] is True for answer in answers))


class Shadow:
    """Answers the same maps as the service once the service has answered, one request after the other, and counts.

    Args:
        predictor: of the challenger.
        metrics: where its answers are counted.
    """

    def __init__(self, predictor: Predictor, metrics: Metrics) -> None:
        self._predictor, self._metrics, self._name = predictor, metrics, printable(predictor.name)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shadow")
        self._room = threading.BoundedSemaphore(WAITING)

    def offer(self, maps: Sequence[np.ndarray], classes: Sequence[str]) -> None:
        """Has the maps answered later, or drops them where too many wait; returns at once."""
        if self._room.acquire(blocking=False):
            self._pool.submit(self._compare, maps, classes)
        else:
            self._metrics.shadow_dropped.inc(len(maps))

    def close(self) -> None:
        """Returns when the request in work is done; those that wait are given up."""
        self._pool.shutdown(cancel_futures=True)

    def _compare(self, maps: Sequence[np.ndarray], classes: Sequence[str]) -> None:
        try:
            columns = self._predictor.probabilities(maps).argmax(axis=1)
            found = [self._predictor.class_names[column] for column in columns]
            pairs = Counter(f"{a} -> {b}" for a, b in zip(classes, found, strict=True) if a != b)
            self._metrics.shadow_maps.inc(len(maps))
            self._metrics.disagreements.inc(pairs.total())
            if pairs:
                kinds = ", ".join(f"{pair} ({n})" for pair, n in pairs.most_common())
                shares = pairs.total(), len(maps)
                LOG.warning("%s gives %d of %d maps another class: %s", self._name, *shares, printable(kinds))
        except Exception:  # whatever the challenger does, the champion goes on answering
            self._metrics.shadow_failures.inc()
            LOG.exception("%s failed in the shadow", self._name)
        finally:
            self._room.release()
