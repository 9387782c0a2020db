"""`TokenTree`: sequences that begin alike as one tree, so that what they share is read once."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["TokenTree"]


class TokenTree:
    """Token sequences merged by their beginnings.

    A node is one token after those of its ancestors. Nodes are numbered in the order in which they
    came, so a parent's number is always the smaller.

    Attributes:
        tokens: the token id of each node.
        parents: the node before each; -1 for a first token.
        wanted: whether the logits after each node are wanted.
        paths: the nodes of each sequence, in the order added.
        scored_from: of each sequence, the place whose logits are the first wanted.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.wanted: list[bool] = []
        self.paths: list[list[int]] = []
        self.scored_from: list[int] = []
        self._known: dict[tuple[int, int], int] = {}  # (parent, token) -> node

    def add(self, token_ids: Sequence[int], score_from: int, *, after_last: bool = False) -> int:
        """Add a sequence and return its number.

        Args:
            score_from: the place whose logits give the first log-probability wanted; all later
                tokens are scored too.
            after_last: also want the logits that follow the last token.
        """
        path: list[int] = []
        known, parent = self._known, -1
        for token in token_ids:
            key = (parent, token)
            node = known.get(key)
            if node is None:
                node = known[key] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(parent)
                self.wanted.append(False)
            path.append(node)
            parent = node
        for node in path[score_from : len(path) if after_last else -1]:
            self.wanted[node] = True
        self.paths.append(path)
        self.scored_from.append(score_from)
        return len(self.paths) - 1

    @property
    def most_read(self) -> int:
        """Most tokens that one sequence has to be read; the last one is only where it is wanted."""
        return max(
            (len(path) - (not self.wanted[path[-1]]) for path in self.paths if path), default=0
        )

    def children(self) -> list[list[int]]:
        """The nodes that follow each node."""
        following: list[list[int]] = [[] for _ in self.tokens]
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                following[parent].append(node)
        return following

    def to_read(self, children: list[list[int]]) -> list[bool]:
        """Whether each node must be read: its logits are wanted, or those of one after it."""
        read = list(self.wanted)
        for node in range(len(read) - 1, -1, -1):
            read[node] = read[node] or any(read[child] for child in children[node])
        return read
