"""The scripts in ``benchmarks/`` refuse wrong options on one line, before anything is measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from moe_jax.bench.script_options import read_rows

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def refusal(monkeypatch, capsys):
    """Runs a script and returns the last line that it wrote before it exited with 2."""

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(
            sys.modules, spec.name, module
        )  # where dataclasses look their module up
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


@pytest.mark.parametrize(
    "command",
    [
        "accelerator --small --out F --rounds 0",
        "accelerator --small --out F --rounds some",
        "accelerator --small --out F --seconds -1",
        "accelerator --small --out F --seconds nan",
        "compiled --out F --seconds 0",
        "compiled --out F --targets h200",
        "compiled --out F --layers small",
        "compiled --out F --implementations fast",
        "compiled --out F --check",
        "quantized decode --rounds 0",
        "quantized compile --target h200",
        "scaling --rounds 1",
        "scaling --devices 0",
        "scaling --timed-up-to -1",
        "shares_of_layers --seeds 0",
        "shares_of_layers --steps 0",
        "shares_of_layers --tokens 0",
        "shares_of_layers --letters-per-file 0",
        "shares_of_layers --savings 1.5",
        "whole_model --turns 0",
        "whole_model --tokens -3",
        "whole_model --threads 0",
    ],
)
def test_a_wrong_option_is_one_line_that_names_it(refusal, tmp_path, command):
    name, *arguments = command.replace("F", str(tmp_path / "rows.json")).split()
    line = refusal(name, *arguments)
    option = "--out" if "--check" in arguments else arguments[-2]
    assert line.startswith(f"{name}.py")
    assert f"{option}: " in line
    assert ": expected" in line
    assert not (tmp_path / "rows.json").exists()


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("nothing", "got JSONDecodeError"),
        ("[]", "got None"),
        ('{"bench": "accelerator", "rows": [{"case": "dense"}]}', "got 'accelerator'"),
        ('{"bench": "compiled", "rows": [{"target": "h100"}]}', "got others"),
        ('{"bench": "compiled", "rows": {}}', "got others"),
    ],
)
def test_a_file_of_other_rows_is_refused_and_kept(refusal, tmp_path, text, got):
    file = tmp_path / "rows.json"
    file.write_text(text)
    assert got in refusal("compiled", "--out", file)
    assert file.read_text() == text


@pytest.mark.parametrize("name", ["accelerator", "compiled", "scaling"])
def test_a_file_that_cannot_be_written_is_refused(refusal, tmp_path, name):
    assert "--out: expected a file, got the folder" in refusal(name, "--out", tmp_path)


def test_rows_of_the_committed_table_are_read():
    file = SCRIPTS / "results" / "compiled.json"
    rows = read_rows(file, "compiled", {"passes": ("forward", "forward + backward")})
    assert rows == json.loads(file.read_text())["rows"]
