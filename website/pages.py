"""Generated pages of the documentation site: API reference, rules, notebooks, repository files.

Nothing here imports mkdocs, so the tests run it without the ``docs`` extra.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

# The table "What is public" of README, package by package. A package without ``__all__`` documents its
# modules one by one.
PUBLIC = (
    "moe_jax",
    "moe_jax.nn.nnx",
    "moe_jax.nn.linen",
    "moe_jax.nn.elastic",
    "moe_jax.nn.patching",
    "moe_jax.nn.profiler",
    "moe_jax.interop",
    "moe_jax.models",
    "moe_jax.parallel",
    "moe_jax.checkpoint",
    "moe_jax.testing",
    "moe_jax.lab",
)

# Files of the repository that become pages, by their path there.
REPOSITORY_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "notebooks/README.md": "notebooks/index.md",
}


def notebooks() -> dict[str, Path]:
    """Returns the page of each notebook and its text half."""
    sources = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.py"))
    return {f"notebooks/{path.stem}.md": path for path in sources}


# --- API reference --------------------------------------------------------------------------


def public_modules() -> list[str]:
    """Returns the dotted names of the modules that have a page of their own."""
    names = []
    for name in PUBLIC:
        path = _source(name)
        if path is None:
            continue
        if path.name != "__init__.py" or _exported(path) is not None:
            names.append(name)
            continue
        names += [
            f"{name}.{file.stem}"
            for file in sorted(path.parent.glob("*.py"))
            if not file.stem.startswith("_") and public_symbols(f"{name}.{file.stem}")
        ]
    return names


def public_symbols(module: str) -> list[str]:
    """Returns the public functions and classes of a module: ``__all__``, or those defined in it."""
    path = _source(module)
    if path is None:
        raise ValueError(f"module: expected one of this repository, got {module!r}.")
    exported = _exported(path)
    if exported is not None:
        return exported
    return [
        node.name
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
    ]


def _source(module: str) -> Path | None:
    base = ROOT.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def _exported(path: Path) -> list[str] | None:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def reference_pages() -> dict[str, str]:
    """Returns a page for each public module, with an entry for every public symbol."""
    pages = {}
    for module in public_modules():
        path = _source(module)
        assert path is not None
        about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        entries = "\n\n".join(
            f"::: {module}.{name}\n{fields_table(name)}" for name in public_symbols(module)
        )
        pages[f"api/{module}.md"] = f"# {module}\n\n{about}\n\n{entries}\n"
    return pages


@functools.cache
def _pytrees() -> dict[str, tuple[str, ast.ClassDef]]:
    """The classes with the decorator ``pytree``: source text and definition, by name."""
    classes = {}
    for path in sorted((ROOT / "moe_jax").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "@pytree" not in text:
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and any(
                isinstance(decorator, ast.Name) and decorator.id == "pytree"
                for decorator in node.decorator_list
            ):
                classes[node.name] = (text, node)
    return classes


def fields_table(name: str) -> str:
    """Returns the fields of a pytree class with their types and comments, which state shapes.

    mkdocstrings knows the fields of a ``dataclass`` only. For any other symbol the text is empty.
    """
    if name not in _pytrees():
        return ""
    text, node = _pytrees()[name]
    lines = text.splitlines()
    rows = ["", "| field | type | meaning |", "|---|---|---|"]
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert field.end_lineno is not None
            comment = lines[field.end_lineno - 1].partition("  # ")[2]
            kind = ast.unparse(field.annotation).replace("|", "\\|")
            rows.append(
                f"| `{field.target.id}` | `{kind}` | {comment.replace('|', chr(92) + '|')} |"
            )
    return "\n".join([*rows, ""])


# --- the catalogue of rules -----------------------------------------------------------------

# Values for fields without a default, to build a rule whose traits can be shown.
_EXAMPLE = {"num_experts": 8, "k": 2, "min_k": 1, "max_k": 4, "mean_k": 1.5, "d_model": 16}


def rules_page() -> str:
    """Returns the catalogue of routing rules, from the classes themselves."""
    import moe_jax.routers
    from moe_jax.routers.base import Router
    from moe_jax.routers.registry import LAZY_RULES, rule_class

    own = [
        value
        for name in moe_jax.routers.__all__
        if inspect.isclass(value := getattr(moe_jax.routers, name))
        and issubclass(value, Router)
        and dataclasses.is_dataclass(value)
        and value is not Router
    ]
    single = [rule_class(name) for name in sorted(LAZY_RULES)]
    lines = [
        "# Rules",
        "",
        "Every rule is a frozen value that produces one `Routing`. The table is generated from the "
        "classes. *Causal*: a token's answer does not depend on later tokens. *Batch-invariant*: it "
        "does not depend on other tokens at all, which the service requires. *Empty*: a token may "
        "use no expert. *Budget*: whether a mean number of experts is met exactly, on average, or "
        "cannot be set.",
        "",
        "| rule | causal | batch-invariant | empty | budget |",
        "|---|---|---|---|---|",
    ]
    for rule in own:
        traits = _traits(rule)
        row = ["yes" if value is True else "no" if value is False else value for value in traits]
        lines.append(f"| [{rule.__name__}](#{rule.__name__.lower()}) | {' | '.join(row)} |")
    for rule in own:
        lines += _rule_section(rule, linked=hasattr(moe_jax, rule.__name__))
    lines += ["", "# Rules of single models", "", "They live in `moe_jax.interop`."]
    for rule in single:
        lines += _rule_section(rule, linked=False)
    return "\n".join(lines) + "\n"


def _traits(rule: type) -> list[bool | str]:
    traits = _example(rule).traits
    names = ("causal", "batch_invariant", "may_leave_token_empty", "budget")
    return [getattr(traits, name) for name in names]


def _example(rule: type):
    required = [
        field.name
        for field in dataclasses.fields(rule)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    return rule(**{name: _EXAMPLE.get(name, 2) for name in required})


def _rule_section(rule: type, *, linked: bool) -> list[str]:
    summary = (inspect.getdoc(rule) or "").split("\n\nArgs:")[0].split("\n\nExample:")[0]
    link = f"[API](api/moe_jax.md#moe_jax.{rule.__name__})" if linked else f"`{rule.__module__}`"
    fields = [
        f"| `{field.name}` | {_default(field)} |"
        for field in dataclasses.fields(rule)
        if not field.name.startswith("_")
    ]
    return [
        "",
        f"## {rule.__name__}",
        "",
        summary,
        "",
        link,
        "",
        "| field | default |",
        "|---|---|",
        *fields,
    ]


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        return f"`{field.default!r}`"
    return "required" if field.default_factory is dataclasses.MISSING else "made by the class"


# --- pages of the repository ----------------------------------------------------------------


def notebook_page(source: Path) -> str:
    """Returns a notebook in jupytext's percent format as a page, with its stored outputs."""
    parts = []
    outputs = iter(stored_outputs(source))
    for kind, body in notebook_cells(source):
        if kind == "markdown":
            parts.append(re.sub(r"^# ?", "", body, flags=re.M))
            continue
        parts.append(f"```python\n{body}\n```")
        output = next(outputs, {})
        if output.get("text"):
            parts.append(f'```text title="Output"\n{output["text"]}\n```')
        parts += [
            f"![Output of the cell above](outputs/{name})" for name in output.get("pictures", [])
        ]
    return "\n\n".join(parts) + "\n"


def notebook_cells(source: Path) -> list[tuple[str, str]]:
    """Returns (``markdown`` or ``code``, text) of each cell of a notebook in the percent format."""
    cells = re.split(r"^# %%(.*)$", source.read_text(encoding="utf-8"), flags=re.M)[1:]
    return [
        ("markdown" if "[markdown]" in kind else "code", body.strip())
        for kind, body in zip(cells[::2], cells[1::2], strict=True)
    ]


def stored_outputs(source: Path) -> list[dict[str, Any]]:
    """Returns what the code cells printed and drew when ``notebooks/sync.py --run`` ran them."""
    file = source.parent / "outputs" / f"{source.stem}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def with_site_links(text: str, *, source: str, page: str, assets: dict[str, str]) -> str:
    """Rewrites links to files of the repository so that they lead to pages of the site.

    Args:
        text: Markdown.
        source: path of the file in the repository.
        page: path of the page on the site.
        assets: filled with pictures outside of ``docs``: path on the site to path in the repository.
    """

    def rewritten(match: re.Match[str]) -> str:
        picture, label, target = match.groups()
        path, hash_, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or not path:
            return match[0]
        repository = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        place = site_path(repository)
        if place is None and picture:
            place = f"assets/{repository}"
            assets[place] = repository
        if place is None:
            return f"{label} (`{repository}`)" if f"`{repository}`" != label else label
        relative = posixpath.relpath(place, posixpath.dirname(page) or ".")
        return f"{picture}[{label}]({relative}{hash_}{anchor})"

    # Code is left alone: a list comprehension looks like a link.
    pieces = re.split(r"(```.*?```)", text, flags=re.S)
    return "".join(p if p.startswith("```") else _LINK.sub(rewritten, p) for p in pieces)


def site_path(repository: str) -> str | None:
    """Returns the path on the site of a file of the repository, or None if it is not there."""
    if repository in REPOSITORY_PAGES:
        return REPOSITORY_PAGES[repository]
    if repository.startswith("docs/"):
        return repository.removeprefix("docs/")
    if repository.startswith("notebooks/") and repository.endswith(".ipynb"):
        return repository.removesuffix(".ipynb") + ".md"
    return None


def generated_pages() -> Mapping[str, tuple[str, str]]:
    """Returns every generated page: its path, its text, and the file of the repository behind it."""
    pages = {path: (text, path) for path, text in reference_pages().items()}
    pages["rules.md"] = (rules_page(), "docs/rules.md")
    for source, page in REPOSITORY_PAGES.items():
        pages[page] = ((ROOT / source).read_text(encoding="utf-8"), source)
    for page, source in notebooks().items():
        pages[page] = (notebook_page(source), f"notebooks/{source.name}")
    return pages
