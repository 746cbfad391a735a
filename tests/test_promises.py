"""docs/promises.md is true: each test that it names exists, each id that the tree uses is on it."""

from __future__ import annotations

import ast
import difflib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "promises.md"
KINDS = "ABCDGHKLMPQRSTXYZ"
_ID = re.compile(rf"(?<![\w.#-])([{KINDS}])([0-2]\d)(?:[-–]([{KINDS}])?([0-2]\d))?(?!\w)")
_REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
# Where an id of a promise may stand.
PLACES = ["tests/**/*.py", "moe_jax/**/*.py", "deploy/**/*.py", "docs/*.md", "monitoring/*.yml"]


def ids(text: str) -> set[str]:
    """Ids in a text, ranges such as R01-R03 or R01–R03 spelt out."""
    named = set()
    for kind, first, other, last in _ID.findall(text):
        end = int(last) if last and other in ("", kind) else int(first)
        named |= {f"{kind}{number:02}" for number in range(int(first), end + 1)}
    return named


def missing_tests(page: str) -> list[str]:
    """References of the page to tests that do not exist, each with the nearest name of its file."""
    missing = []
    for file, name in sorted(set(_REFERENCE.findall(page))):
        path = ROOT / file
        defined = [
            node.name
            for node in ast.walk(ast.parse(path.read_text() if path.is_file() else ""))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        if name not in defined:
            nearest = difflib.get_close_matches(name, defined, 1, 0.0)
            missing.append(f"{file}::{name}" + (f", nearest {nearest[0]}" if nearest else ""))
    return missing


def missing_ids(page: str, texts: dict[str, str]) -> list[str]:
    """Ids in texts that have no row of the page."""
    rows = {name for line in page.splitlines() if line.startswith("|") for name in ids(line)}
    return [
        f"{where}: {name}" for where, text in texts.items() for name in sorted(ids(text) - rows)
    ]


def test_every_test_that_the_page_names_exists():
    page = PAGE.read_text()
    assert len(_REFERENCE.findall(page)) > 100
    assert missing_tests(page) == []


def test_every_id_of_the_tree_is_on_the_page():
    files = {path for place in PLACES for path in ROOT.glob(place)} - {PAGE, Path(__file__)}
    texts = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(files)}
    assert missing_ids(PAGE.read_text(), texts) == []


def test_every_row_names_a_test_or_a_check_or_says_that_it_is_open():
    rows = [row for row in PAGE.read_text().splitlines() if re.match(r"\| [A-Z]\d\d", row)]
    bare = [r for r in rows if not _REFERENCE.search(r) and "`make verify-" not in r]
    assert [row for row in bare if "**Open**" not in row] == []


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("R01-R03, see X05", {"R01", "R02", "R03", "X05"}),
        ("K01–K02 and C10-19", {"K01", "K02", *(f"C{n}" for n in range(10, 20))}),
        ("E04 #A11 X-R01 sha-B12 R015 C64 UTF16", set()),
    ],
)
def test_ids_are_read_from_a_text(text, named):
    assert ids(text) == named


def test_the_checks_can_fail():
    page = "| R01 | a promise | `tests/test_promises.py::test_ids_are_read_from_a_txt` |"
    assert missing_tests(page) == [
        "tests/test_promises.py::test_ids_are_read_from_a_txt, nearest "
        "test_ids_are_read_from_a_text"
    ]
    assert missing_tests("`tests/no_such.py::test_a`") == ["tests/no_such.py::test_a"]
    assert missing_ids(page, {"a.py": "R01 and R02"}) == ["a.py: R02"]
