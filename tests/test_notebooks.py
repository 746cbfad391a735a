"""The notebooks run, say the same as their reviewed text, and carry no machine paths.

Their outputs are stored beside them, for the documentation site.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MISSING = [
    name
    for name in ("nbclient", "nbformat", "ipykernel", "jupytext")
    if importlib.util.find_spec(name) is None
]

pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"the notebooks need {', '.join(MISSING)}, which is not installed: "
    "pip install -e '.[dev]'",
)


def sync_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks_sync", FOLDER / "sync.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_notebook_has_its_text_and_every_text_its_notebook():
    assert len(NOTEBOOKS) >= 4
    assert [p.stem for p in sync_module().sources()] == [p.stem for p in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_what_its_text_says_without_outputs(path: Path):
    import nbformat

    expected = sync_module().notebook_text(path.with_suffix(".py"))
    stored = path.read_text(encoding="utf-8")
    cells = [
        [(cell.cell_type, cell.source) for cell in nbformat.reads(text, as_version=4).cells]
        for text in (expected, stored)
    ]
    assert cells[0] == cells[1], "the two halves differ: run python notebooks/sync.py"
    for cell in nbformat.reads(stored, as_version=4).cells:
        assert not cell.get("outputs"), "outputs are not stored: run python notebooks/sync.py"
        assert cell.get("execution_count") is None
    assert stored == expected, "metadata differ: run python notebooks/sync.py"
    assert len(cells[1]) < 15, "keep a notebook short"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_stored_outputs_belong_to_the_code_and_are_on_the_page(path: Path):
    from website import pages

    source = path.with_suffix(".py")
    outputs, digest = pages.stored_outputs(source), sync_module().code_digest
    code = [body for kind, body in pages.notebook_cells(source) if kind == "code"]
    stale = "run python notebooks/sync.py --run"
    assert [output["code"] for output in outputs] == [digest(body) for body in code], stale
    page = pages.notebook_page(source)
    pictures = [name for output in outputs for name in output["pictures"]]
    assert pictures
    for name in pictures:
        assert f"(outputs/{name})" in page
        assert (FOLDER / "outputs" / name).stat().st_size < 100_000
    printed = [output["text"] for output in outputs if output["text"]]
    assert printed
    assert all(text in page for text in printed)


@pytest.mark.parametrize(
    "path",
    sorted(p for p in FOLDER.rglob("*") if p.suffix in {".py", ".ipynb", ".json"}),
    ids=lambda p: p.name,
)
def test_no_machine_paths(path: Path):
    text = path.read_text(encoding="utf-8")
    matches = re.findall(
        r"(?<![\w.])/(?:home|root|Users|tmp|work|mnt|opt|var)/\S*|\b[A-Z]:\\\\", text
    )
    assert not matches


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path):
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config

    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:  # of a short name, as sockets' names must be
        client = NotebookClient(
            notebook,
            timeout=600,
            startup_timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": str(FOLDER)}},
            # A port could be another's by the time that the kernel listens on it.
            config=Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/k"}}),
        )
        client.execute(env=kernel_environment(tmp_path))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code)
    pictures = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert pictures, "no picture came out"


def kernel_environment(own: Path) -> dict[str, str]:
    """Compiled cheaply and kept between runs, as in conftest.py; plots go into the notebook.

    IPython's folder, with its one history for all, is the kernel's own.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    defaults = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    inline = "module://matplotlib_inline.backend_inline"
    fixed = {"MPLBACKEND": inline, "PYTHONPATH": path, "IPYTHONDIR": str(own / "ipython")}
    return {**defaults, **os.environ, **fixed}


def test_the_kernel_is_this_python():
    from jupyter_client.kernelspec import KernelSpecManager

    assert KernelSpecManager().get_kernel_spec("python3").argv[0] in (sys.executable, "python")
