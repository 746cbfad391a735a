"""Commands on text: a tokenizer from the folder, the loss of files, a continuation."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from moe_jax.cli import app
from moe_jax.models import evaluate, generate, load_model
from moe_jax.models.text import TextTokenizer, tokenize_files

MODELS = Path(__file__).parents[1] / "goldens" / "models"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A golden model with a tokenizer of single letters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model") / "olmoe"
    shutil.copytree(MODELS / "olmoe", folder)
    letters = {chr(32 + i): i for i in range(95)}
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text("A first file of text.")
    (folder / "b.txt").write_text("The second.")
    (folder / "empty.txt").write_text("")
    return folder


def run(*words: object):
    return CliRunner().invoke(app, [str(w) for w in words])


def test_evaluate_gives_the_loss_of_the_files(folder, text):
    ran = run("evaluate", folder, "--text", text, "--length", 12, "--json")
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    tokens = tokenize_files(text, TextTokenizer(folder, vocab_size=96), length=12)
    assert (tokens.files, tokens.tokens, tokens.bytes) == (2, 32, 32)
    assert tokens.mask.sum(axis=1).tolist() == [12, 9, 11]
    want = evaluate(load_model(folder), tokens.input_ids, tokens.mask)
    assert report["loss"] == pytest.approx(want.loss, abs=1e-6)
    assert report["tokens"] == want.tokens == 29
    assert report["bits_per_byte"] == pytest.approx(want.loss / math.log(2), abs=1e-6)
    assert report["experts_per_token"] == {"0": 2.0, "1": 2.0}
    # Random weights: worse than guessing, as with the tokenizer of another model.
    assert want.loss > math.log(96)
    assert "above the 4.56 of a uniform guess" in ran.stderr


def test_pictures_and_hidden_files_of_a_folder_are_no_text(folder, text):
    tokenizer = TextTokenizer(folder, vocab_size=96)
    before = tokenize_files(text, tokenizer, length=12)
    (text / "picture.png").write_bytes(b"\x89PNG\xff")
    (text / ".hidden").mkdir()
    (text / ".hidden" / "notes.txt").write_text("abc")
    assert tokenize_files(text, tokenizer, length=12).paths == before.paths


def test_a_limit_cuts_the_text_and_its_bytes(folder, text):
    tokenizer = TextTokenizer(folder, vocab_size=96)
    cut = tokenize_files(text, tokenizer, length=12, limit=25)
    assert (cut.tokens, cut.bytes, cut.files) == (25, 25, 2)
    assert cut.file_tokens.tolist() == [21, 4]
    assert cut.file_index.tolist() == [0, 0, 1]


def test_budget_evaluate_generate_and_experts_work_together(folder, text, tmp_path):
    options = ("--text", text, "--length", 12, "--batch", 3)
    budget = tmp_path / "budget"
    ran = run("budget", folder, *options, "--target-saving", 0.2, "--out", budget, "--json")
    assert ran.exit_code == 0, ran.output
    fitted = json.loads(ran.stdout)
    assert fitted["calibration_mean_k_per_layer"]["1"] == pytest.approx(1.6, abs=0.05)
    assert not list(tmp_path.glob(".budget.work*"))
    ran = run("evaluate", folder, *options, "--budget", budget, "--controls", "--json")
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    # A price on the text of the fit is no price on other text, and says so.
    assert report["fitted_on_files"] == ["a.txt", "b.txt"]
    assert "2 of 2 files (a.txt, b.txt) are files that the budget was fitted on" in ran.stderr
    rules = {row["rule"]: row for row in report["rules"]}
    assert rules["budget"]["mean_k"] == pytest.approx(1.6, abs=0.05)
    assert {"mix of k and k-1", "random drop"} < set(rules)
    ran = run("evaluate", folder, *options, "--budget", budget)
    assert ran.exit_code == 0, ran.output
    assert "2 of 2 files are not new to the rule" in ran.stdout
    assert "bits a byte" in ran.stdout, "a table in a pipe cuts no header"
    again = (*options, "--rule", "MinP", "--target-saving", 0.2, "--calibration-text", text)
    assert "the budget was fitted on" in run("evaluate", folder, *again).stderr
    new = tmp_path / "new"
    new.mkdir()
    (new / "a.txt").write_text("A text with a known name.")
    (new / "copy.txt").write_text((text / "b.txt").read_text())
    ran = run("evaluate", folder, "--text", new, "--length", 10, "--budget", budget, "--json")
    # The content tells, not the name, the length of sequences or a limit.
    assert json.loads(ran.stdout)["fitted_on_files"] == ["copy.txt"]
    (new / "copy.txt").unlink()
    ran = run("evaluate", folder, "--text", new, "--length", 12, "--budget", budget, "--json")
    assert json.loads(ran.stdout)["fitted_on_files"] == []
    assert "fitted on" not in ran.stderr
    ran = run("generate", folder, "Hello", "--budget", budget, "--max-new-tokens", 2, "--json")
    assert ran.exit_code == 0, ran.output
    ran = run("evaluate", budget)
    assert ran.exit_code == 2
    assert f"moe-jax evaluate MODEL --text DIR --budget {budget}" in ran.stderr
    report = tmp_path / "report"
    ran = run("experts", folder, *options, "--budget", budget, "--out", report)
    assert ran.exit_code == 0, ran.output
    values = json.loads((report / "experts.json").read_text())
    ran = run("experts", folder, *options, "--out", report)
    assert ran.exit_code == 2
    assert "--overwrite" in ran.output
    # The second run reads the text, so that one that is missing shows that it got past the check.
    missing = ("--text", tmp_path / "missing", "--out", report, "--overwrite")
    assert "no such path" in run("experts", folder, *missing).output
    assert sum(values["experts_per_token_histogram"][0]) == 32
    assert (report / "index.html").stat().st_size > 10_000
    ran = run("evaluate", folder, *options, "--target-saving", 0.2)
    assert ran.exit_code == 2
    assert "--rule" in ran.output


def test_prune_writes_a_model_and_says_what_it_costs(folder, text, tmp_path):
    options = ("--text", text, "--held-out-text", text, "--length", 12, "--batch", 3)
    small = tmp_path / "small"
    ran = run("prune", folder, *options, "--keep", 0.5, "--out", small, "--json")
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    assert {len(rows) for rows in report["kept"].values()} == {4}
    assert report["text"] == report["held_out_text"] == text.name
    assert report["fitted_on_files"] == ["a.txt", "b.txt"]
    assert "2 of 2 files (a.txt, b.txt) are files that experts are removed by" in ran.stderr
    ran = run("evaluate", small, "--text", text, "--length", 12, "--batch", 3, "--json")
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["loss"] == pytest.approx(report["rules"][1]["loss"], abs=1e-6)


def test_generate_continues_a_prompt(folder):
    ran = run("generate", folder, "Hello", "--max-new-tokens", 4, "--json")
    assert ran.exit_code == 0, ran.output
    assert "note:" not in ran.stderr
    report = json.loads(ran.stdout)
    ids = np.array([[ord(c) - 32 for c in "Hello"]])
    made = generate(load_model(folder), ids, max_new_tokens=4, eos_ids=(2,))[0].tolist()
    assert report["tokens"] == made
    assert report["text"] == "".join(chr(32 + i) for i in made if i < 95)


def test_sequences_beyond_the_positions_of_the_model_are_noted(folder, text):
    longest = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    ran = run("generate", folder, "Hello", "--max-new-tokens", longest)
    assert ran.exit_code == 0, ran.output
    said = f"up to {longest + 5} tokens a sequence; config.json states max_position_embeddings"
    assert said in ran.stderr
    ran = run("evaluate", folder, "--text", text, "--length", longest + 1)
    assert f"--length asks for up to {longest + 1} tokens" in ran.stderr


def test_wrong_text_and_tokenizers_are_named(folder, text, tmp_path, monkeypatch):
    ran = run("evaluate", MODELS / "olmoe", "--text", text)
    assert ran.exit_code == 2
    assert "tokenizer.json" in ran.output
    with pytest.raises(ValueError, match="another model"):
        TextTokenizer(folder, vocab_size=50)
    tokenizer = TextTokenizer(folder, vocab_size=96)
    with pytest.raises(FileNotFoundError, match="no such path"):
        tokenize_files(tmp_path / "missing", tokenizer)
    (tmp_path / "blank.txt").write_text(" \n")
    with pytest.raises(ValueError, match="files with text"):
        tokenize_files(tmp_path, tokenizer)
    picture = tmp_path / "picture"
    picture.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        tokenize_files(picture, tokenizer)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        TextTokenizer(tmp_path, vocab_size=96)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'moe_jax\[models\]'"):
        TextTokenizer(folder, vocab_size=96)


def test_a_continuation_is_printed_on_the_lines_that_it_has(folder):
    prompt = "A long line of text. " * 12
    ran = run("generate", folder, prompt, "--max-new-tokens", 1)
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.startswith(prompt), "not broken at the 80 columns of a pipe"


def test_a_broken_end_of_text_is_told_before_the_weights_are_read(folder, tmp_path, monkeypatch):
    broken = tmp_path / "model"
    shutil.copytree(folder, broken)
    (broken / "generation_config.json").write_text('{"eos_token_id": "x"}')
    monkeypatch.setattr("moe_jax.models.load_model", None)
    ran = run("generate", broken, "Hello")
    assert ran.exit_code == 2
    assert "eos_token_id" in ran.stderr
