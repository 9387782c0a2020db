"""`ClusterServer`: a front in this process, and replicas behind it in the workers of a cluster."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from optlm.engine.llm import LLM
from optlm.errors import BackendError, RequestError
from optlm.serve.app import assemble
from optlm.serve.chat import make_template, read_template_text
from optlm.serve.cluster.connect import connected, free_places
from optlm.serve.cluster.options import ClusterOptions
from optlm.serve.keys import read_keys
from optlm.serve.server import HttpServer, ServerOptions, listen, with_pages

__all__ = ["ClusterServer"]

_ROUTER = "optlm.serve.cluster.router:PrefixRouter"
_BUSY = 16  # requests under way in a replica beyond which another is wanted
_UPSCALE_SECONDS = 10.0  # that it must be busy
_DOWNSCALE_SECONDS = 300.0  # that replicas must be idle
_FINISH_SECONDS = 600.0  # that a replica has to end its requests when it is no longer wanted


class ClusterServer:
    """Use as `Server`: it listens from construction on; `run` deploys and serves.

    Args:
        load: loads the engine of a replica, there.

    Attributes:
        port: where it listens.

    Raises:
        OSError: the address cannot be had, or a file cannot be read.
        RequestError: a file of keys or a template that is none.
    """

    def __init__(
        self,
        load: Callable[[], LLM],
        options: ServerOptions,
        cluster: ClusterOptions,
    ) -> None:
        self._load = load
        self._options = options
        self._cluster = cluster
        self._keys = None if options.api_keys is None else read_keys(options.api_keys)
        self._template: str | None = None
        if options.chat_template is not None:
            self._template = read_template_text(options.chat_template)
            make_template(self._template, str(options.chat_template))
        self._listener = listen(options.host, options.port)
        self.port: int = self._listener.getsockname()[1]
        self._http: HttpServer | None = None

    @property
    def started(self) -> bool:
        return self._http is not None and self._http.started

    def run(self, deployed: Callable[[], None] = lambda: None) -> None:
        """Deploy, serve until `stop` or a signal as `Server.run`, and take the replicas away.

        Args:
            deployed: called when the replicas are there.

        Raises:
            RequestError: Ray is missing, or its cluster has no room for the least replicas.
            BackendError: the replicas do not start.
        """
        try:
            with (
                connected(self._cluster.address, "ray.serve") as ray,
                self._deployed(ray) as (handle, most),
            ):
                deployed()
                self._serve(handle, most)
        finally:
            self._listener.close()

    def stop(self) -> None:
        """Take no more requests, finish those that run, and end."""
        if self._http is not None:
            self._http.end()

    def _serve(self, handle: Any, most: int) -> None:
        from optlm.serve.cluster.front import Front

        options = self._options
        limits = replace(options.limits, requests=options.limits.requests * most)
        front = Front(handle, self._keys, limits)
        app = with_pages(assemble(front, front.answers), options.origins)
        adapters = None if options.adapters is None else front
        self._http = HttpServer(app, limits, front, adapters)
        self._http.run(sockets=[self._listener])

    @contextmanager
    def _deployed(self, ray: Any) -> Iterator[tuple[Any, int]]:
        """The deployment's handle, and how many replicas there may be."""
        serve, cluster = ray.serve, self._cluster
        room = free_places(ray, cluster.threads)
        if cluster.address is None and room < cluster.least:
            raise RequestError(
                f"{cluster.least} replicas of {cluster.threads} threads do not fit this machine, "
                f"which has room for {room}; lower --replicas or --threads"
            )
        most = cluster.most or max(room, cluster.least)
        for name in ("ray.serve", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        application = f"optlm-{uuid.uuid4().hex[:8]}"
        try:
            try:
                handle = serve.run(
                    self._application(serve, most), name=application, route_prefix=None
                )
            except RuntimeError as error:
                raise BackendError(f"the replicas do not start: {error}") from error
            yield handle, most
        finally:
            if cluster.address is not None:  # our own ends as a whole
                serve.delete(application)

    def _application(self, serve: Any, most: int) -> Any:
        from optlm.serve.cluster.replica import Replica, ReplicaOptions

        options, cluster = self._options, self._cluster
        deployment = serve.deployment(
            Replica,
            name="replicas",
            max_ongoing_requests=options.limits.requests,
            user_config={},  # has `Replica.reconfigure` called
            ray_actor_options={"num_cpus": cluster.threads},
            graceful_shutdown_timeout_s=_FINISH_SECONDS,
            autoscaling_config={
                "min_replicas": cluster.least,
                "max_replicas": most,
                "target_ongoing_requests": _BUSY,
                "upscale_delay_s": _UPSCALE_SECONDS,
                "downscale_delay_s": _DOWNSCALE_SECONDS,
            },
            request_router_config={"request_router_class": _ROUTER},
        )
        return deployment.bind(
            ReplicaOptions(
                load=self._load,
                name=options.name,
                chat_template=self._template,
                adapters=options.adapters,
                limits=options.limits,
                loopback=cluster.address is None,
            )
        )
