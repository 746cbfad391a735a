"""The figures of the house: what ``python -m tests.architecture`` prints, for this tree or another.

Each figure is a function of a ``Tree``, so that it can be taken before and after a change, and so that
``tests/test_architecture.py`` can show on small trees that each figure moves.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import io
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

LIBRARY = "moe_jax"
# Folders of Python beside the library. Tests mirror the library, so their file names may repeat.
OTHER_FOLDERS = ("tests", "deploy", "benchmarks", "examples")
MOST_LINES = 450

# Names that stand for one thing in two places. No other file may take them.
SAME_ON_PURPOSE = {
    "elastic.py": {"moe_jax/nn/elastic.py", "moe_jax/routers/elastic.py"},  # the rule, its training
    # The same module for two frameworks. `Router` holds a rule there.
    "DynamicMoE": {"nn.linen", "nn.nnx"},
    "MoE": {"nn.linen", "nn.nnx"},
    "Router": {"nn.linen", "nn.nnx", "routers.base"},
}

_DIRECTIVES = re.compile(r"#\s*(fmt|type|noqa|pyright|ruff)\b|#:|#!")
# Underscore names that their libraries document as public.
_DOCUMENTED = {"_replace", "_asdict", "_fields", "_make", "_exit", "_getframe"}


@dataclasses.dataclass(frozen=True)
class Tree:
    """The Python files of a repository.

    Attributes:
        files: path relative to the repository's root -> source.
    """

    files: Mapping[str, str]

    @classmethod
    def read(cls, root: Path) -> Tree:
        """Reads the library and the folders beside it."""
        paths = [p for top in (LIBRARY, *OTHER_FOLDERS) for p in sorted((root / top).rglob("*.py"))]
        return cls({p.relative_to(root).as_posix(): p.read_text() for p in paths})

    @functools.cached_property
    def modules(self) -> dict[str, str]:
        """Dotted name under moe_jax -> source; a package is named without ``__init__``."""
        named = {}
        for path, source in self.files.items():
            folder, *parts = path.removesuffix(".py").split("/")
            if folder == LIBRARY:
                package = parts[-1] == "__init__" and len(parts) > 1
                named[".".join(parts[:-1] if package else parts)] = source
        return named

    @functools.cached_property
    def parsed(self) -> dict[str, ast.Module]:
        """Module -> syntax tree, by the names of ``modules``."""
        return {name: ast.parse(source) for name, source in self.modules.items()}

    @functools.cached_property
    def imports(self) -> dict[str, set[str]]:
        """Module -> modules of moe_jax that it needs, type-only imports and local ones included.

        A name that a package re-exports counts for the module that defines it: ``from
        moe_jax.routers import TopK`` needs ``routers.top_k``. So a file that asks its package for a
        neighbour's name forms a cycle only where the neighbour needs the file too.
        """
        return {name: self._needs(name) for name in self.parsed}

    @functools.cached_property
    def arrows(self) -> dict[str, set[str]]:
        """Room -> rooms that its modules import."""
        arrows: dict[str, set[str]] = {}
        for name, targets in self.imports.items():
            if room_of(name) not in FRONT_DOORS:
                rooms = {room_of(target) for target in targets} - FRONT_DOORS - {room_of(name)}
                arrows.setdefault(room_of(name), set()).update(rooms)
        return arrows

    @functools.cached_property
    def _reexports(self) -> dict[str, dict[str, str]]:
        """Package -> name that it imports at its top level -> dotted name it stands for."""
        exported: dict[str, dict[str, str]] = {}
        for name, tree in self.parsed.items():
            if name == "__init__" or any(other.startswith(f"{name}.") for other in self.parsed):
                exported[name] = {
                    alias.asname or alias.name: f"{node.module}.{alias.name}"
                    for node in tree.body
                    if isinstance(node, ast.ImportFrom) and node.module
                    for alias in node.names
                }
        return exported

    def _needs(self, name: str) -> set[str]:
        needed = set()
        for node in ast.walk(self.parsed[name]):
            if isinstance(node, ast.Import):
                needed |= {self._defining(a.name) for a in node.names if a.name != LIBRARY}
            elif isinstance(node, ast.ImportFrom) and node.module:
                needed |= {self._defining(f"{node.module}.{a.name}") for a in node.names}
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == LIBRARY:
                needed.add(self._defining(f"{LIBRARY}.{node.attr}"))
        return needed - {name, ""}

    def _defining(self, dotted: str) -> str:
        """The module that defines a dotted name; empty where it is not of this library."""
        if dotted != LIBRARY and not dotted.startswith(f"{LIBRARY}."):
            return ""
        target = dotted.removeprefix(LIBRARY).removeprefix(".")
        if target in self.parsed:
            return target
        package, _, attribute = target.rpartition(".")
        exported = self._reexports.get(package or "__init__", {})
        if attribute in exported:
            return self._defining(exported[attribute])
        while target and target not in self.parsed:
            target = target.rpartition(".")[0]
        return target


FRONT_DOORS = {"__init__", "__main__", "serving"}


def room_of(name: str) -> str:
    """The room that a dotted name under moe_jax belongs to."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] == "serving" else parts[0]


def knots(edges: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other, sorted: the cycles of a graph, overlapping ones as one."""
    reached = {node: reachable(edges, node) for node in edges}
    groups = {
        frozenset(other for other in reached[node] if node in reached.get(other, ()))
        for node in edges
        if node in reached[node]
    }
    return sorted(sorted(group) for group in groups)


def reachable(edges: Mapping[str, set[str]], start: str) -> set[str]:
    """Nodes at the end of some path of arrows from a node."""
    reached, waiting = set(), [*edges.get(start, ())]
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += edges.get(node, ())
    return reached


def longest_chain(edges: Mapping[str, set[str]]) -> int:
    """Nodes on the longest path of imports: as many floors as the rooms need; a knot counts once."""
    knot_of = {node: group[0] for group in knots(edges) for node in group}
    plain: dict[str, set[str]] = {}
    for node, targets in edges.items():
        here = knot_of.get(node, node)
        plain.setdefault(here, set()).update({knot_of.get(t, t) for t in targets} - {here})

    @functools.cache
    def height(node: str) -> int:
        return 1 + max((height(target) for target in plain.get(node, ())), default=0)

    return max(map(height, plain), default=0)


def top_level_entries(tree: Tree) -> list[str]:
    """Modules and packages directly under moe_jax."""
    inside = (path.split("/")[1] for path in tree.files if path.startswith(f"{LIBRARY}/"))
    return sorted(set(inside))


def foreign_privates(tree: Tree) -> list[str]:
    """Accesses in ``serving`` to an underscore name of another file: attributes and imports.

    An attribute counts where its file does not define the name, and also where the value's annotation
    or import says that it comes from another file.
    """
    return [
        f"{name}:{line}: {text}"
        for name, parsed in tree.parsed.items()
        if name.startswith("serving")
        for line, text in sorted(_privates(parsed))
    ]


def _privates(tree: ast.Module) -> Iterator[tuple[int, str]]:
    defined, imported = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if _is_self(node.value):
                defined.add(node.attr)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {(a.asname or a.name).split(".")[0] for a in node.names}
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(LIBRARY):
                for alias in node.names:
                    if _is_private(alias.name):
                        yield node.lineno, f"import {alias.name}"
    # Parameters whose annotation begins with an imported name hold objects of another file.
    foreign = {
        argument.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for argument in (*node.args.args, *node.args.kwonlyargs)
        if argument.annotation is not None
        and (names := re.findall(r"[A-Za-z_]\w*", ast.unparse(argument.annotation)))
        and names[0] in imported
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not _is_private(node.attr):
            continue
        if _is_self(node.value):
            continue
        base = node.value.id if isinstance(node.value, ast.Name) else ""
        if node.attr not in defined or base in imported or base in foreign:
            yield node.lineno, ast.unparse(node)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in _DOCUMENTED


def _is_self(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        node = node.func
        return isinstance(node, ast.Name) and node.id in ("super", "type")
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def lines_per_rule(tree: Tree) -> dict[str, int]:
    """Module -> lines, of each file in ``routers`` and ``interop.rules`` that defines a rule.

    A rule inherits from ``Router``, through however many contracts; a contract lists ``abc.ABC``.
    """
    bases: dict[str, set[str]] = {}
    for parsed in tree.parsed.values():
        for node in parsed.body:
            if isinstance(node, ast.ClassDef):
                names = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                bases.setdefault(node.name, set()).update(names)

    def is_rule(node: ast.stmt) -> bool:
        if not isinstance(node, ast.ClassDef) or "ABC" in bases[node.name]:
            return False
        return "Router" in reachable(bases, node.name)

    return {
        name: tree.modules[name].count("\n")
        for name, parsed in sorted(tree.parsed.items())
        if name.rpartition(".")[0] in ("routers", "interop.rules")
        and any(map(is_rule, parsed.body))
    }


def long_files(tree: Tree) -> dict[str, int]:
    """File -> lines, of each file above 450 lines."""
    lines = {path: source.count("\n") for path, source in tree.files.items()}
    return {path: count for path, count in sorted(lines.items()) if count > MOST_LINES}


def formatter_skips(tree: Tree) -> dict[str, int]:
    """File -> comments that switch the formatter off."""
    counted = {
        path: sum(bool(re.match(r"#\s*fmt:\s*(skip|off)", text)) for _, text in comments(source))
        for path, source in tree.files.items()
        if "fmt:" in source
    }
    return {path: count for path, count in sorted(counted.items()) if count}


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def comment_density(tree: Tree) -> float:
    """Comment lines of the library per 100 lines of code; docstrings and directives are neither."""
    commented = code = 0
    for name, source in tree.modules.items():
        lines = source.splitlines()
        alone = {n for n, _ in comments(source) if lines[n - 1].lstrip().startswith("#")}
        directives = {n for n, text in comments(source) if n in alone and _DIRECTIVES.match(text)}
        documentation = _docstring_lines(tree.parsed[name])
        commented += len(alone - directives)
        code += sum(
            bool(line.strip()) and n not in alone and n not in documentation
            for n, line in enumerate(lines, 1)
        )
    return round(100 * commented / max(1, code), 1)


def _docstring_lines(tree: ast.Module) -> set[int]:
    covered: set[int] = set()
    for node in ast.walk(tree):
        # A bare string is documentation wherever it stands: below a field as well.
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            covered |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return covered


def undocumented(tree: Tree) -> list[str]:
    """Public functions, classes, methods and properties of the library without a docstring.

    A method that overrides one of a class of this library takes over its documentation.
    """
    classes = {
        node.name: node
        for parsed in tree.parsed.values()
        for node in ast.walk(parsed)
        if isinstance(node, ast.ClassDef)
    }
    missing = []
    for name, parsed in tree.parsed.items():
        for node in parsed.body:
            missing += [f"{name}.{path}" for path in _undocumented(node, classes)]
    return missing


_Function = ast.FunctionDef | ast.AsyncFunctionDef


def _undocumented(node: ast.stmt, classes: Mapping[str, ast.ClassDef]) -> Iterator[str]:
    if not isinstance(node, _Function | ast.ClassDef) or node.name.startswith("_"):
        return
    if ast.get_docstring(node) is None:
        yield node.name
    if isinstance(node, ast.ClassDef):
        inherited = _inherited(node, classes)
        for member in node.body:
            if isinstance(member, _Function):
                decorators = {ast.unparse(d).rpartition(".")[2] for d in member.decorator_list}
                if member.name in inherited or decorators & {"setter", "deleter", "overload"}:
                    continue
            yield from (f"{node.name}.{path}" for path in _undocumented(member, classes))


def _inherited(node: ast.ClassDef, classes: Mapping[str, ast.ClassDef]) -> set[str]:
    names: set[str] = set()
    for base in node.bases:
        parent = classes.get(re.split(r"[\[(]", ast.unparse(base))[0].rpartition(".")[2])
        if parent is not None and parent is not node:
            names |= {member.name for member in parent.body if isinstance(member, _Function)}
            names |= _inherited(parent, classes)
    return names


def repeated_files(tree: Tree) -> dict[str, list[str]]:
    """File name -> paths, of each name that is in use twice outside of the tests, not on purpose."""
    places: dict[str, list[str]] = {}
    for path in tree.files:
        name = path.rpartition("/")[2]
        if not path.startswith("tests/") and name not in ("__init__.py", "__main__.py"):
            places.setdefault(name, []).append(path)
    return _repeated(places)


def repeated_classes(tree: Tree) -> dict[str, list[str]]:
    """Class name -> modules, of each name that two classes of the library have, not on purpose."""
    places: dict[str, list[str]] = {}
    for name, parsed in tree.parsed.items():
        for node in ast.walk(parsed):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    return _repeated(places)


def _repeated(places: Mapping[str, list[str]]) -> dict[str, list[str]]:
    return {
        name: where
        for name, where in sorted(places.items())
        if len(where) > 1 and not set(where) <= SAME_ON_PURPOSE.get(name, set())
    }


def type_only_imports(tree: Tree) -> list[str]:
    """Modules with an import for the type checker alone."""
    return [name for name, source in tree.modules.items() if "if TYPE_CHECKING" in source]


FIGURES: dict[str, Callable[[Tree], Any]] = {
    "entries at the top level": top_level_entries,
    "lines of Python in the library": lambda tree: sum(
        source.count("\n") for source in tree.modules.values()
    ),
    "rooms": lambda tree: sorted(map(room_of, tree.modules.keys() - FRONT_DOORS)),
    "arrows between rooms": lambda tree: sum(map(len, tree.arrows.values())),
    "floors that the arrows need": lambda tree: longest_chain(tree.arrows),
    "cycles between rooms": lambda tree: knots(tree.arrows),
    "cycles between files": lambda tree: knots(tree.imports),
    "type-only imports": type_only_imports,
    "foreign private names in serving": foreign_privates,
    "lines per rule": lines_per_rule,
    "files above 450 lines": long_files,
    "formatter switched off": formatter_skips,
    "comment lines per 100 of code": comment_density,
    "public symbols without docstring": undocumented,
    "file names in use twice": repeated_files,
    "class names in use twice": repeated_classes,
}


def number(value: Any) -> float:
    """The figure in one number: a collection counts its members, a table of counts adds them up."""
    if isinstance(value, dict) and value and all(isinstance(v, int) for v in value.values()):
        return sum(value.values())
    return len(value) if isinstance(value, dict | list) else value


def report(tree: Tree, *, details: bool = False) -> Iterator[str]:
    """The figures, one a line; with details each member of a figure below it."""
    for name, figure in FIGURES.items():
        value = figure(tree)
        if name == "lines per rule":
            counts = sorted(value.values())
            middle = counts[len(counts) // 2] if counts else 0
            yield f"{name:36} {middle} (median), {max(counts, default=0)} (most)"
        elif name == "rooms":
            value = sorted(Counter(value).items())
            yield f"{name:36} {len(value)}"
        elif name == "files above 450 lines":
            library = [path for path in value if path.startswith(LIBRARY)]
            yield f"{name:36} {len(library)} in the library, {len(value) - len(library)} beside it"
        else:
            yield f"{name:36} {number(value)}"
        if details and isinstance(value, dict | list):
            members = value.items() if isinstance(value, dict) else value
            yield from (f"    {_member(member)}" for member in members)


def _member(member: Any) -> str:
    if isinstance(member, tuple):
        return f"{member[0]}: {', '.join(member[1]) if isinstance(member[1], list) else member[1]}"
    return " <-> ".join(member) if isinstance(member, list) else str(member)
