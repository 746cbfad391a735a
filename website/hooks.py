"""Hooks of mkdocs: they add the generated pages, their places in the navigation, and rewrite links."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from website import pages

_sources: dict[str, str] = {}
_assets: dict[str, str] = {}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Completes the navigation: API pages, notebooks, and pages that the file does not list."""
    nav = config.nav or []
    listed = _paths(nav)
    for entry in nav:
        for title, value in entry.items():
            if title == "API":
                value.extend(f"api/{module}.md" for module in pages.public_modules())
            if title == "How to":
                folder = Path(config.docs_dir)
                value.extend(
                    path.relative_to(folder).as_posix()
                    for path in sorted(folder.rglob("*.md"))
                    if path.relative_to(folder).as_posix() not in listed
                )
    place = next(i for i, entry in enumerate(nav) if "Results" in entry)
    nav.insert(place, {"Notebooks": ["notebooks/index.md", *pages.notebooks()]})
    return config


def _paths(nav: list) -> set[str]:
    results = set()
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            results |= _paths(value) if isinstance(value, list) else {value}
    return results


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages and the pictures that they show."""
    for page, (text, source) in pages.generated_pages().items():
        _sources[page] = source
        rewritten = pages.with_site_links(text, source=source, page=page, assets=_assets)
        files.append(File.generated(config, page, content=rewritten))
    for place, repository in _assets.items():
        files.append(File.generated(config, place, abs_src_path=str(pages.ROOT / repository)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links of written pages that lead out of ``docs``."""
    path = page.file.src_uri
    if path in _sources:
        return markdown
    return pages.with_site_links(markdown, source=f"docs/{path}", page=path, assets={})
