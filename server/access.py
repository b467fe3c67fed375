"""Who may call what. Every call that is not known to read or to generate counts as one that writes.

| key that is set | reading, generating | writing | health |
|---|---|---|---|
| none | open | open | open |
| API key | API key | API key | open |
| admin key | open | admin key | open |
| both | either key | admin key | open |
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from server.schema.errors import ApiError

HEALTH = frozenset({"/health", "/health/live", "/health/ready"})
_READING_METHODS = frozenset({"GET", "HEAD"})
_READING_POSTS = re.compile(
    r"/v1/chat/completions|/v1/completions|/v1/generate|/tokenize|/detokenize"
    r"|/v1/steering/trace|/v1/capture|/v1/analyze/[^/]+"
)
_LOCAL_NAMES = ("localhost", "local", "internal")

Headers = Iterable[tuple[bytes, bytes]]


def writes(method: str, path: str) -> bool:
    """Whether a call may change what the server keeps: anything but GET and the POSTs that only read or generate."""
    return method not in _READING_METHODS and not (method == "POST" and _READING_POSTS.fullmatch(path))


@dataclass(frozen=True)
class Access:
    """The keys of a server. `local_only`: it has no API key and is meant for programs of this machine."""

    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    local_only: bool = False

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Raises ApiError: 401 for a missing or wrong key, 403 for one that may not do this, or a foreign host name."""
        if path in HEALTH:
            return
        fields = list(headers)
        if self.local_only and not all(_is_local(value) for name, value in fields if name == b"host"):
            raise ApiError(
                403,
                "Expected a Host header that names this machine; set --api-key to serve under other names.",
                code="host_not_allowed",
            )
        is_write = writes(method, path)
        needed = self.admin_key if is_write and self.admin_key else self.api_key
        if needed is None:
            return
        token = _token(fields)
        is_admin, is_user = _same(token, self.admin_key), _same(token, self.api_key)
        if is_admin or (is_user and needed == self.api_key):
            return
        if is_user:
            raise ApiError(403, "This call writes: expected the admin key.", code="admin_key_required")
        kind = "admin" if is_write and self.admin_key else "API"
        given = "another key" if token else "no key"
        raise ApiError(
            401,
            f"Expected the header Authorization: Bearer <{kind} key>, got {given}.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def _token(headers: Headers) -> bytes:
    """The bearer token; empty if there is none, or more than one header that could hold it."""
    given = [value for name, value in headers if name == b"authorization"]
    scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    return token.strip() if scheme.lower() == b"bearer" else b""


def _same(given: bytes, key: str | None) -> bool:
    """Whether `given` is `key`. The time it takes depends on neither: hashes of one length are compared."""
    if key is None:
        return False
    digests = (hashlib.sha256(text).digest() for text in (given, key.encode()))
    return hmac.compare_digest(*digests)


def _is_local(host: bytes) -> bool:
    """Whether a Host header cannot be a public name that someone else's DNS points at this machine: an address, a name
    without a dot, or one of a local domain."""
    name = host.decode("latin-1")
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    name = name.rstrip(".").lower()
    if "." not in name or name.rpartition(".")[2] in _LOCAL_NAMES:
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
