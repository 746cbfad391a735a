"""Rules by name: registration, JSON, and the text that identifies a configuration.

Everything in this file works on any frozen dataclass and knows no rule, so ``base`` can register a
rule at the moment its class is defined.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from moe_jax.routing.gate import Gate
from moe_jax.routing.scoring import Scoring

# Rules that only one published model uses. They live above this package, which must not import them,
# and most programs never need them: they are imported when their name is first looked up.
_SINGLE_MODELS = "moe_jax.interop.rules"
LAZY_RULES: dict[str, str] = {
    name: f"{_SINGLE_MODELS}:{name}"
    for name in (
        "CapacityTopK",
        "DepthRouter",
        "JointShared",
        "MoEPlusPlus",
        "NullExperts",
        "ProductKeys",
        "SparseMixer",
        "TokenTable",
        "ZeroExperts",
    )
}

# Fields that hold a dataclass. JSON has no types, so the field's name decides.
_NESTED: dict[str, type] = {"gate": Gate, "scoring": Scoring}

_registered: dict[str, type[Any]] = {}


def register_rule(cls: type[Any]) -> None:
    """Makes a rule available under its class name.

    The last definition of a name wins, so that a notebook cell may be run again.
    """
    _registered[cls.__name__] = cls


def registered_rules() -> dict[str, type[Any]]:
    """Returns the rules imported or defined so far, by name."""
    return dict(_registered)


def known_kinds() -> list[str]:
    """Returns the names that ``rule_class`` resolves, sorted."""
    return sorted(_registered.keys() | LAZY_RULES.keys())


def rule_class(kind: str, module: str | None = None) -> type[Any]:
    """Returns the rule of this name. Imports its module if it is a rule of a single model.

    ``module`` defines the rule, if that is known. It is named in the message and never imported: a
    file must not decide which code runs.

    Raises:
        ValueError: no rule has this name.

    Example:
        >>> rule_class("ZeroExperts").__module__
        'moe_jax.interop.rules.zero_experts'
    """
    if kind not in _registered and kind in LAZY_RULES:
        module, _, name = LAZY_RULES[kind].partition(":")
        # The class registers itself when its module is executed; if the name was registered and
        # replaced before (say by a test), the module's attribute is still the rule.
        return getattr(importlib.import_module(module), name)
    if kind not in _registered:
        raise ValueError(_unknown_kind(kind, module))
    return _registered[kind]


def _unknown_kind(kind: str, module: str | None) -> str:
    if module is not None:
        return (
            f"rule: expected one that is defined, got {kind!r} of the module {module}, which is not "
            f"imported. Write moe-jax --import {module} before the command's name, in the folder "
            f"that holds it, or in Python: import {module}."
        )
    names = {name.lower(): name for name in known_kinds()}
    near = [names[word] for word in difflib.get_close_matches(kind.lower(), names, n=2)]
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(known_kinds())}."
    return (
        f"rule: expected the name of a rule, got {kind!r}. {hint} A rule of your own is chosen as "
        "module:Class. To read what was saved with one, import its module first: "
        "moe-jax --import MODULE before the command's name, or import in Python."
    )


def load_rule(path: str) -> Any:
    """Imports a rule of your own by ``module:Class`` (or ``module:value``, a rule that is built).

    Raises:
        ValueError: no such module or name, or it is no rule; the message says which.

    Example:
        >>> load_rule("moe_jax.routers:MinP").__name__
        'MinP'
    """
    module, _, name = path.partition(":")
    try:
        value = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"rule: expected module:Class of a rule that can be imported, got {path!r}: {error}. Give "
            "the module as in an import, and run where it is importable."
        ) from None
    cls = value if isinstance(value, type) else type(value)
    # `base` imports this file, so a rule is recognised by its registration.
    if not any(cls is rule for rule in _registered.values()):
        raise ValueError(
            f"rule: expected a routing rule at {path!r}, got {value!r}. Derive it from "
            "moe_jax.routers.TokenChoice, see docs/write_a_rule.md."
        )
    return value


def to_json(rule: Any) -> dict[str, Any]:
    """Returns a JSON object with ``kind`` and every field of a rule.

    A rule that is not the library's has its ``module`` too, for the message where it is not imported.

    Raises:
        TypeError: a field is a function, such as an estimator that is not registered.
    """
    module = {"module": type(rule).__module__} if _has_module(type(rule)) else {}
    return {"kind": type(rule).__name__, **module, **_fields_to_json(rule)}


def _has_module(cls: type[Any]) -> bool:
    """Whether ``to_json`` notes the module: not for the library's rules, nor for those of a script."""
    if cls.__module__ == "__main__" or cls.__module__.startswith("moe_jax."):
        return False
    return "module" not in {f.name for f in dataclasses.fields(cls)}


def from_json(data: Any) -> Any:
    """Returns the rule that ``to_json`` described.

    Raises:
        ValueError: an unknown kind or field, or a missing field. The message lists the known ones.
    """
    if not isinstance(data, Mapping):
        raise ValueError(
            f"router: expected a JSON object with 'kind', got a {type(data).__name__}. "
            "Pass what to_json returned."
        )
    fields = dict(data)
    kind = fields.pop("kind", None)
    if not isinstance(kind, str):
        raise ValueError(
            f"router kind: expected one of {', '.join(known_kinds())}, got {kind!r}. "
            "Give the name of a rule under 'kind'."
        )
    module = fields.get("module")
    cls = rule_class(kind, module if isinstance(module, str) else None)
    if _has_module(cls):
        fields.pop("module", None)
    return _fields_from_json(cls, fields)


def identity(rule: Any) -> str:
    """Returns the kind and the fields that differ from their defaults, as text.

    The text is the same in every process; a function appears by its module and name.
    """
    return json.dumps({"kind": type(rule).__name__, **_changed_fields(rule)}, sort_keys=True)


def fingerprint(rule: Any) -> str:
    """Returns 32 hex digits of SHA-256 over ``identity``.

    Equal configurations have equal fingerprints. A field that a later version adds changes no
    fingerprint as long as it is at its default.

    Raises:
        TypeError: a field is a function, which has no value to compare.
    """
    to_json(rule)  # raises where a field is a function
    return hashlib.sha256(identity(rule).encode()).hexdigest()[:32]


def short_repr(value: Any) -> str:
    """Returns a frozen dataclass as text, with only the fields that differ from their defaults.

    Example:
        >>> short_repr(Scoring(norm="sum"))
        "Scoring(norm='sum')"
    """
    shown = []
    for f in dataclasses.fields(value):
        v = getattr(value, f.name)
        if v == f.default:
            continue
        shown.append(f"{f.name}={short_repr(v) if dataclasses.is_dataclass(v) else repr(v)}")
    return f"{type(value).__name__}({', '.join(shown)})"


def _changed_fields(value: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        v = getattr(value, f.name)
        if v == f.default:
            continue
        if dataclasses.is_dataclass(v):
            v = _changed_fields(v)
        elif callable(v):
            v = f"{v.__module__}.{getattr(v, '__qualname__', type(v).__qualname__)}"
        out[f.name] = _python_value(v)
    return out


def _fields_to_json(value: Any) -> dict[str, Any]:
    out = {}
    for f in dataclasses.fields(value):
        v = getattr(value, f.name)
        if dataclasses.is_dataclass(v):
            v = _fields_to_json(v)
        elif callable(v):
            raise TypeError(
                f"{f.name}: expected a value that JSON can hold, got the function {v!r}. "
                "Register it (moe_jax.routing.difficulty.register_estimator) and refer to it by name."
            )
        out[f.name] = _python_value(v)
    return out


def _python_value(value: Any) -> Any:
    """A field as JSON holds it: a tuple becomes a list, and a NumPy number a Python one."""
    if isinstance(value, tuple | list):
        return [_python_value(one) for one in value]
    return value.item() if isinstance(value, np.generic) else value


def _fields_from_json(cls: type, data: dict[str, Any]) -> Any:
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(data) - set(names))
    if unknown:
        raise ValueError(
            f"{cls.__name__}: expected fields among {', '.join(names)}, got {', '.join(unknown)}. "
            "Remove them, or use the version of the library that wrote them."
        )
    values = {}
    for name, v in data.items():
        if isinstance(v, dict) != (name in _NESTED):
            wanted = "an object" if name in _NESTED else "a plain value"
            raise ValueError(
                f"{cls.__name__}.{name}: expected {wanted}, got {v!r}. Write it as to_json does."
            )
        if isinstance(v, dict):
            v = _fields_from_json(_NESTED[name], v)
        elif isinstance(v, list):
            v = tuple(v)
        values[name] = v
    try:
        return cls(**values)
    except TypeError as error:  # a field without a default is missing, or a value has a wrong type
        raise ValueError(
            f"{cls.__name__}: expected the fields that to_json writes, got {sorted(values)}: "
            f"{str(error).rstrip('.')}. Add what is missing, or correct its type."
        ) from None
