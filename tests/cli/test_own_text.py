"""The command line with one's own text: options, refusals, and which evaluate a folder gets."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import moe_jax
from moe_jax.cli import app
from moe_jax.lab.data import load_corpus

runner = CliRunner()

LINE = b"the quick brown fox jumps over the lazy dog\n"


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(LINE * 3000)
    return file


@pytest.fixture
def checkpoint(tmp_path, text):
    """A manifest that records the text; nothing reads further than that."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "manifest.json").write_text("{}", encoding="utf-8")
    return folder


def said(result) -> str:
    return " ".join(result.stderr.split())


def test_the_version_is_an_option_and_a_short_help_exists():
    assert moe_jax.__version__ in runner.invoke(app, ["--version"]).stdout
    for words in (["-h"], ["train", "-h"], ["bench", "layer", "-h"], ["config", "check", "-h"]):
        result = runner.invoke(app, words)
        assert result.exit_code == 0
        assert "Usage" in result.stdout
    assert "--install-completion" in runner.invoke(app, ["-h"]).stdout


@pytest.mark.parametrize("command", ["train", "demo"])
def test_own_text_reaches_the_job(monkeypatch, tmp_path, text, command):
    from moe_jax.lab import demo, training

    seen = []
    monkeypatch.setattr(
        training, "train", lambda *_, corpus, **__: seen.append(corpus) or (tmp_path, {})
    )
    monkeypatch.setattr(demo, "run", lambda *_, corpus, **__: seen.append(corpus) or {})
    result = runner.invoke(app, [command, "--out", str(tmp_path / "out"), "--data", str(text)])
    assert result.exit_code == 0, result.output
    assert [corpus.root for corpus in seen] == [str(text)]
    result = runner.invoke(app, [command, "--out", str(tmp_path / "out"), "--glob", "*.md"])
    assert result.exit_code == 2
    assert "Add --data" in said(result)


def test_the_demo_says_what_it_does_and_where_it_goes(monkeypatch):
    from moe_jax.lab import demo, seeds

    folders = []
    monkeypatch.setattr(demo, "run", lambda folder, **_: folders.append(folder.as_posix()) or {})
    monkeypatch.setattr(
        seeds, "run_seeds", lambda folder, numbers, *_, **__: folders.append(numbers) or {}
    )
    assert "4 layers, 16 experts, k=4" in said(runner.invoke(app, ["demo"]))
    assert "about a minute" in said(runner.invoke(app, ["demo", "--quick"]))
    runner.invoke(app, ["demo", "--seeds", "0,1,2"])
    assert folders == ["runs/demo", "runs/demo-quick", [0, 1, 2]]
    assert "expected different numbers from 0 with commas" in said(
        runner.invoke(app, ["demo", "--seeds", "a"])
    )


def about(monkeypatch, text):
    """Lets a checkpoint record this text."""
    from moe_jax import checkpoint

    record = load_corpus(text).describe()
    monkeypatch.setattr(checkpoint, "load_metadata", lambda _: {"metadata": {"data": record}})


@pytest.mark.parametrize("command", ["calibrate", "evaluate"])
def test_another_text_is_refused(monkeypatch, tmp_path, checkpoint, text, command):
    about(monkeypatch, text)
    other = tmp_path / "other.txt"
    other.write_bytes(LINE * 4000)
    words = [command, str(checkpoint), "--data", str(other)]
    if command == "calibrate":
        words += ["--out", str(tmp_path / "out"), "--target-saving", "0.2"]
    result = runner.invoke(app, words)
    assert result.exit_code == 2
    assert "--allow-other-data" in said(result)


REPORT = {
    "checkpoint": "c",
    "variant": "",
    "rule": "MinP",
    "data": {"split": {"unit": "file"}},
    "held_out_files": 94,
    "tokens": 32768,
    "bits_per_byte": 2.42,
    "interval": [2.3, 2.5],
    "trained": {"k": 4, "bits_per_byte": 2.4},
    "saving": 0.2,
    "change": {
        "relative": 0.003,
        "relative_low": 0.002,
        "relative_high": 0.004,
        "verdict": "not shown",
    },
    "controls": {
        "drop_lowest": {
            "label": "mix of k and k-1 (control)",
            "mean_k": 3.2,
            "relative": 0.005,
            "relative_low": 0.004,
            "relative_high": 0.006,
            "avoided": [0.4, None, 0.6],
        }
    },
    "layers": [{"layer": 0, "target_mean_k": 3.2, "calibrated_mean_k": 3.2, "mean_k": 3.25}],
    "tails": {
        "sequences": 10,
        "mean_k_of_sequences": {"p5": 3, "median": 3.2, "p95": 3.4, "p99": 3.5, "max": 3.6},
        "tokens_by_experts": [0.0, 0.1, 0.2, 0.3, 0.4],
        "change_of_files": {"median": 0.0, "p95": 0.01, "max": 0.02, "worst_file": "a.py"},
    },
}


def test_evaluate_prints_loss_controls_layers_and_tails(monkeypatch, checkpoint, text):
    from moe_jax.lab import model_report

    about(monkeypatch, text)
    monkeypatch.setattr(model_report, "evaluate_checkpoint", lambda *_, **__: REPORT)
    shown = " ".join(runner.invoke(app, ["evaluate", str(checkpoint)]).stdout.split())
    for part in (
        "2.4200 bits per byte (2.3000 to 2.5000) with MinP",
        "+0.30% (+0.20% to +0.40%), 20.0% fewer experts",
        "not shown",
        "not determined",
        "3.250",
        "95th percentile 3.40, 99th 3.50, largest 3.60",
        "95th percentile +1.00%, largest +2.00% (a.py)",
    ):
        assert part in shown, part
    printed = runner.invoke(app, ["evaluate", str(checkpoint), "--json"]).stdout
    assert json.loads(printed) == REPORT


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("checkpoint", ["--rule", "MinP"], "got --rule, for published models"),
        ("published", ["--data", "x"], "expected --text for a published model"),
        ("empty", [], "got neither"),
        ("nowhere", [], "got no folder"),
    ],
)
def test_evaluate_tells_checkpoints_from_published_models(
    monkeypatch, tmp_path, text, checkpoint, name, options, message
):
    about(monkeypatch, text)
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    result = runner.invoke(app, ["evaluate", str(tmp_path / name), *options])
    assert result.exit_code == 2
    assert message in said(result)
