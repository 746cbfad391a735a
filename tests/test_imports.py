"""Imports point one way. The table is the design's; a second test proves that the first can fail."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What a module or package directly under moe_jax belongs to.
LAYERS: dict[str, int] = {
    **dict.fromkeys(["types"], 0),
    **dict.fromkeys(
        [
            "logits", "difficulty", "budget", "selection", "scoring",
            "losses", "balancing", "dispatch", "stats", "experts",
        ],
        1,
    ),
    **dict.fromkeys(["routers", "layer"], 2),
    **dict.fromkeys(
        [
            "nn", "sharding", "collectives", "distributed", "scaling", "verification",
            "checkpoint", "config", "interop", "train", "plots", "data",
            "frontier", "calibration", "language_model", "inspection", "profiler",
            "archive", "serving.errors",
        ],
        3,
    ),
    **dict.fromkeys(
        ["serving.admission", "serving.cache", "serving.resilience", "serving.metrics"], 4
    ),
    "serving.engine": 5,
    **dict.fromkeys(["serving.http", "cli", "demo", "bench"], 6),
}  # fmt: skip

# Not part of any layer: "public names, one screen, nothing else".
UNLAYERED = {"__init__", "__main__"}

OUTSIDE = {
    0: {"jax", "numpy", "chex"},
    1: {"jax", "numpy", "chex"},
    2: {"jax", "numpy", "chex"},
}
NEVER = {
    1: {"flax", "orbax", "optax", "os", "time", "logging", "threading"},
    2: {"flax", "orbax", "optax", "os", "time", "logging", "threading"},
    4: {"jax", "flax", "orbax"},
}
MATHS = {name for name, layer in LAYERS.items() if layer in (1, 2)}
# The two doors of the service know the engine and the configuration; the others are programs.
DOORS = {"cli", "serving.http"}


def modules(root: Path) -> dict[str, str]:
    """Dotted name under moe_jax -> source, of every module; a package is named without __init__."""
    found = {}
    for path in sorted((root / "moe_jax").rglob("*.py")):
        parts = path.relative_to(root / "moe_jax").with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = path.read_text()
    return found


def room(name: str) -> str:
    """The entry of ``LAYERS`` that a module belongs to."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "serving" else parts[0]


def imports(source: str) -> list[str]:
    """Every imported name, dotted, wherever in the file it is."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from moe_jax import budget` imports a module, `from moe_jax.budget import Fit` a name.
            deeper = node.module == "moe_jax" or node.module == "moe_jax.serving"
            found += [f"{node.module}.{a.name}" if deeper else node.module for a in node.names]
    return sorted(set(found))


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
    told = []
    edges: dict[str, set[str]] = {}
    for name, source in sources.items():
        here = room(name)
        if here in UNLAYERED or name == "serving":
            continue
        if here not in LAYERS:
            told.append(f"{name}: is in no layer; add it to LAYERS and to the design's table")
            continue
        layer = LAYERS[here]
        if here != "config" and reads_environment(source):
            told.append(f"{name}: reads os.environ, which config alone may")
        for target in imports(source):
            top = target.split(".")[0]
            if top == "__future__":
                continue
            if top != "moe_jax":
                if top in NEVER.get(layer, set()):
                    told.append(f"{name}: layer {layer} must never import {top}")
                elif layer in OUTSIDE and top not in OUTSIDE[layer] | sys.stdlib_module_names:
                    told.append(f"{name}: layer {layer} may not import {top}")
                continue
            there = room(target.removeprefix("moe_jax").removeprefix("."))
            if there == here:
                continue
            if there not in LAYERS:  # a public name from the front door
                if layer <= 2 or layer == 4:
                    told.append(f"{name}: layer {layer} may not import {target}")
                continue
            edges.setdefault(here, set()).add(there)
            if LAYERS[there] > layer:
                told.append(f"{name}: layer {layer} may not import {target}, layer {LAYERS[there]}")
            elif layer == 3 and there.startswith("serving"):
                told.append(f"{name}: layer 3 must never import serving")
            elif layer == 4 and there != "serving.errors":
                told.append(f"{name}: layer 4 may import no other module of moe_jax, {target}")
            elif here in DOORS and there in MATHS:
                told.append(f"{name}: {here} must never import the maths, {target}")
    return told + cycles(edges)


def cycles(edges: dict[str, set[str]]) -> list[str]:
    told, done = [], set()

    def walk(node: str, path: tuple[str, ...]) -> None:
        if node in path:
            told.append(f"cycle: {' -> '.join([*path[path.index(node) :], node])}")
        elif node not in done:
            for following in sorted(edges.get(node, ())):
                walk(following, (*path, node))
            done.add(node)

    for node in sorted(edges):
        walk(node, ())
    return told


def test_imports_point_one_way():
    assert violations(modules(ROOT)) == []


@pytest.mark.parametrize(
    ("sources", "told"),
    [
        ({"types": "import moe_jax.logits"}, "layer 0 may not import moe_jax.logits"),
        ({"types": "import optax"}, "layer 0 may not import optax"),
        ({"losses": "import os"}, "layer 1 must never import os"),
        ({"losses": "import time"}, "layer 1 must never import time"),
        ({"stats": "def f():\n    from flax import nnx"}, "layer 1 must never import flax"),
        ({"experts.tiered": "from moe_jax.routers import TopK"}, "layer 1 may not import"),
        ({"budget": "from moe_jax import layer"}, "layer 1 may not import moe_jax.layer"),
        ({"budget": "from moe_jax import TopK"}, "layer 1 may not import moe_jax.TopK"),
        ({"routers.new": "import scipy"}, "layer 2 may not import scipy"),
        ({"layer": "import moe_jax.nn.nnx"}, "layer 2 may not import moe_jax.nn.nnx"),
        ({"train": "from moe_jax.serving import engine"}, "layer 3 may not import"),
        ({"train": "import moe_jax.serving.errors"}, "layer 3 must never import serving"),
        ({"serving.cache": "import jax"}, "layer 4 must never import jax"),
        ({"serving.cache": "import moe_jax.serving.metrics"}, "may import no other module"),
        ({"serving.cache": "from moe_jax.types import Array"}, "may import no other module"),
        ({"serving.engine": "from moe_jax.serving import http"}, "layer 5 may not import"),
        ({"cli": "from moe_jax.losses import aux_loss"}, "must never import the maths"),
        ({"train": "import os\nos.environ['A']"}, "reads os.environ"),
        ({"train": "from os import getenv"}, "reads os.environ"),
        ({"surprise": ""}, "is in no layer"),
        (
            {"losses": "import moe_jax.stats", "stats": "import moe_jax.losses"},
            "cycle: losses -> stats -> losses",
        ),
    ],
)  # fmt: skip
def test_the_boundary_test_can_fail(sources, told):
    assert any(told in line for line in violations(sources)), violations(sources)


def test_what_the_table_allows_passes():
    allowed = {
        "types": "import jax",
        "losses": "import dataclasses\nfrom moe_jax.types import Array",
        "routers.base": "from moe_jax.losses import LossWeights\nimport numpy as np",
        "config.loading": "import os\nos.environ['A']",
        "nn.nnx": "from flax import nnx\nfrom moe_jax.layer import moe_layer",
        "serving.metrics": "import threading\nimport prometheus_client",
        "serving.cache": "from moe_jax.serving.errors import ServingError",
        "serving.engine": "from moe_jax.serving import cache\nimport jax",
        "cli": "import typer\nfrom moe_jax.config import Config\nimport moe_jax.serving.engine",
    }
    assert violations(allowed) == []


def test_import_moe_jax_is_light():
    heavy = [
        "flax", "orbax", "optax", "matplotlib", "starlette", "uvicorn", "fastapi", "typer", "rich",
        "prometheus_client", "redis", "structlog", "limits",
    ]  # fmt: skip
    code = f"import sys, moe_jax; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
