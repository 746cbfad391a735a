"""Types: pyright in strict mode finds nothing in a user's file, so nothing there has lost its type."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USER = ROOT / "tests" / "typing" / "user.py"


def pyright(folder: Path, *sources: str) -> list[str]:
    """The errors of pyright in files with these sources, each with the number of its file."""
    pytest.importorskip("pyright", reason="pip install pyright: no user's file was checked")
    for number, source in enumerate(sources):
        (folder / f"user{number}.py").write_text(source)
    settings = {
        "include": [str(folder)],
        "extraPaths": [str(ROOT)],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
        # jax.jit and jax.numpy.ones themselves are partially unknown to pyright.
        "reportUnknownMemberType": False,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "-p", str(folder), "--pythonpath", sys.executable]
    done = subprocess.run([*command, "--outputjson"], capture_output=True, text=True, check=False)
    if not done.stdout.startswith("{"):
        pytest.skip(f"pyright did not start: {done.stderr[-200:] or done.stdout[-200:]}")
    errors = json.loads(done.stdout)["generalDiagnostics"]
    return [
        f"{Path(e['file']).stem}:{e['range']['start']['line'] + 1} {e['message']}" for e in errors
    ]


def test_strict_pyright_is_clean_on_a_users_file_and_sees_a_lost_type(tmp_path: Path):
    # Both files in one run: pyright takes seconds to read JAX.
    source = USER.read_text()
    lost = source.replace("hidden = self.fixed(x)", "hidden = getattr(self, 'fixed')(x)")
    assert lost != source
    errors = pyright(tmp_path, source, lost)
    assert [e for e in errors if e.startswith("user0")] == []
    assert any("assert_type" in e for e in errors if e.startswith("user1"))
