"""A connection to a Ray cluster, for as long as it is needed."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from optlm.errors import RequestError

__all__ = ["connected", "free_places"]

_LOOPBACK = "127.0.0.1"
# A cluster of one machine keeps to loopback when Ray takes the machine for one that cannot be part
# of a larger one; else it takes the address by which others reach it, whatever address it is given.
_SINGLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a thread that is late at the end starts no other cluster
}
_STORE = 2**28  # bytes of the object store of a cluster of our own


@contextmanager
def connected(address: str | None, part: str, *, processors: int | None = None) -> Iterator[Any]:
    """Yield the library, connected: to the cluster of the caller, one that runs, or a new one.

    A new cluster listens on loopback only, without dashboard; no usage statistics are sent.

    Args:
        address: of a cluster that runs, such as "auto"; None starts one on this machine.
        part: what of Ray is needed, such as "ray.data"; it is imported.
        processors: of a new cluster; None for those there are.

    Raises:
        RequestError: Ray is missing, or cannot be kept on loopback.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address is None:
        os.environ.setdefault(_SINGLE, "0")
    try:
        ray: Any = import_module("ray")
        import_module(part)
    except ModuleNotFoundError as error:
        raise RequestError(
            f"--ray needs {error.name}, which is not installed: pip install 'optlm[ray]'"
        ) from None
    if ray.is_initialized():
        yield ray
        return
    own: dict[str, Any] = {
        "include_dashboard": False,
        "_node_ip_address": _LOOPBACK,
        "object_store_memory": _STORE,
        "num_cpus": processors,
    }
    ray.init(
        address="local" if address is None else address,
        log_to_driver=False,
        logging_level=logging.ERROR,
        **(own if address is None else {}),
    )
    try:
        if address is None and ray.util.get_node_ip_address() != _LOOPBACK:
            raise RequestError(
                f"Ray was imported before it was told to stay on loopback; set {_SINGLE}=0 in the "
                "environment"
            )
        yield ray
    finally:
        ray.shutdown()


def free_places(ray: Any, threads: int) -> int:
    """How many engines of so many threads the cluster's processors hold."""
    return int(ray.cluster_resources().get("CPU", 1)) // threads
