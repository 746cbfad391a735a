"""The structure of the package: which room stands on which floor, what it may import, and figures.

``python -m tests.architecture`` prints the figures. ``tests/test_architecture.py`` holds the rules.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# A room is a module or package directly under moe_jax (under moe_jax.serving for the service). It may
# import its own modules and rooms of lower floors, nothing else of moe_jax.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("types", "checks"),
    ("routing",),
    ("routers", "experts"),
    ("layer",),
    ("parallel", "config", "interop", "serving.errors"),
    ("nn", "checkpoint"),
    ("models",),
    ("lab", "serving.admission", "serving.cache", "serving.resilience", "serving.metrics"),
    ("serving.engine",),
    ("serving.http", "testing"),
    ("bench",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Not part of any floor: "public names, one screen, nothing else".
FRONT_DOORS = {"__init__", "__main__", "serving"}

_MATHS = {"types", "checks", "routing", "routers", "experts", "layer"}
_PARTS = {"serving.admission", "serving.cache", "serving.resilience", "serving.metrics"}
_SERVICE = _PARTS | {"serving.errors", "serving.engine", "serving.http"}

# Libraries that a room may use besides the standard library; a room that is not listed may use any.
LIBRARIES = {room: {"jax", "numpy", "chex"} for room in _MATHS}
# Libraries and standard modules that a room must never import.
NEVER_LIBRARIES = {
    **{
        room: {"flax", "orbax", "optax", "os", "time", "logging", "threading"}
        for room in _MATHS - {"types", "checks"}
    },
    **{room: {"jax", "flax", "orbax"} for room in _PARTS},
}
# Rooms of lower floors that a room must never import all the same.
NEVER_ROOMS = {
    **{room: set(FLOOR_OF) - {"serving.errors"} for room in _PARTS},
    "serving.errors": set(FLOOR_OF),
    "serving.engine": {"lab"},
    "serving.http": {"routing", "routers", "experts", "layer", "lab"},
    "cli": {"routing", "routers", "experts", "layer"},
    **{
        room: _SERVICE for room in FLOOR_OF if room not in _SERVICE and room not in ("cli", "bench")
    },
}


def modules(root: Path = ROOT) -> dict[str, str]:
    """Dotted name under moe_jax -> source, of every module; a package is named without __init__."""
    found = {}
    for path in sorted((root / "moe_jax").rglob("*.py")):
        parts = path.relative_to(root / "moe_jax").with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path.read_text()
    return found


def room_of(name: str) -> str:
    """The room that a dotted name under moe_jax belongs to."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "serving" else parts[0]


def imports(source: str) -> list[str]:
    """Every imported name, dotted, wherever in the file it is; type-only imports included."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from moe_jax import layer` imports a module, `from moe_jax.layer import LayerAux` a name.
            deeper = node.module in ("moe_jax", "moe_jax.serving")
            found += [f"{node.module}.{a.name}" if deeper else node.module for a in node.names]
    return sorted({name for name in found if name})


def reads_environment(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"):
            return True
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names}
            if names & {"environ", "getenv", "environb"}:
                return True
    return False


def violations(sources: dict[str, str]) -> list[str]:
    """One sentence for each import that the table forbids, for each cycle, each read of os.environ."""
    found = []
    edges: dict[str, set[str]] = {}
    for name, source in sources.items():
        here = room_of(name)
        if here in FRONT_DOORS:
            continue
        if here not in FLOOR_OF:
            found.append(f"{name}: is on no floor; add it to FLOORS in tests/architecture.py")
            continue
        if here != "config" and reads_environment(source):
            found.append(f"{name}: reads os.environ, which config alone may")
        for target in imports(source):
            top = target.split(".")[0]
            if top == "__future__":
                continue
            if top != "moe_jax":
                if top in NEVER_LIBRARIES.get(here, set()):
                    found.append(f"{name}: {here} must never import {top}")
                elif here in LIBRARIES and top not in LIBRARIES[here] | sys.stdlib_module_names:
                    found.append(f"{name}: {here} may not import {top}")
                continue
            there = room_of(target.removeprefix("moe_jax").removeprefix("."))
            if there == here:
                continue
            if there not in FLOOR_OF:  # a public name from the front door
                if here in _MATHS | _PARTS:
                    found.append(f"{name}: {here} may not import {target}")
                continue
            edges.setdefault(here, set()).add(there)
            if there in NEVER_ROOMS.get(here, set()):
                found.append(f"{name}: {here} must never import {target}")
            elif FLOOR_OF[there] >= FLOOR_OF[here]:
                found.append(
                    f"{name}: floor {FLOOR_OF[here]} may not import {target}, "
                    f"floor {FLOOR_OF[there]}"
                )
    return found + cycles(edges)


def cycles(edges: dict[str, set[str]]) -> list[str]:
    found, done = [], set()

    def walk(node: str, path: tuple[str, ...]) -> None:
        if node in path:
            found.append(f"cycle: {' -> '.join([*path[path.index(node) :], node])}")
        elif node not in done:
            for following in sorted(edges.get(node, ())):
                walk(following, (*path, node))
            done.add(node)

    for node in sorted(edges):
        walk(node, ())
    return found


def file_edges(sources: dict[str, str]) -> dict[str, set[str]]:
    """Module -> modules of moe_jax that it imports, by dotted names under moe_jax."""
    edges: dict[str, set[str]] = {}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            targets = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                targets = [f"{node.module}.{a.name}" for a in node.names]
            for target in targets:
                target = target.removeprefix("moe_jax.")
                while target and target not in sources:
                    target = target.rpartition(".")[0]
                if target and target != name:
                    edges.setdefault(name, set()).add(target)
    return edges


def figures(root: Path = ROOT) -> dict[str, object]:
    """The figures of the house, by name; see ``docs/architecture.md``."""
    sources = modules(root)
    package = root / "moe_jax"
    top = [
        p for p in package.iterdir()
        if p.name != "__pycache__" and (p.suffix == ".py" or p.is_dir())
    ]  # fmt: skip
    lines = {name: source.count("\n") for name, source in sources.items()}
    rules = {n: c for n, c in lines.items() if _is_rule(n, sources[n])}
    comments = code = 0
    for source in sources.values():
        for line in source.splitlines():
            stripped = line.strip()
            comments += stripped.startswith("#")
            code += bool(stripped) and not stripped.startswith("#")
    return {
        "entries at the top level": len(top),
        "lines of Python": sum(lines.values()),
        "rooms": len({room_of(name) for name in sources} - FRONT_DOORS),
        "floors": len(FLOORS),
        "forbidden imports": len(violations(sources)),
        "cycles between files": len(cycles(file_edges(sources))),
        "type-only imports": sum(source.count("if TYPE_CHECKING") for source in sources.values()),
        "foreign private attributes in serving": sum(
            len(foreign_privates(source))
            for name, source in sources.items()
            if name.startswith("serving")
        ),
        "lines per rule": {n.rpartition(".")[2]: c for n, c in sorted(rules.items())},
        "files above 450 lines": {n: c for n, c in lines.items() if c > 450},
        "fmt: skip": sum(source.count("# fmt: skip") for source in sources.values()),
        "comment lines per 100 of code": round(100 * comments / code, 1),
        "public symbols without a docstring": len(undocumented(sources)),
    }


def _is_rule(name: str, source: str) -> bool:
    folder, _, _ = name.rpartition(".")
    return folder in ("routers", "interop.rules") and bool(
        re.search(r"^class \w+\((Router|TokenChoice)\b", source, re.M)
        and not re.search(r"^class (Router|TokenChoice)\b", source, re.M)
    )


def foreign_privates(source: str) -> list[str]:
    """Accesses to an underscore attribute of anything but self, cls and the module itself."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_"):
            continue
        if node.attr.startswith("__"):
            continue
        if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            continue
        found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


def undocumented(sources: dict[str, str]) -> list[str]:
    """Public functions, classes and methods without a docstring; overriding methods excepted."""
    found = []
    for name, source in sources.items():
        for node in ast.parse(source).body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if node.name.startswith("_"):
                continue
            if ast.get_docstring(node) is None:
                found.append(f"{name}.{node.name}")
    return found


def main() -> None:
    for name, value in figures().items():
        print(f"{name:42} {value}")


if __name__ == "__main__":
    main()
