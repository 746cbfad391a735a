"""Imports point one way, and the figures, the table and the picture of the structure are right.

Each test of the tree has one beside it which proves that the first can fail.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.architecture import (
    BEGIN,
    CONTENTS,
    CONTRIBUTING,
    END,
    FLOOR_OF,
    FLOORS,
    GROUPS,
    PICTURE,
    ROOT,
    drawn,
    modules,
    table,
    violations,
    with_table,
)
from tests.architecture_figures import (
    FIGURES,
    FRONT_DOORS,
    Tree,
    knots,
    longest_chain,
    number,
    report,
    room_of,
)
from tests.architecture_picture import picture, shown

# To be mended with the rooms they are in; the list only gets shorter.
PENDING = {}


def test_imports_point_one_way():
    assert sorted(violations(modules())) == sorted(PENDING)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"types": "import moe_jax.routing.gate"}, "floor 0 may not import moe_jax.routing.gate"),
        ({"types": "import optax"}, "types may not import optax"),
        ({"routing.losses": "import os"}, "routing must never import os"),
        ({"routing.losses": "import time"}, "routing must never import time"),
        ({"routing.stats": "def f():\n    from flax import nnx"}, "routing must never import flax"),
        ({"experts.tiered": "from moe_jax.routers import TopK"}, "floor 2 may not import"),
        ({"routing.budget": "from moe_jax import layer"}, "floor 1 may not import moe_jax.layer"),
        ({"routing.budget": "from moe_jax import TopK"}, "routing may not import moe_jax.TopK"),
        ({"routers.new": "import scipy"}, "routers may not import scipy"),
        ({"layer": "import moe_jax.nn.nnx"}, "floor 3 may not import moe_jax.nn.nnx"),
        ({"checkpoint.a": "from moe_jax.lab import data"}, "may not import moe_jax.lab"),
        ({"lab.a": "from moe_jax.serving import engine"}, "lab must never import"),
        (
            {"lab.a": "import moe_jax.serving.errors"},
            "lab must never import moe_jax.serving.errors",
        ),
        ({"serving.cache": "import jax"}, "serving.cache must never import jax"),
        ({"serving.cache": "import moe_jax.serving.metrics"}, "serving.cache must never import"),
        ({"serving.cache": "from moe_jax.types import Array"}, "serving.cache must never import"),
        ({"serving.engine": "from moe_jax.serving import http"}, "floor 5 may not import"),
        ({"serving.engine": "import moe_jax.lab.data"}, "serving.engine must never import"),
        ({"cli": "from moe_jax.routing.losses import aux_loss"}, "cli must never import"),
        ({"lab.a": "import os\nos.environ['A']"}, "reads os.environ"),
        ({"lab.a": "from os import getenv"}, "reads os.environ"),
        (
            {"nn.a": "if TYPE_CHECKING:\n    from moe_jax.lab import data"},
            "floor 5 may not import moe_jax.lab",
        ),
        ({"surprise": ""}, "is on no floor"),
        (
            {"layer": "import moe_jax.routers", "routers": "import moe_jax.layer"},
            "cycle: layer <-> routers",
        ),
    ],
)
def test_the_boundary_test_can_fail(sources, message):
    assert any(message in line for line in violations(sources)), violations(sources)


def test_what_the_table_allows_passes():
    allowed = {
        "types": "import jax",
        "routing.losses": "import dataclasses\nfrom moe_jax.types import Array",
        "routers.base": "from moe_jax.routing.losses import LossWeights\nimport numpy as np",
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
        "flax",
        "orbax",
        "optax",
        "matplotlib",
        "starlette",
        "uvicorn",
        "fastapi",
        "typer",
        "rich",
        "prometheus_client",
        "redis",
        "structlog",
        "limits",
    ]
    code = f"import sys, moe_jax; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_every_room_exists_is_described_and_has_a_colour():
    rooms = {room_of(name) for name in modules()} - FRONT_DOORS
    assert set(FLOOR_OF) == rooms
    assert set(CONTENTS) == set(FLOOR_OF)
    assert set(GROUPS) == set(FLOOR_OF)


def test_the_table_of_contributing_is_in_step():
    text = CONTRIBUTING.read_text()
    assert with_table(text) == text, "run: python -m tests.architecture --write"


def test_an_old_table_is_replaced_and_a_document_without_marks_is_refused():
    assert with_table(f"a\n{BEGIN}\nold\n{END}\nb") == f"a\n{BEGIN}\n{table()}{END}\nb"
    with pytest.raises(ValueError, match="expected the marks"):
        with_table("a document")


def test_the_picture_is_current():
    assert PICTURE.read_text() == drawn(), "run: python -m tests.architecture --write"


def test_the_table_has_every_room_once():
    rows = table().splitlines()[2:]
    rooms = [room for row in rows for room in row.split("|")[2].replace("`", "").split(",")]
    assert sorted(room.strip() for room in rooms) == sorted(FLOOR_OF)
    assert {int(row.split("|")[1]) for row in rows} == set(range(len(FLOORS)))


def test_the_picture_has_the_rooms_and_the_arrows_that_no_detour_implies():
    arrows = {"top": {"middle", "low"}, "middle": {"low"}, "low": set()}
    assert shown(arrows) == [("middle", "low"), ("top", "middle")]
    svg = picture([["low"], ["middle"], ["top"]], arrows, {"low": "a & b"}, {"low": "maths"})
    assert "<title>top imports middle</title>" in svg
    assert "top imports low" not in svg
    assert "a &amp; b" in svg


def test_rooms_of_a_cycle_keep_their_arrows_in_the_picture():
    assert shown({"a": {"b"}, "b": {"a"}}) == [("a", "b"), ("b", "a")]


# A small tree, and for each figure files that move it: what the figure counts and what it leaves out.
SMALL = {
    "moe_jax/__init__.py": "from moe_jax.types import Array\n",
    "moe_jax/types.py": '"""Types."""\nArray = int\n# Why.\n',
    "moe_jax/serving/engine/core.py": '"""The engine."""\n',
}
MOVES = {
    "entries at the top level": ({"moe_jax/new.py": ""}, 1),
    "lines of Python in the library": ({"moe_jax/types.py": "Array = int\n" * 5}, 2),
    "rooms": ({"moe_jax/routing/gate.py": ""}, 1),
    "arrows between rooms": ({"moe_jax/layer.py": "from moe_jax import Array"}, 1),
    "floors that the arrows need": ({"moe_jax/layer.py": "import moe_jax.types"}, 1),
    "cycles between rooms": (
        {"moe_jax/a.py": "def f():\n    import moe_jax.b", "moe_jax/b.py": "import moe_jax.a"},
        1,
    ),
    "cycles between files": (
        {
            "moe_jax/a/__init__.py": "from moe_jax.a.x import X\nfrom moe_jax.a.y import Y",
            "moe_jax/a/x.py": "from moe_jax.a import Y\nclass X: ...",
            "moe_jax/a/y.py": "if TYPE_CHECKING:\n    from moe_jax.a.x import X\nclass Y: ...",
        },
        1,
    ),
    "type-only imports": ({"moe_jax/a.py": "if TYPE_CHECKING:\n    import moe_jax.types"}, 1),
    "foreign private names in serving": (
        {
            "moe_jax/serving/engine/report.py": (
                "from moe_jax.serving.engine import core\n"
                "from moe_jax.serving.engine.core import Engine, _helper\n"
                "def f(engine: Engine, other):\n"
                "    return engine._state, core._NAME, other.parts._keyer\n"
                "class Own:\n"
                "    def g(self, other: Own):\n"
                "        self._state = other._state\n"
                "        return self._base(), super()._base(), other._replace()\n"
            )
        },
        4,
    ),
    "lines per rule": (
        {
            "moe_jax/routers/base.py": "class Router(abc.ABC): ...\nclass T(Router, abc.ABC): ...\n",
            "moe_jax/routers/new.py": "class New(T):\n    k: int\nclass State:\n    x: int\n",
            "moe_jax/interop/rules/shared.py": "class Half(T, ABC): ...\n" * 9,
            "moe_jax/interop/rules/one.py": "class One(Half): ...\n",
        },
        5,
    ),
    "files above 450 lines": ({"moe_jax/serving/engine/core.py": "x = 1\n" * 451}, 451),
    "formatter switched off": (
        {"tests/a.py": "x = [1]  # fmt: skip\ny = '# fmt: skip'\n# fmt: off\n"},
        2,
    ),
    "comment lines per 100 of code": (
        {"moe_jax/types.py": '"""Types."""\nArray = int\n# Why.\n# noqa\n# fmt: skip\n# And.\n'},
        50.0,
    ),
    "public symbols without docstring": (
        {
            "moe_jax/a.py": (
                "class Base:\n    'A.'\n    def f(self):\n        'Does.'\n"
                "class Child(Base):\n    'B.'\n    def f(self): ...\n    def g(self): ...\n"
                "    @property\n    def h(self): ...\n    @h.setter\n    def h(self, v): ...\n"
                "    def _i(self): ...\ndef j(): ...\nclass K: ...\n"
            )
        },
        4,
    ),
    "file names in use twice": (
        {
            "deploy/core.py": "",
            "tests/types.py": "",
            "moe_jax/nn/elastic.py": "",  # with routers/elastic.py on purpose
            "moe_jax/routers/elastic.py": "",
        },
        1,
    ),
    "class names in use twice": (
        {
            "moe_jax/a.py": "class X: ...\nclass MoE: ...\n",
            "moe_jax/b.py": "def f():\n    class X: ...\n",
            "moe_jax/nn/nnx.py": "class MoE: ...\nclass Router: ...\n",
            "moe_jax/nn/linen.py": "class Router: ...\n",  # on purpose, unlike MoE in a.py
        },
        2,
    ),
}


@pytest.mark.parametrize("figure", FIGURES)
def test_each_figure_moves(figure):
    changes, step = MOVES[figure]
    before = number(FIGURES[figure](Tree(SMALL)))
    after = number(FIGURES[figure](Tree({**SMALL, **changes})))
    assert after - before == step, FIGURES[figure](Tree({**SMALL, **changes}))


# Figures that are at their aim. They stay there.
AT_THEIR_AIM = [
    "cycles between rooms",
    "cycles between files",
    "type-only imports",
    "foreign private names in serving",
    "formatter switched off",
    "public symbols without docstring",
    "file names in use twice",
    "class names in use twice",
]


@pytest.mark.parametrize("figure", AT_THEIR_AIM)
def test_what_has_reached_its_aim_stays_there(figure):
    assert not FIGURES[figure](Tree.read(ROOT))


def test_a_name_that_a_package_exports_counts_for_the_file_that_defines_it():
    tree = Tree(
        {
            "moe_jax/__init__.py": "from moe_jax.a import X\n",
            "moe_jax/a/__init__.py": "from moe_jax.a.x import X",
            "moe_jax/a/x.py": "class X: ...",
            "moe_jax/a/y.py": "from moe_jax.a import X",
            "moe_jax/b.py": "import moe_jax\nmoe_jax.X",
        }
    )
    assert tree.imports["a.y"] == {"a.x"}
    assert tree.imports["b"] == {"a.x"}
    assert knots(tree.imports) == []


def test_the_longest_chain_counts_a_cycle_once():
    assert longest_chain({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == 3


def test_the_report_names_every_figure_and_with_details_what_is_behind_it():
    tree = Tree({**SMALL, **MOVES["class names in use twice"][0]})
    lines = list(report(tree, details=True))
    assert all(any(line.startswith(name) for line in lines) for name in FIGURES)
    assert "    X: a, b" in lines
