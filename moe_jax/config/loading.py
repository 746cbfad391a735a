"""Loading of settings: arguments over the environment over a file over defaults."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_jax.config.kinds import (
    ConfigError,
    ConfigFileError,
    choices_of,
    unknown_name,
)
from moe_jax.config.settings import SETTINGS, Config, build_config, from_nested

ENV_PREFIX = "MOE_"


def load_config(
    file: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    base: Config | None = None,
    **overrides: Any,
) -> Config:
    """Returns the configuration from arguments, environment, file and defaults, in this order.

    Args:
        file: a JSON file in the form of ``configs/production.json``; it may leave keys out.
        env: the environment; None reads the process's, ``{}`` ignores it. Variables that do not
            start with ``MOE_`` are not looked at.
        base: a configuration, e.g. a preset, that stands in place of the defaults.
        **overrides: any setting by its own name, e.g. ``num_experts=16``. None means not given,
            so that a command line can pass its options as they are.

    Raises:
        ConfigError: a file that cannot be read, an unknown key, variable or argument, a value of
            the wrong type or out of range, or values that contradict each other. Every problem is
            listed, with where it came from.

    Example:
        >>> config = load_config(env={"MOE_NUM_EXPERTS": "16"}, max_experts=6)
        >>> config.router_config.num_experts, config.router_config.max_experts
        (16, 6)
    """
    problems: list[str] = []
    given: dict[str, tuple[Any, str]] = {}
    if base is not None:
        given |= from_nested(base.to_json(), " in the preset", problems)
    unreadable: ConfigError | None = None
    if file is not None:
        path = Path(file)
        try:
            given |= from_nested(_read_json(path), f" in {path}", problems)
        except ConfigError as error:  # one problem of perhaps several: the others are named with it
            unreadable = error
            problems.append(str(error))
    given |= _from_environment(_process_environment() if env is None else env, problems)
    for name, value in overrides.items():
        if name not in SETTINGS:
            problems.append(unknown_name(f"argument {name}", name, SETTINGS, "Remove it."))
        elif value is not None:
            given[name] = (value, f"argument {name}")
    try:
        return build_config(given, problems, complete=unreadable is None)
    except ConfigError as error:
        if isinstance(unreadable, ConfigFileError):
            raise ConfigFileError(str(error)) from unreadable
        raise


def _process_environment() -> Mapping[str, str]:
    """The only place in the library that reads the environment."""
    return os.environ


def _from_environment(env: Mapping[str, str], problems: list[str]) -> dict[str, tuple[Any, str]]:
    given: dict[str, tuple[Any, str]] = {}
    variables = {ENV_PREFIX + name.upper(): name for name in SETTINGS}
    for variable in sorted(v for v in env if v.startswith(ENV_PREFIX)):
        if variable not in variables:
            problems.append(unknown_name(variable, variable, variables, "Unset it.", ENV_PREFIX))
            continue
        name = variables[variable]
        given[name] = (_parse(SETTINGS[name][1], env[variable]), variable)
    return given


def _parse(field: dataclasses.Field[Any], text: str) -> Any:
    """Returns the text of a variable as the field's type.

    Text that is not of this type is returned unchanged, and the section's check refuses it by name.
    """
    word = text.strip()
    if isinstance(field.default, bool):
        if word.lower() in ("true", "1", "yes", "on"):
            return True
        return False if word.lower() in ("false", "0", "no", "off") else text
    if isinstance(field.default, int | float):
        try:
            return type(field.default)(word)
        except ValueError:
            return text
    if field.metadata["text"] is not None:
        return word or text  # blanks are kept: they are refused, and must not mean "not set"
    # "debug" and "Strict" are clear enough when typed into a shell.
    return next((c for c in choices_of(field) if c.lower() == word.lower()), word)


def _read_json(path: Path) -> Any:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in items]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"{path}: expected every key once, got {', '.join(twice)} more than once. "
                "Keep one of them."
            )
        return dict(items)

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            got = "nothing there"
        elif isinstance(error, IsADirectoryError):
            got = "a folder"
        else:
            got = f"one that cannot be read ({error.strerror})"
        raise ConfigFileError(
            f"{path}: expected a readable JSON file, got {got}. "
            "Check the path, the permissions and, in a container, the mount."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: expected a JSON file in UTF-8, got {type(error).__name__}: {error}. "
            "Check the path, or write the file again."
        ) from error
    if not text.strip():
        raise ConfigError(
            f"{path}: expected JSON, got an empty file. Write {{}} for the defaults, or begin with a "
            "copy of configs/production.json."
        )
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}: expected JSON, got {error.msg} at line {error.lineno} column {error.colno}. "
            "Correct that line."
        ) from error
    except ValueError as error:  # a whole number of more digits than Python reads
        raise ConfigError(
            f"{path}: expected JSON, got a number that is too long ({error}). Correct the number."
        ) from error
    except RecursionError as error:
        raise ConfigError(
            f"{path}: expected a JSON object of objects, got one nested without end. "
            "See configs/production.json."
        ) from error
