"""Answers over HTTP: POST /predict, a page for people at /, and /health, /ready, /metrics for whoever keeps it running.

It listens on this machine alone unless told otherwise, and needs no PyTorch.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import prometheus_client as prometheus
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from waferlab.deployment.answering import Answering, sentence
from waferlab.deployment.page_policy import digest_of
from waferlab.deployment.predictor import Predictor
from waferlab.deployment.request_maps import OPENAPI
from waferlab.errors import UserError
from waferlab.evaluation.conformal import DEFAULT_COVERAGE

PAGE = Path(__file__).with_name("service.html")
GRACE_SECONDS = 30  # for requests in work when the service is told to stop


def create_app(
    predictor: Predictor, *, coverage: float = DEFAULT_COVERAGE, shadow: Predictor | None = None,
    names: Sequence[str] = ("*",),
) -> FastAPI:  # fmt: skip
    """The application; `serve` runs it.

    Args:
        predictor: that answers.
        coverage: that its sets promise.
        shadow: a challenger; see `serve`.
        names: that requests may call this machine by; "*" is any.

    Raises:
        ValueError: the model has no sets of this coverage.
    """
    model = Answering(predictor, coverage=coverage, shadow=shadow)
    app = FastAPI(title="Wafer map classifier", docs_url=None, redoc_url=None, lifespan=model.lifespan)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(names))
    page = PAGE.read_text()
    app.add_api_route("/predict", model.predict, methods=["POST"], openapi_extra={"requestBody": OPENAPI})

    @app.get("/health")
    async def health() -> dict[str, str]:
        """The process is up."""
        return {"status": "up"}

    @app.get("/ready")
    async def ready() -> Response:
        """The model has answered a map."""
        return JSONResponse({"ready": model.ready} | model.about, 200 if model.ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """For Prometheus."""
        text = prometheus.generate_latest(model.metrics.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return Response(page, media_type="text/html", headers=_only_its_own(page))

    @app.exception_handler(HTTPException)
    async def refuse(_: Request, error: HTTPException) -> Response:
        what = "There is POST /predict, and GET /, /health, /ready, /metrics and /openapi.json; nothing else."
        return sentence(error.status_code, what, error.headers)

    @app.exception_handler(Exception)
    async def fail(_: Request, error: Exception) -> Response:
        return sentence(500, "The model could not answer. The service's log says why.")

    return app


def serve(
    predictor: Predictor, *, port: int, shadow: Predictor | None = None, coverage: float = DEFAULT_COVERAGE,
    host: str = "127.0.0.1",
) -> None:  # fmt: skip
    """Answers until SIGTERM or Ctrl-C; requests in work are ended, new ones are refused.

    Args:
        predictor: loaded with one thread, see answering.py.
        port: 0 for any that is free; what is taken is printed.
        shadow: a challenger that answers the same maps afterwards, for the counters alone.
        coverage: that the sets promise.
        host: the address to listen on; a container says 0.0.0.0.

    Raises:
        UserError: the port is taken or not allowed, or the model has no sets of this coverage.
    """
    address = f"[{host}]" if ":" in host else host
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        # Of its own machine alone it answers to its own names alone: a page from elsewhere whose name is made to mean
        # this machine ("DNS rebinding") could read the answers in a browser.
        _, _, _, _, (listened, *_) = socket.getaddrinfo(host, port, family, socket.SOCK_STREAM)[0]
        alone = ipaddress.ip_address(listened.partition("%")[0]).is_loopback
        names = ("127.0.0.1", "localhost", "[::1]", address.lower()) if alone else ("*",)
        app = create_app(predictor, coverage=coverage, shadow=shadow, names=names)
        listening = socket.create_server((host, port), family=family, backlog=128)
        # asyncio forgets this for sockets that it has not made: the body of an answer would wait 40 ms for its head.
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except ValueError as error:
        raise UserError(str(error)) from error
    except (OSError, OverflowError) as error:
        reason, other = getattr(error, "strerror", None) or error, "--port"
        if isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
            other = "--host, an address of this machine"
        raise UserError(f"Nothing can listen at {address}:{port} ({reason}). Give another {other}.") from error
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, ws="none", lifespan="on",
        timeout_graceful_shutdown=GRACE_SECONDS,
    )  # fmt: skip
    server = uvicorn.Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn handles them, and raises them again at its end
        signal.signal(number, server.handle_exit)
    print(f"{predictor.name} answers at http://{address}:{listening.getsockname()[1]} (Ctrl-C stops it)", flush=True)
    server.run(sockets=[listening])


def _only_its_own(page: str) -> dict[str, str]:
    """Headers that let a page run and load nothing but the script and the style that are in it."""
    policy = "; ".join(f"{tag}-src '{digest_of(page, tag)}'" for tag in ("script", "style"))
    policy += "; default-src 'none'; connect-src 'self'; img-src data:"  # the empty icon is such an image
    policy += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
