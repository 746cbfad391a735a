"""Who asks, and under which name a request is followed: keys, addresses, request and trace ids."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Sequence

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
# W3C Trace Context: version, trace id, parent id, flags, all lower-case hex.
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def key_id(key: str) -> str:
    """A name for an API key that does not give the key away.

    Example:
        >>> key_id("secret")[:8], len(key_id("secret"))
        ('key:2bb8', 20)
    """
    return "key:" + hashlib.sha256(key.encode()).hexdigest()[:16]


def matching_key(given: str, keys: Sequence[str]) -> str | None:
    """The one of ``keys`` that was given. Takes as long whichever it is, or none.

    Example:
        >>> matching_key("b", ["a", "b"]), matching_key("c", ["a", "b"])
        ('b', None)
    """
    found = None
    offered = given.encode("utf-8", "surrogateescape")
    for key in keys:
        if hmac.compare_digest(offered, key.encode()):
            found = key
    return found


def presented_key(authorization: str | None, api_key: str | None) -> str | None:
    """The key of ``Authorization: Bearer KEY`` or ``X-API-Key: KEY``; None where there is none.

    Example:
        >>> presented_key("Bearer abc", None), presented_key(None, "abc"), presented_key("Basic", None)
        ('abc', 'abc', None)
    """
    if authorization is not None:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() == "bearer" and key.strip():
            return key.strip()
    return api_key.strip() if api_key and api_key.strip() else None


def networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Addresses and networks of trusted proxies. Raises ValueError for what is neither."""
    return tuple(ipaddress.ip_network(text, strict=False) for text in texts)


def peer_address(peer: str | None, forwarded_for: str | None, trusted: Sequence[Network]) -> str:
    """The address that a request came from.

    ``X-Forwarded-For`` is read from the right, and only as long as each hop is a trusted proxy:
    what is further left is the client's own claim.

    Example:
        >>> trusted = networks(["10.0.0.0/8"])
        >>> peer_address("10.0.0.1", "6.6.6.6, 1.2.3.4", trusted)
        '1.2.3.4'
        >>> peer_address("1.2.3.4", "6.6.6.6", trusted), peer_address(None, None, ())
        ('1.2.3.4', 'unknown')
    """
    address = _normal(peer or "")
    if address is None:
        return "unknown"
    if not trusted or not forwarded_for:
        return str(address)
    for hop in reversed(forwarded_for.split(",")[-32:]):
        if not any(address in network for network in trusted):
            break
        further = _normal(hop.strip())
        if further is None:
            break
        address = further
    return str(address)


def _normal(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    # A dual-stack socket shows IPv4 peers as ::ffff:1.2.3.4: the same client, so the same name.
    mapped = getattr(address, "ipv4_mapped", None)
    return mapped or address


def client_network(address: str) -> str:
    """What limits count by: an IPv4 address, or the /64 that one IPv6 customer has whole.

    Example:
        >>> client_network("1.2.3.4"), client_network("2001:db8::5:6")
        ('1.2.3.4', '2001:db8::/64')
    """
    normal = _normal(address)
    if isinstance(normal, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((normal, 64), strict=False))
    return address


def request_id(given: str | None) -> str:
    """The client's ``X-Request-Id`` where it is a plain word, else a new one.

    Example:
        >>> request_id("abc-1"), len(request_id("bad id")), len(request_id(None))
        ('abc-1', 32, 32)
    """
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return secrets.token_hex(16)


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """A W3C trace context, as far as logs need it."""

    trace_id: str
    parent_id: str


def trace_of(traceparent: str | None) -> Trace | None:
    """The trace of a ``traceparent`` header (W3C Trace Context); None where it is missing or invalid.

    Example:
        >>> trace_of("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").parent_id
        'b7ad6b7169203331'
        >>> trace_of("00-00000000000000000000000000000000-b7ad6b7169203331-01") is None
        True
    """
    match = _TRACEPARENT.fullmatch(traceparent or "")
    if match is None:
        return None
    version, trace_id, parent_id, _, more = match.groups()
    if version == "ff" or (version == "00" and more) or not int(trace_id, 16) or \
            not int(parent_id, 16):  # fmt: skip
        return None
    return Trace(trace_id, parent_id)
