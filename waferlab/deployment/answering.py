"""From a request to its answer, many at a time, within bounds.

A call of ONNX Runtime uses one thread, and there are as many calls at a time as cores. A lot is cut into pieces that
take turns with those of other requests: a large lot keeps nobody waiting for long, and takes no more memory at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import time
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from waferlab.deployment.predictor import Predictor
from waferlab.deployment.request_maps import RefusedRequest, maps_from_body, read_body
from waferlab.deployment.shadow import Metrics, Shadow
from waferlab.tracking.processes import usable_cores

THREADS = 1  # of a predictor that is served: two threads that wait for one another are slower than two calls
PIECE = 16  # maps in one call at the most
WORTH_SHARING = 4  # maps; so few are left to one call
MAX_IN_WORK = 16  # requests that are read or answered at a time; further ones are told to come again
LOG = logging.getLogger(__name__)


class Answering:
    """A model that is asked over HTTP, and what is counted of it.

    Attributes:
        ready: whether the model has answered a map.
        about: what every answer says of the model.
        metrics: the counters.

    Args:
        predictor: that answers, loaded with `threads=THREADS`.
        coverage: that its sets promise.
        shadow: answers the same maps afterwards, for the counters alone.

    Raises:
        ValueError: the predictor has no sets of this coverage.
    """

    def __init__(self, predictor: Predictor, *, coverage: float, shadow: Predictor | None) -> None:
        self.predictor, self.coverage, self.metrics = predictor, coverage, Metrics()
        self.shadow = None if shadow is None else Shadow(shadow, self.metrics)
        self.workers = usable_cores()
        self.pool = ThreadPoolExecutor(self.workers, thread_name_prefix="predict")
        self.in_work, self.ready, sets = 0, False, predictor.sets
        self.metrics.in_work.set_function(lambda: self.in_work)
        if sets is not None:
            sets.floors_at(coverage)  # raises where there are none
        kept = () if sets is None else zip(predictor.class_names, sets.promised(coverage), strict=True)
        self.about = {
            "model": {"name": predictor.name, "sha256": predictor.sha256},
            "coverage": None if sets is None else coverage,
            "no_promise_for": [name for name, promised in kept if not promised],
        }

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[None]:
        """Warms the model up while /health answers already; waits for the shadow at the end."""
        self.pool.submit(self._warm_up)
        yield
        self.pool.shutdown()
        if self.shadow is not None:
            self.shadow.close()

    def _warm_up(self) -> None:
        try:
            self._ask([np.ones((26, 26), np.uint8)])
            self.ready = True
        except Exception:  # /ready goes on saying so
            LOG.exception("%s does not answer", self.predictor.name)

    async def predict(self, request: Request) -> Response:
        """Class, probabilities, prediction set and whether somebody should look, of each map."""
        started, status = time.perf_counter(), 500
        self.in_work += 1
        try:
            if self.in_work > MAX_IN_WORK:
                raise RefusedRequest("Too many requests at a time. Come again in a second.", status=503, reason="busy")
            body, kind = await read_body(request)
            maps = await asyncio.get_running_loop().run_in_executor(self.pool, maps_from_body, body, kind)
            answers = await self._answer(maps)
            self.metrics.count(answers)
            status, content = 200, json.dumps(self.about | {"answers": answers})
            later = self.shadow and BackgroundTask(self.shadow.offer, maps, [answer["class"] for answer in answers])
            return Response(content, media_type="application/json", background=later)
        except RefusedRequest as refused:
            status = refused.status
            self.metrics.rejected.labels(refused.reason).inc()
            return sentence(status, str(refused), {"Retry-After": "1"} if status == 503 else None)
        finally:
            self.in_work -= 1
            self.metrics.requests.labels(str(status)).inc()
            self.metrics.seconds.observe(time.perf_counter() - started)

    async def _answer(self, maps: list[np.ndarray]) -> list[dict[str, Any]]:
        loop, answers = asyncio.get_running_loop(), []
        at_once = PIECE * self.workers
        for start in range(0, len(maps), at_once):  # no more, so that others get their turn in between
            some = maps[start : start + at_once]
            size = max(WORTH_SHARING, math.ceil(len(some) / self.workers))
            pieces = (some[i : i + size] for i in range(0, len(some), size))
            calls = (loop.run_in_executor(self.pool, self._ask, piece) for piece in pieces)
            answers += [answer for of_piece in await asyncio.gather(*calls) for answer in of_piece]
        return answers

    def _ask(self, maps: list[np.ndarray]) -> list[dict[str, Any]]:
        answers = self.predictor.predict(maps, coverage=self.coverage)
        names, promised = answers.class_names, answers.sets is not None
        return [
            {
                "class": of_map,
                "probabilities": dict(zip(names, row, strict=True)),
                "set": held if promised else None,
                "abstain": abstains if promised else None,
            }
            for of_map, row, held, abstains in zip(
                answers.classes, answers.probabilities.astype(float).round(6).tolist(), answers.set_names(),
                answers.abstains.tolist(), strict=True,
            )
        ]  # fmt: skip


def sentence(status: int, text: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer to a request that gets no other."""
    return JSONResponse({"error": text}, status, headers=headers)
