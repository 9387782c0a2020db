"""API keys: a file of names, keys and limits, and who a request is from.

# name   key                  limits, each of which may be left out
alice    sk-0123456789abcdef  concurrent=8 per_minute=600
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optlm.errors import RequestError
from optlm.serve.errors import ApiError

__all__ = ["ANYONE", "Client", "Keys", "read_keys"]

_MAX_FILE = 2**20
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_KEY = re.compile(r"[!-~]{16,256}")
_LIMIT = re.compile(r"(concurrent|per_minute)=([0-9]{1,9})")
_MAX_HEADER = 4096


@dataclass(frozen=True, kw_only=True)
class Client:
    """Who asks: a name for messages, and limits; None for none."""

    name: str
    concurrent: int | None = None
    per_minute: int | None = None


ANYONE = Client(name="anyone")


class Keys:
    """Keys and their owners. Only hashes are kept, and every one is compared with each time."""

    def __init__(self, clients: Sequence[tuple[str, Client]]) -> None:
        self._clients = [(_digest(key), client) for key, client in clients]

    def client_of(self, headers: Sequence[bytes]) -> Client:
        """Whose request it is.

        Args:
            headers: the values of all Authorization headers.

        Raises:
            ApiError: 401.
        """
        if len(headers) != 1:
            what = "is missing" if not headers else "was given twice"
            raise _unauthorized(f"the Authorization header {what}; send 'Bearer KEY' once")
        scheme, _, key = headers[0].partition(b" ")
        if scheme.lower() != b"bearer" or not key or len(key) > _MAX_HEADER:
            raise _unauthorized("the Authorization header must be 'Bearer KEY'")
        given, found = hashlib.sha256(key).digest(), None
        for digest, client in self._clients:
            if hmac.compare_digest(digest, given):
                found = client
        if found is None:
            raise _unauthorized("the API key is not known here")
        return found


def read_keys(path: str | Path) -> Keys:
    """Read a file of keys.

    Raises:
        RequestError: a line that is none, a name or key that stands twice, or no key at all.
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        raw = file.read(_MAX_FILE + 1)
    if len(raw) > _MAX_FILE:
        raise RequestError(f"{path} has more than {_MAX_FILE} bytes; that is no file of keys")
    try:
        lines = raw.decode("ascii").splitlines()
    except UnicodeDecodeError:
        raise RequestError(f"{path} has characters other than ASCII; keys are ASCII") from None
    clients: list[tuple[str, Client]] = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if words:
            clients.append(_client(words, f"{path}, line {number}"))
    for what, values in (
        ("name", [client.name for _, client in clients]),
        ("key", [key for key, _ in clients]),
    ):
        if len(set(values)) < len(values):
            raise RequestError(f"{path} has a {what} twice")
    if not clients:
        raise RequestError(f"{path} has no key; a line is: NAME KEY [concurrent=N] [per_minute=N]")
    return Keys(clients)


def _client(words: list[str], where: str) -> tuple[str, Client]:
    limits = [_LIMIT.fullmatch(word) for word in words[2:]]
    if len(words) < 2 or not _NAME.fullmatch(words[0]) or None in limits:
        raise RequestError(f"{where}: a line is: NAME KEY [concurrent=N] [per_minute=N]")
    if not _KEY.fullmatch(words[1]):
        raise RequestError(f"{where}: a key has 16 to 256 characters without spaces")
    values = {match[1]: int(match[2]) for match in limits if match is not None}
    return words[1], Client(name=words[0], **values)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
