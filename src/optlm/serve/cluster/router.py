"""`PrefixRouter`: a `Chooser` that Ray Serve asks, in the process of the front."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from optlm.serve.cluster.beginnings import Chooser

__all__ = ["PrefixRouter"]


class PrefixRouter(RequestRouter):
    """Requests carry the names of their beginnings as their first argument."""

    def initialize_state(self, **kwargs: Any) -> None:
        self._chooser = Chooser()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if not candidate_replicas:
            return []
        names: list[bytes] = pending_request.args[0] if pending_request is not None else []
        there = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        first, *others = self._chooser.order(
            names, {name: self._load(replica) for name, replica in there.items()}
        )
        return [[there[first]], [there[name] for name in others]]

    def _load(self, replica: RunningReplica) -> int:
        """Requests under way there, as far as this front knows."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0
