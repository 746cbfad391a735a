"""The structure of the package: which room stands on which floor, and what it may import.

``tests/test_architecture.py`` holds the rules. On the command line::

    python -m tests.architecture                    # the figures of this tree
    python -m tests.architecture --root OTHER_TREE  # of another checkout, for before and after
    python -m tests.architecture --details          # with the files and lines behind each figure
    python -m tests.architecture --write            # CONTRIBUTING's table and the picture
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

from tests.architecture_figures import FRONT_DOORS, Tree, knots, report, room_of
from tests.architecture_picture import picture

ROOT = Path(__file__).parents[1]

# A room is a module or package directly under moe_jax (under moe_jax.serving for the service). It may
# import its own modules and rooms of lower floors, nothing else of moe_jax.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("types", "checks", "serving.errors"),
    ("routing",),
    ("routers", "experts"),
    (
        "layer",
        "testing",
        "config",
        "serving.admission",
        "serving.cache",
        "serving.resilience",
        "serving.metrics",
    ),
    ("parallel", "interop", "checkpoint"),
    ("nn", "serving.engine"),
    ("models", "serving.http"),
    ("lab", "bench"),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# What is in each room, in the few words that fit into its box of docs/architecture.svg.
CONTENTS = {
    "types": "what passes between rooms",
    "checks": "shapes, dtypes, options",
    "routing": "gate, budget, losses, plan",
    "routers": "one file a routing rule",
    "experts": "one file a way to run them",
    "layer": "the whole path of x",
    "testing": "a rule's contract",
    "parallel": "devices, hosts, placement",
    "config": "JSON, MOE_*, presets",
    "interop": "blocks of published models",
    "nn": "Flax modules",
    "checkpoint": "save, restore, export",
    "models": "whole published models",
    "lab": "data, training, comparison",
    "serving.errors": "codes and statuses",
    "serving.admission": "who may send what",
    "serving.cache": "results of whole requests",
    "serving.resilience": "breaker, bulkhead, retry",
    "serving.metrics": "counters and health",
    "serving.engine": "answers a request",
    "serving.http": "HTTP and gRPC",
    "bench": "ratios to a floor",
    "cli": "the moe-jax command",
}

_MATHS = {"types", "checks", "routing", "routers", "experts", "layer", "testing"}
_PARTS = {"serving.admission", "serving.cache", "serving.resilience", "serving.metrics"}
_SERVICE = _PARTS | {"serving.errors", "serving.engine", "serving.http"}

# Colours of the picture.
GROUPS = {
    **dict.fromkeys(_MATHS, "maths"),
    **dict.fromkeys(("parallel", "config", "interop", "nn", "checkpoint", "models"), "library"),
    **dict.fromkeys(("lab", "bench"), "proof"),
    **dict.fromkeys(_SERVICE, "service"),
    "cli": "command",
}

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


def modules() -> dict[str, str]:
    """Dotted name under moe_jax -> source of every module of this tree; a package without __init__."""
    return dict(Tree.read(ROOT).modules)


def imports(source: str) -> list[str]:
    """Every imported name, dotted, wherever in the file it is; type-only imports included."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from moe_jax import layer` imports a module, `from moe_jax.layer import LayerAux` a name.
            deeper = node.module in ("moe_jax", "moe_jax.serving")
            names += [f"{node.module}.{a.name}" if deeper else node.module for a in node.names]
    return sorted({name for name in names if name})


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
    sentences = []
    edges: dict[str, set[str]] = {}
    for name, source in sources.items():
        here = room_of(name)
        if here in FRONT_DOORS:
            continue
        if here not in FLOOR_OF:
            sentences.append(f"{name}: is on no floor; add it to FLOORS in tests/architecture.py")
            continue
        if here != "config" and reads_environment(source):
            sentences.append(f"{name}: reads os.environ, which config alone may")
        for target in imports(source):
            top = target.split(".")[0]
            if top == "__future__":
                continue
            if top != "moe_jax":
                if top in NEVER_LIBRARIES.get(here, set()):
                    sentences.append(f"{name}: {here} must never import {top}")
                elif here in LIBRARIES and top not in LIBRARIES[here] | sys.stdlib_module_names:
                    sentences.append(f"{name}: {here} may not import {top}")
                continue
            there = room_of(target.removeprefix("moe_jax").removeprefix("."))
            if there == here:
                continue
            if there not in FLOOR_OF:  # a public name from the front door
                if here in _MATHS | _PARTS:
                    sentences.append(f"{name}: {here} may not import {target}")
                continue
            edges.setdefault(here, set()).add(there)
            if there in NEVER_ROOMS.get(here, set()):
                sentences.append(f"{name}: {here} must never import {target}")
            elif FLOOR_OF[there] >= FLOOR_OF[here]:
                sentences.append(
                    f"{name}: floor {FLOOR_OF[here]} may not import {target}, "
                    f"floor {FLOOR_OF[there]}"
                )
    return sentences + [f"cycle: {' <-> '.join(rooms)}" for rooms in knots(edges)]


def table() -> str:
    """The floors as a Markdown table, from the tables above."""
    rows = ["| floor | rooms | may import | must never import |", "|---|---|---|---|"]
    for floor, rooms in enumerate(FLOORS):
        groups: dict[tuple[str, str], list[str]] = {}
        for room in rooms:
            groups.setdefault((_allowed(room), _forbidden(room)), []).append(f"`{room}`")
        for (allowed, forbidden), alike in groups.items():
            rows.append(f"| {floor} | {', '.join(alike)} | {allowed} | {forbidden} |")
    return "\n".join(rows) + "\n"


def _rooms_below(room: str) -> set[str]:
    return {other for other in FLOOR_OF if FLOOR_OF[other] < FLOOR_OF[room]}


def _allowed(room: str) -> str:
    floor, below = FLOOR_OF[room], _rooms_below(room)
    few = below - NEVER_ROOMS.get(room, set())
    if len(few) < 2 < len(below):
        words = ", ".join(f"`{other}`" for other in few) or "nothing of moe_jax"
    elif floor < 2:
        words = "floor 0" if floor else "nothing of moe_jax"
    else:
        words = f"floors 0–{floor - 1}"
    return "; ".join([words, *([", ".join(sorted(LIBRARIES[room]))] if room in LIBRARIES else [])])


def _forbidden(room: str) -> str:
    below, refused = _rooms_below(room), NEVER_ROOMS.get(room, set())
    words = sorted(NEVER_LIBRARIES.get(room, ()))
    if len(below - refused) >= 2:  # else the column beside says what is allowed
        lower = below & refused
        service = below & _SERVICE
        words += sorted(f"`{other}`" for other in lower - service)
        if lower & service:
            words.append("the service" if lower >= service else ", ".join(sorted(lower & service)))
    return ", ".join(words) or "–"


BEGIN, END = "<!-- python -m tests.architecture --write -->", "<!-- end of the table -->"


def with_table(text: str) -> str:
    """A document with the table between its two marks brought up to date."""
    before, _, rest = text.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"expected the marks {BEGIN} and {END} in the document, found none")
    return f"{before}{BEGIN}\n{table()}{END}{after}"


def drawn() -> str:
    """The picture of this tree, as SVG."""
    return picture(FLOORS, Tree.read(ROOT).arrows, CONTENTS, GROUPS)


CONTRIBUTING, PICTURE = ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.svg"


def main() -> None:
    """Prints the figures, or writes the table and the picture."""
    parser = argparse.ArgumentParser(description="Figures, table and picture of the structure.")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout to count")
    parser.add_argument("--details", action="store_true", help="files and lines of each figure")
    parser.add_argument("--write", action="store_true", help="write the table and the picture")
    parser.add_argument("--draw", type=Path, help="write the picture to this file")
    options = parser.parse_args()
    if options.write:
        CONTRIBUTING.write_text(with_table(CONTRIBUTING.read_text()))
    if options.write or options.draw:
        (options.draw or PICTURE).write_text(drawn())
        return
    for line in report(Tree.read(options.root), details=options.details):
        print(line)
    if options.root == ROOT:
        print(f"{'floors of the table':36} {len(FLOORS)}")
        print(f"{'forbidden imports':36} {len(violations(modules()))}")


if __name__ == "__main__":
    main()
