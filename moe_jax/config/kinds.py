"""The ranges and kinds of settings, and the messages about bad values."""

from __future__ import annotations

import dataclasses
import difflib
import ipaddress
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from moe_jax.routing.difficulty import ESTIMATORS

# The guide's word -> the library's estimator. A word that is missing here passes through as it is.
# "gradient_norm" is the one word that both know and mean differently; see build_router.
ESTIMATOR_WORDS = MappingProxyType(
    {
        "gradient_norm": "activation_norm",
        "perplexity_proxy": "surprisal",
        "threshold": "large_activation_share",
    }
)


class ConfigError(ValueError):
    """A configuration that cannot be used. The message names every problem, one per line."""


class ConfigFileError(ConfigError):
    """A configuration file was named that does not exist or cannot be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextKind:
    """A kind of text setting.

    Attributes:
        allowed: the sentence part that follows "expected".
        problem: what came instead, as the part that follows "got", or None for a good text. It
            never repeats a secret.
    """

    allowed: str
    problem: Callable[[str], str | None]


def setting(
    default: Any,
    fix: str,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    choices: tuple[str, ...] = (),
    text: TextKind | None = None,
    secret: bool = False,
) -> Any:
    """Returns a dataclass field with its range.

    Args:
        default: the default value; its type is the type of the setting.
        fix: the sentence that says what an operator does about a bad value.
        low, high: the range of a number, both ends included.
        choices: the words that a text may be.
        text: what a free text may hold.
        secret: keeps the value out of repr, JSON, hash and messages.
    """
    metadata = {
        "fix": fix,
        "low": low,
        "high": high,
        "choices": choices,
        "text": text,
        "secret": secret,
    }
    return dataclasses.field(
        default=default, metadata=metadata, repr=not secret, compare=not secret
    )


EXPERT_COUNTS = ("min_experts", "max_experts", "num_experts")


def check_fields(section: Any, prefix: str) -> None:
    """Checks every setting of a section and widens ints where floats are meant. Raises ConfigError."""
    for field in dataclasses.fields(section):
        if field.metadata:
            value = checked(field, getattr(section, field.name), prefix + field.name)
            object.__setattr__(section, field.name, value)


def checked(field: dataclasses.Field[Any], value: Any, origin: str) -> Any:
    """The value, an int widened where a float is meant. Raises ConfigError."""
    kind, text = type(field.default), field.metadata["text"]
    if kind is float and type(value) is int:
        try:
            value = float(value)
        except OverflowError:  # JSON knows whole numbers of any length
            raise ConfigError(bad_value(origin, shown(value), field)) from None
    if type(value) is not kind:
        got = "something else" if field.metadata["secret"] else shown(value)
    elif kind is bool:
        return value
    elif text is not None:
        got = text.problem(value)
        if got is None:
            return value
    elif kind is str:
        if value in choices_of(field):
            return value
        got = shown(value)
    elif field.metadata["low"] <= value <= field.metadata["high"]:
        return value
    else:
        got = shown(value)
    hint = value if isinstance(value, str) else ""
    raise ConfigError(bad_value(origin, got, field, hint))


# --- kinds of text --------------------------------------------------------------------------


def split_words(text: str) -> list[str]:
    """The entries of a list separated by commas, without the empty ones."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _line(text: str) -> str | None:
    if len(text) > 4096:
        return f"{len(text)} characters"
    if not text.isprintable():
        return "a line break or another control character"
    return "nothing but blanks" if text and not text.strip() else None


def _plain_line(text: str) -> str | None:
    # A control character is named by its escape: the text is no secret.
    return None if _line(text) is None else shown(text)


_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


def _host(text: str) -> str | None:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        labels = text.removesuffix(".").split(".")
        named = len(text) <= 253 and all(_LABEL.fullmatch(label) for label in labels)
        # Resolvers read a last label of digits as an IPv4 address, and this text is not a valid one.
        return None if named and not labels[-1].isdigit() else shown(text)
    return None


def _list_of(problem: Callable[[str], bool], what: str, most: int = 4096) -> Callable[..., Any]:
    """Judges a list separated by commas: empty, or with an entry, all of which are good."""

    def judge(text: str) -> str | None:
        words = split_words(text)
        if text and not words:
            return f"no {what} between the commas" if "," in text else "nothing but blanks"
        bad = [word for word in words if problem(word)]
        if bad:
            return shown(bad[0])
        return f"{len(words)} of them" if len(words) > most else None

    return judge


def _bad_network(word: str) -> bool:
    try:
        ipaddress.ip_network(word, strict=False)
    except ValueError:
        return True
    return False


def _bad_bucket(word: str) -> bool:
    return not (word.isascii() and word.isdigit() and 0 < int(word[:10]) <= 2**24)


_KEY = re.compile(r"[!-~]+")  # what an HTTP header carries as one word


def _keys(text: str) -> str | None:
    if _line(text) is not None:
        return _line(text)
    words = split_words(text)
    if text and not words:
        return "no key between the commas"
    bad = [number for number, word in enumerate(words, 1) if not _KEY.fullmatch(word)]
    return f"key {bad[0]} of {len(words)} with a blank or another character" if bad else None


def _key(text: str) -> str | None:
    if _line(text) is not None:
        return _line(text)
    return None if not text or _KEY.fullmatch(text) else "one with a blank or another character"


def _redis_url(text: str) -> str | None:
    """Shows scheme, host and port of a bad one alone: user, password and query stay hidden."""
    if not text or _line(text) is not None:
        return _line(text)
    if "://" not in text:
        return "a text without ://"
    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port
    except ValueError:
        return "a host or port that cannot be read"
    where = f"{url.scheme}://{host or ''}" + (f":{port}" if port is not None else "")
    if url.scheme == "unix":
        return None if url.path else f"{where} without a path"
    if url.scheme not in ("redis", "rediss"):
        return where
    if not host:
        return f"{where} without a host"
    database = url.path.strip("/")
    return None if not database or database.isdigit() else f"{where}/ with a database by name"


LINE = TextKind(allowed="a line of text", problem=_plain_line)
HOST = TextKind(allowed="an IP address or a host name", problem=_host)
NETWORKS = TextKind(
    allowed="addresses or networks separated by commas",
    problem=_list_of(_bad_network, "network"),
)
BUCKETS = TextKind(
    allowed=f"up to 32 whole numbers from 1 to {2**24}, separated by commas",
    problem=_list_of(_bad_bucket, "number", most=32),
)
KEYS = TextKind(
    allowed="keys of printable ASCII without blanks, separated by commas", problem=_keys
)
KEY = TextKind(allowed="a key of printable ASCII without blanks", problem=_key)
REDIS_URL = TextKind(
    allowed="redis://host:port/0, rediss://host:port/0 or unix://path", problem=_redis_url
)


def choices_of(field: dataclasses.Field[Any]) -> tuple[str, ...]:
    """The words that a field may hold; () where it is no choice of words."""
    if field.name != "complexity_estimator":
        return field.metadata["choices"]
    # Looked up late, so that an estimator of the user's own can be named in a file.
    return tuple(sorted({*ESTIMATOR_WORDS, *ESTIMATORS}))


def _allowed(field: dataclasses.Field[Any]) -> str:
    if isinstance(field.default, bool):
        return "true or false"
    if field.metadata["text"] is not None:
        return field.metadata["text"].allowed
    if isinstance(field.default, str):
        return "one of " + ", ".join(choices_of(field))
    low, high = field.metadata["low"], field.metadata["high"]
    kind = "a whole number" if isinstance(field.default, int) else "a number"
    return f"{kind} from {low} to {high}"


def bad_value(origin: str, got: str, field: dataclasses.Field[Any], word: str = "") -> str:
    """The message about a bad value: where it came from, what is allowed, what came, what to do.

    ``got`` is ready to print, see ``shown``; a ``word`` is compared with the choices of the field.
    """
    near = difflib.get_close_matches(word, choices_of(field), n=1)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{origin}: expected {_allowed(field)}, got {got}. {hint}{field.metadata['fix']}"


def experts_problem(counts: Any, origins: Mapping[str, str]) -> str:
    """The message about numbers of experts that contradict each other, with their origins."""
    values = counts if isinstance(counts, Mapping) else dataclasses.asdict(counts)
    got = ", ".join(
        f"{name}={values[name]}" + (f" ({origins.get(name, 'default')})" if origins else "")
        for name in EXPERT_COUNTS
    )
    return (
        f"router_config: expected min_experts <= max_experts <= num_experts, got {got}. "
        "Lower the first or raise the last."
    )


def unknown_name(
    origin: str, name: str, accepted: Iterable[str], otherwise: str, prefix: str = ""
) -> str:
    """The message about a name that does not exist, with the nearest one that does.

    ``prefix`` is what all names begin with; it is left out of the comparison.
    """
    by_case = {word.lower().removeprefix(prefix.lower()): word for word in accepted}
    near = difflib.get_close_matches(name.lower().removeprefix(prefix.lower()), by_case, n=1)
    hint = (
        f"Did you mean {by_case[near[0]]}?"
        if near
        else f"{otherwise} Known: {', '.join(by_case.values())}."
    )
    return f"{origin}: expected a known name, got {name!r}. {hint}"


def shown(value: Any) -> str:
    """Returns a value as JSON where JSON can hold it, cut to 80 characters."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        try:
            text = repr(value)
        except ValueError:  # Python prints no whole number of more than 4,300 digits
            text = f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."
