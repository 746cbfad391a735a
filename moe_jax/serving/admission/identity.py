"""Who a request is from, and whether its key is one that we gave out."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Sequence


def client_id(api_key: str) -> str:
    """The identity of a key's holder: a hash, so that neither logs nor Redis hold the key.

    Example:
        >>> client_id("secret").startswith("key-"), "secret" in client_id("secret")
        (True, False)
    """
    return "key-" + hashlib.sha256(b"moe-client" + api_key.encode()).hexdigest()[:24]


class Keys:
    """The keys that were given out. Comparing takes as long for a near miss as for a far one.

    Example:
        >>> keys = Keys(["one", "two"])
        >>> keys.valid("two"), keys.valid("three"), keys.valid(None)
        (True, False, False)
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def __repr__(self) -> str:
        return f"Keys({len(self._digests)} of them)"

    def valid(self, key: str | None) -> bool:
        """Whether the key is one of these. Every one of them is compared, whatever comes."""
        digest = hashlib.sha256((key or "").encode("utf-8", "surrogateescape")).digest()
        found = False
        for known in self._digests:
            found |= hmac.compare_digest(known, digest)
        return found and key is not None


def peer_address(peer: str, forwarded_for: str | None, trusted: Sequence[str]) -> str:
    """The address that a request is counted under.

    Args:
        peer: the address that the connection comes from.
        forwarded_for: the ``X-Forwarded-For`` header, believed only from a trusted peer, and from
            right to left only as far as the proxies in it are trusted too: whoever is further left
            may have been made up by the client.
        trusted: networks of our own proxies.

    Returns:
        An IPv4 address, or the /64 network of an IPv6 one: a subscriber has all of it.

    Example:
        >>> peer_address("10.0.0.1", "6.6.6.6, 192.0.2.7, 10.0.0.2", ["10.0.0.0/8"])
        '192.0.2.7'
        >>> peer_address("192.0.2.9", "127.0.0.1", ["10.0.0.0/8"])
        '192.0.2.9'
    """
    networks = [ipaddress.ip_network(network, strict=False) for network in trusted]

    def is_trusted(address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in networks)

    found = peer
    if networks and forwarded_for and is_trusted(peer):
        for hop in reversed([part.strip() for part in forwarded_for.split(",")][-32:]):
            if not _is_address(hop):
                break
            found = hop
            if not is_trusted(hop):
                break
    if not _is_address(found):
        return found[:64] or "unknown"
    address = ipaddress.ip_address(found)
    if address.version == 6:
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
