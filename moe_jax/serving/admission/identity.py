"""Identity of a client: its API key, or the address that its request comes from."""

from __future__ import annotations

import functools
import hashlib
import hmac
import ipaddress
from collections.abc import Sequence

# Longest chain of proxies that is followed; what is further left in the header is never read.
_MOST_HOPS = 32

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


def client_id(api_key: str) -> str:
    """Returns the identity of a key's holder: a hash, so that neither logs nor Redis hold the key.

    Example:
        >>> client_id("secret").startswith("key-"), "secret" in client_id("secret")
        (True, False)
    """
    return "key-" + hashlib.sha256(b"moe-client" + api_key.encode()).hexdigest()[:24]


class Keys:
    """The valid keys. A comparison takes the same time however much of a wrong key is right.

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
        return f"Keys({len(self._digests)} keys)"

    def valid(self, key: str | None) -> bool:
        """Returns whether ``key`` is valid. Compares it with all keys, so the time tells nothing."""
        digest = hashlib.sha256((key or "").encode("utf-8", "surrogateescape")).digest()
        matches = False
        for valid in self._digests:
            matches |= hmac.compare_digest(valid, digest)
        return matches and key is not None


@functools.lru_cache(maxsize=4096)
def parse_address(text: str) -> IPAddress | None:
    """Returns the IP address in ``text``, or None if it holds none.

    Proxies write one address in many ways. All of them give the same result, so that one
    client does not count as several, and a trusted proxy is recognised however the socket reports it:
    with a port, in brackets, in quotes, with a zone (``%eth0``), or as an IPv4-mapped IPv6 address.

    Example:
        >>> parse_address("203.0.113.7:52344"), parse_address("[2001:db8::9]:443")
        (IPv4Address('203.0.113.7'), IPv6Address('2001:db8::9'))
        >>> parse_address("::ffff:10.0.0.1"), parse_address("unknown") is None
        (IPv4Address('10.0.0.1'), True)
    """
    text = text.strip().strip('"').strip()
    if text[:1] == "[":
        text, bracket, port = text[1:].partition("]")
        if not bracket or (port and not (port[0] == ":" and _is_port(port[1:]))):
            return None
    elif text.count(":") == 1:  # an IPv6 address has at least two colons
        text, _, port = text.partition(":")
        if not _is_port(port):
            return None
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    if address.version == 6 and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5


def _parse_network(text: str) -> IPNetwork:
    network = ipaddress.ip_network(text, strict=False)
    if network.version == 6 and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.ip_network((mapped, network.prefixlen - 96))
    return network


class TrustedProxies:
    """Networks whose ``X-Forwarded-For`` header is believed.

    Args:
        networks: addresses or networks, such as ``10.0.0.0/8``.

    Raises:
        ValueError: a text is neither an address nor a network.

    Example:
        >>> proxies = TrustedProxies(["10.0.0.0/8"])
        >>> proxies.client_address("10.0.0.1", "6.6.6.6, 192.0.2.7, 10.0.0.2")
        '192.0.2.7'
        >>> proxies.client_address("192.0.2.9", "127.0.0.1")
        '192.0.2.9'
        >>> proxies.client_address("10.0.0.1", "[2001:db8:1:2::9]:443")
        '2001:db8:1:2::/64'
    """

    def __init__(self, networks: Sequence[str]) -> None:
        self._networks = tuple(_parse_network(network) for network in networks)
        # Requests come from few proxies, and each proxy speaks for many clients.
        self._trusts = functools.lru_cache(maxsize=4096)(self._in_a_network)

    def __bool__(self) -> bool:
        return bool(self._networks)

    def trusts(self, peer: str) -> bool:
        """Returns whether ``peer``, the address of a connection, is a trusted proxy."""
        return self._trusts(peer)

    def _in_a_network(self, text: str) -> bool:
        address = parse_address(text)
        return address is not None and any(address in network for network in self._networks)

    def client_address(self, peer: str, forwarded_for: str | None) -> str:
        """Returns the address under which a request is counted.

        Each proxy appends the address that it was reached from, so the header is read from right
        to left, and only as long as the address that wrote an entry is trusted. The client may
        have made up everything further left.

        Args:
            peer: address of the connection.
            forwarded_for: the ``X-Forwarded-For`` header, its lines joined by commas; None if absent.

        Returns:
            An IPv4 address, or the /64 network of an IPv6 address, because one subscriber is
            assigned a whole /64. ``peer`` itself, cut to 64 characters, if it is not an IP address.
        """
        hop = peer
        if forwarded_for and self._networks and self._trusts(peer):
            # Empty elements of a list are ignored (RFC 9110, 5.6.1).
            for entry in reversed(forwarded_for.rsplit(",", _MOST_HOPS)[-_MOST_HOPS:]):
                entry = entry.strip()
                if not entry:
                    continue
                if len(entry) > 64 or parse_address(entry) is None:
                    break
                hop = entry
                if not self._trusts(entry):
                    break
        return _counted_as(hop)


@functools.lru_cache(maxsize=4096)
def _counted_as(peer: str) -> str:
    address = parse_address(peer)
    if address is None:
        return peer[:64] or "unknown"
    if address.version == 6:
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)
