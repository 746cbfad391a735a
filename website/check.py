"""Checks the built site: every public symbol has an entry. ``python -m website.check build/site``."""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path

from website import pages


def missing_symbols(site: Path) -> list[str]:
    """Returns the public symbols without an anchor on the page of their module."""
    missing = []
    for module in pages.public_modules():
        page = site / "api" / f"{module}.html"
        text = html.unescape(page.read_text(encoding="utf-8")) if page.is_file() else ""
        anchors = set(re.findall(r'id="([^"]+)"', text))
        missing += [
            f"{module}.{name}"
            for name in pages.public_symbols(module)
            if f"{module}.{name}" not in anchors
        ]
    return missing


def main(site: Path) -> int:
    """Prints what is missing and returns the exit status."""
    missing = missing_symbols(site)
    for name in missing:
        print(f"missing from the API reference: {name}")
    count = sum(len(pages.public_symbols(module)) for module in pages.public_modules())
    if not missing:
        print(f"{count} public symbols of {len(pages.public_modules())} modules are on the site.")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
