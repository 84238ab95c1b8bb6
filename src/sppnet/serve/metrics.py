"""What the server did so far, as Prometheus reads it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from sppnet.serve.studio import Studio

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counts the requests of one application, and looks at its project when it is asked.

    Parameters
    ----------
    studio : Studio
    """

    def __init__(self, studio: Studio) -> None:
        self.registry, self._studio = CollectorRegistry(), studio
        labels = ("method", "path", "status")
        self.requests = Counter("sppnet_requests", "Requests answered.", labels, registry=self.registry)
        self.seconds = Histogram(
            "sppnet_request_seconds",
            "Seconds until an answer begins.",
            ("path",),
            buckets=(0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60),
            registry=self.registry,
        )
        for collector in (ProcessCollector, PlatformCollector):
            collector(registry=self.registry)
        self.registry.register(self)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Yield what is known of the project and its processes."""
        studio, counts = self._studio, self._studio.counts()
        gauges = {
            "photos": ("Photos of the project.", counts["photos"]),
            "encoded": ("Photos whose maps are computed.", counts["encoded"]),
            "waiting": ("Requests that wait for the engine.", studio.engine.load),
            "ready": ("Whether the engine answers.", int(studio.engine.ready)),
            "listeners": ("Pages that are told of changes.", studio.hub.count),
        }
        for name, (about, value) in gauges.items():
            yield GaugeMetricFamily(f"sppnet_{name}", about, value=value)

    def text(self) -> bytes:
        """Return all of it as Prometheus reads it."""
        return generate_latest(self.registry)


class Counted:
    """Counts the requests that an application answers.

    Parameters
    ----------
    app : ASGI application
    metrics : Metrics
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer, and count that."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun = time.perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Of a path, its form: as many as there are photos would be too many.
                path = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(scope["method"], path, message["status"]).inc()
                self.metrics.seconds.labels(path).observe(time.perf_counter() - begun)
            await send(message)

        await self.app(scope, receive, counted)
