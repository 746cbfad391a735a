"""The command line: messages instead of tracebacks, exit codes that mean something, JSON."""

import json

import jax
import numpy as np
import pytest
from typer.main import get_command
from typer.testing import CliRunner

from moe_jax.checkpoint import Checkpoint, save
from moe_jax.cli import app
from moe_jax.routers import MinP, TopK

runner = CliRunner()


@pytest.fixture
def hidden(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 64, 16)) * rng.uniform(0.5, 2.0, size=(2, 64, 1))
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    return tmp_path / "x.npy"


def test_route_prints_one_json_object_and_nothing_else(hidden, tmp_path):
    saved = tmp_path / "routing.npz"
    result = runner.invoke(app, ["route", str(hidden), "--json", "--save", str(saved)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["tokens"] == 128
    assert not report["trained"]
    assert sum(report["expert_utilization"]) == pytest.approx(1.0)
    assert report["mean_experts_per_token"] == pytest.approx(2.5, rel=0.01)
    with np.load(saved) as arrays:
        counts = arrays["num_experts_per_token"]
    assert counts.mean() == pytest.approx(report["mean_experts_per_token"])


def test_untrained_weights_say_so(hidden):
    assert "untrained" in runner.invoke(app, ["route", str(hidden)]).stderr


def test_route_takes_a_budget(hidden):
    result = runner.invoke(app, ["route", str(hidden), "--json", "--target-mean-k", "1.4"])
    assert json.loads(result.stdout)["mean_experts_per_token"] == pytest.approx(1.4, rel=0.01)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p / "none.npy", "got nothing there"),
        (lambda p: p, "got a folder"),
        (lambda p: _write(p / "text.npy", b"hello"), "expected a .npy file"),
        (lambda p: _save(p / "one.npy", np.ones(4, np.float32)), "at least two axes"),
        (lambda p: _save(p / "int.npy", np.ones((4, 4), np.int32)), "expected floats"),
        (lambda p: _save(p / "nan.npy", np.full((4, 4), np.nan, np.float32)), "NaN or inf"),
        (lambda p: _save(p / "object.npy", np.array([{}], object)), "expected a .npy file"),
    ],
)
def test_bad_files_are_refused_with_exit_code_2(tmp_path, make, said):
    result = runner.invoke(app, ["route", str(make(tmp_path))])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def _write(path, content):
    path.write_bytes(content)
    return path


def _save(path, array):
    np.save(path, array, allow_pickle=True)
    return path


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--router", "layer_0"], "--router: expected it with --checkpoint"),
        (["--checkpoint", "c", "--target-mean-k", "1.5"], "expected neither with --checkpoint"),
        (["--checkpoint", "c", "--config", "x.json"], "expected neither with --checkpoint"),
        (["--save", "no/such/x.npz"], "got no such folder: no/such"),
        (["--save", "."], "expected a file to write, got a folder"),
    ],
)
def test_route_refuses_options_it_cannot_follow_before_it_routes(
    hidden, monkeypatch, options, said
):
    from moe_jax.lab import hidden_states

    monkeypatch.setattr(hidden_states, "route_report", lambda *_: pytest.fail("routed"))
    result = runner.invoke(app, ["route", str(hidden), *options])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_a_config_of_another_width_is_refused(hidden):
    result = runner.invoke(app, ["route", str(hidden), "--config", "configs/production.json"])
    assert result.exit_code == 2
    assert "input_dim=768" in result.stderr


def test_config_check_says_yes_or_no(tmp_path):
    assert runner.invoke(app, ["config", "check", "configs/production.json"]).exit_code == 0
    bad = _write(tmp_path / "bad.json", b'{"router_config": {"num_expert": 4}}')
    result = runner.invoke(app, ["config", "check", str(bad), "--json"])
    assert result.exit_code == 1
    assert "num_experts" in json.loads(result.stdout)["problems"][0]


@pytest.mark.parametrize(("name", "got"), [("nope.json", "nothing there"), (".", "a folder")])
def test_config_check_of_what_is_no_file_is_wrong_input(tmp_path, name, got):
    result = runner.invoke(app, ["config", "check", str(tmp_path / name)])
    assert result.exit_code == 2
    assert f"expected a readable JSON file, got {got}" in " ".join(result.stderr.split())
    assert "Errno" not in result.stderr


def test_config_check_and_show_take_a_file_with_and_without_the_option(tmp_path):
    file = str(_write(tmp_path / "one.json", b'{"router_config": {"num_experts": 5}}'))
    for given in ([file], ["--config", file]):
        shown = runner.invoke(app, ["config", "show", *given])
        assert json.loads(shown.stdout)["router_config"]["num_experts"] == 5
        assert runner.invoke(app, ["config", "check", *given]).exit_code == 0
    for command in (
        ["check"],
        ["check", file, "--config", file],
        ["show", file, "--config", file],
        ["show", file, "--preset", "mixed"],
    ):
        result = runner.invoke(app, ["config", *command])
        assert result.exit_code == 2
        assert "expected one file" in " ".join(result.stderr.split())


def test_config_show_prints_presets_and_refuses_unknown_ones():
    result = runner.invoke(app, ["config", "show", "--preset", "high_accuracy"])
    assert json.loads(result.stdout)["router_config"]["num_experts"] == 16
    assert runner.invoke(app, ["config", "show", "--preset", "none"]).exit_code == 2


def test_inspect_and_route_a_checkpoint(hidden, tmp_path):
    import jax

    from moe_jax import TopP
    from moe_jax.checkpoint import Checkpoint, save

    router = TopP(num_experts=4, max_k=2)
    params = {"layer": {"router": router.init(jax.random.key(0), 16)}}
    x = np.load(hidden).reshape(-1, 16)
    state = router.fit(params["layer"]["router"], router.init_state(), x, target_mean_k=1.5)
    folder = tmp_path / "saved"
    save(folder, Checkpoint(params=params, routers={"layer": router}, states={"layer": state}))

    summary = json.loads(runner.invoke(app, ["inspect", str(folder), "--json"]).stdout)
    assert summary["routers"]["layer"]["fit"]["achieved_mean_k"] == pytest.approx(1.5, rel=0.01)
    assert "1.500" in runner.invoke(app, ["inspect", str(folder)]).stdout
    result = runner.invoke(app, ["route", str(hidden), "--checkpoint", str(folder), "--json"])
    report = json.loads(result.stdout)
    assert report["trained"]
    assert report["mean_experts_per_token"] == pytest.approx(1.5, rel=0.01)
    wrong = ["route", str(hidden), "--checkpoint", str(folder), "--router", "x"]
    assert runner.invoke(app, wrong).exit_code == 2
    narrow = _save(tmp_path / "narrow.npy", np.ones((3, 8), np.float32))
    result = runner.invoke(app, ["route", str(narrow), "--checkpoint", str(folder)])
    assert result.exit_code == 2
    summary = " ".join(result.stderr.split())
    assert f"{narrow}: expected hidden states of width 16, as the router of {folder}" in summary
    assert "got [3, 8]" in summary
    assert runner.invoke(app, ["inspect", str(tmp_path)]).exit_code == 2


def test_names_with_brackets_are_printed_as_they_are(tmp_path):
    """rich reads [/b] as the end of bold text, and drops [a-z]."""
    place, router = tmp_path / "[a-z]" / "[", TopK(num_experts=4, k=2)
    content = Checkpoint(
        params={"block": router.init(jax.random.key(0), 16)},
        routers={"block": router},
        states={"block": router.init_state()},
        metadata={"glob": "[a-z]*.md"},
    )
    checkpoint = save(place / "b]", content)
    file = place / "production.json"
    file.write_text(json.dumps({"router_config": {"num_experts": 4}}))
    for words in (
        ["inspect", checkpoint],
        ["export", checkpoint, "--out", place / "export"],
        ["restore", place / "export", "--into", place / "releases"],
        ["config", "check", file],
    ):
        result = runner.invoke(app, list(map(str, words)))
        assert result.exit_code == 0, result.output
        assert str(place) in result.stdout
    assert "[a-z]*.md" in runner.invoke(app, ["inspect", str(checkpoint)]).stdout


def test_train_calibrate_inspect_and_route_one_after_the_other(tmp_path):
    """The commands of the README in a row, on a tiny model."""
    import jax

    sizes = {"num_layers": 2, "d_model": 32, "num_heads": 2, "num_experts": 4, "k": 2, "d_ff": 16}
    tiny = tmp_path / "tiny.json"
    tiny.write_text(json.dumps({**sizes, "length": 32, "batch_size": 4}))
    model, fitted = tmp_path / "model", tmp_path / "fitted"
    words = ["train", "--out", str(model), "--steps", "40", "--model", str(tiny), "--json"]
    result = runner.invoke(app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["steps"] == 40
    taken = runner.invoke(app, ["train", "--out", str(model), "--steps", "3"])
    assert taken.exit_code == 2
    assert "--overwrite" in taken.stderr
    words = ["calibrate", str(model), "--out", str(model), "--target-saving", "0.2"]
    assert "--overwrite" in runner.invoke(app, words).stderr
    words = ["calibrate", str(model), "--out", str(fitted), "--rule", "TopP"]
    assert runner.invoke(app, words).exit_code == 2  # no target
    result = runner.invoke(app, [*words, "--target-saving", "0.2", "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(runner.invoke(app, ["inspect", str(fitted), "--json"]).stdout)
    assert len(summary["routers"]) == 4
    shown = runner.invoke(app, ["inspect", str(fitted)]).stdout
    assert "layer_0-1" in shown
    assert "trained/layer_0-1" in shown
    assert "trained/layer_1" not in shown
    assert "trained/layer_1" in runner.invoke(app, ["inspect", str(fitted), "--layers"]).stdout
    reached = summary["routers"]["layer_1"]["fit"]["achieved_mean_k"]
    assert reached == pytest.approx(1.6, rel=0.01)
    hidden = np.asarray(jax.random.normal(jax.random.key(0), (50, 32)))
    np.save(tmp_path / "h.npy", hidden)
    words = ["route", str(tmp_path / "h.npy"), "--checkpoint", str(fitted), "--router", "layer_1"]
    report = json.loads(runner.invoke(app, [*words, "--json"]).stdout)
    assert report["trained"]
    assert report["router"]["kind"] == "TopP"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1, 2]", "got a list"),
        (b"{x", "got no JSON"),
        (b"\xff", "got no JSON"),
        (b'{"num_layers": "2"}', "got a value of another type"),
        (b'{"layers": 2}', "got layers"),
        (None, "No such file"),
    ],
)
def test_a_bad_model_file_is_told_by_its_name_and_what_was_expected(tmp_path, content, said):
    file = tmp_path / "model.json"
    if content is not None:
        file.write_bytes(content)
    result = runner.invoke(app, ["train", "--out", str(tmp_path / "out"), "--model", str(file)])
    assert result.exit_code == 2, result.output
    assert f"--model {file}: " in " ".join(result.stderr.split())
    assert said in " ".join(result.stderr.split())


@pytest.mark.parametrize("rule", ["ReLURouter", "TopAny"])
def test_a_rule_that_is_trained_and_not_fitted_says_so(tmp_path, rule):
    words = ["calibrate", str(tmp_path), "--out", str(tmp_path / "out"), "--rule", rule]
    result = runner.invoke(app, [*words, "--target-saving", "0.2"])
    assert result.exit_code == 2, result.output
    assert f"got {rule}, which a model is trained with" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    "words", [["train"], ["calibrate", "source", "--target-saving", "0.2"], ["demo"]], ids=str
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, words):
    def never(*arguments, **options):
        pytest.fail("the work began")

    import moe_jax.lab.calibration
    import moe_jax.lab.demo
    import moe_jax.lab.training

    for module in (moe_jax.lab.calibration, moe_jax.lab.demo, moe_jax.lab.training):
        monkeypatch.setattr(module, "load_corpus", never)
    file = _write(tmp_path / "file", b"")
    result = runner.invoke(app, [*words, "--out", str(file / "deeper")])
    assert result.exit_code == 2, result.output
    assert f"under the file {file}" in " ".join(result.stderr.split())
    _write(tmp_path / "manifest.json", b"{}")
    result = runner.invoke(app, [*words, "--out", str(tmp_path)])
    assert result.exit_code == 2, result.output
    said = "got a checkpoint" if words == ["demo"] else "--overwrite"
    assert said in " ".join(result.stderr.split())
    assert not (tmp_path / "model").exists()


OLMOE = "tests/goldens/models/olmoe"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "budget MODEL --out OUT --target-saving 0.2 --rule TopQ",
            "ExpertThreshold, or module:Class of a rule of your own, got 'TopQ'",
        ),
        (
            "budget MODEL --out OUT --target-saving 0.2 --share some",
            "share: expected one of uniform",
        ),
        ("budget MODEL --out OUT --target-saving 0.9", "target_saving: expected above 0"),
        ("budget MODEL --out OUT --target-mean-k 9", "expected a mean strictly between 1 and"),
        ("budget MODEL --out OUT", "target: expected one of target_mean_k and target_saving"),
        (
            "evaluate MODEL --rule TopQ --target-saving 0.2",
            "ExpertThreshold, or module:Class of a rule of your own, got 'TopQ'",
        ),
        ("evaluate MODEL --rule MinP", "target: expected one of target_mean_k and target_saving"),
        ("evaluate MODEL --budget OUT", "expected a checkpoint"),
        ("prune MODEL --out OUT --keep 2", "keep: expected a share above 0"),
        ("prune MODEL --out OUT --keep 0.01", "keep: expected at least 2 experts"),
        ("prune MODEL --out OUT --method best", "method: expected one of reap"),
        ("prune MODEL --out OUT --counts some", "counts: expected one of uniform"),
        ("prune MODEL --out FILE/deeper", "got one under the file"),
        ("experts MODEL --out FILE/deeper", "under the file"),
        (
            "calibrate MODEL --out OUT --rule top_q --target-saving 0.2",
            "rule: expected some of top_p",
        ),
        ("calibrate MODEL --out OUT --rule TopP --data FILE", "exactly one of target_mean_k"),
        (
            "calibrate MODEL --out OUT --rule TopP --rule top_p --target-saving 0.2",
            "each rule once",
        ),
        ("demo --out OUT --seeds 0,1,x", "--seeds: expected different numbers from 0"),
        ("demo --out OUT --resume", "--resume: expected it with --seeds"),
        ("train --out OUT --seed -1", "Invalid value for '--seed'"),
    ],
)
def test_a_wrong_argument_is_refused_before_any_text_is_read(tmp_path, monkeypatch, words, said):
    import moe_jax.cli.published
    import moe_jax.cli.published_experts
    import moe_jax.lab.data

    def read(*arguments, **options):
        pytest.fail("the text was read")

    monkeypatch.setattr(moe_jax.cli.published, "read_text", read)
    monkeypatch.setattr(moe_jax.cli.published_experts, "read_text", read)
    monkeypatch.setattr(moe_jax.lab.data, "load_corpus", read)
    file = _write(tmp_path / "file", b"")
    places = {"MODEL": OLMOE, "OUT": str(tmp_path / "out"), "FILE": str(file)}
    for name, place in places.items():
        words = words.replace(name, place)
    result = runner.invoke(app, words.split())
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def _commands(command, path=()):
    for name, below in getattr(command, "commands", {}).items():
        yield from _commands(below, (*path, name))
    if not hasattr(command, "commands"):
        yield path


@pytest.mark.parametrize("path", list(_commands(get_command(app))), ids=" ".join)
def test_help_of_80_columns_cuts_no_option(path):
    shown = runner.invoke(app, [*path, "--help"], env={"COLUMNS": "80"})
    assert shown.exit_code == 0
    assert "…" not in shown.output


def test_a_log_gets_a_line_for_layers_and_cases(capsys):
    from moe_jax.bench.commands import _progress
    from moe_jax.cli.published_options import layer_bar

    with layer_bar(40, "fit") as progress:
        for done in range(1, 41):
            progress(done, 40, "layers")
    with _progress() as note:
        for label in ("a, compiling", "b, round 1 of 2", "b, round 2 of 2"):
            note(label)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "fit: 4 of 40 layers"
    assert lines[9:] == ["fit: 40 of 40 layers", "a, compiling", "b"]


@pytest.mark.parametrize(
    "words",
    [
        [
            "layer",
            "--tokens",
            "64",
            "--d-model",
            "8",
            "--d-ff",
            "16",
            "--experts",
            "4",
            "--rounds",
            "2",
            "--implementations",
            "capacity,balanced,sliced,separate,dense",
        ],
        [
            "decode",
            "--tokens",
            "1",
            "--experts",
            "4",
            "--d-model",
            "8",
            "--d-ff",
            "16",
            "--rounds",
            "2",
        ],
        [
            "dynamic",
            "--tokens",
            "64",
            "--d-model",
            "8",
            "--d-ff",
            "16",
            "--experts",
            "4",
            "--rounds",
            "2",
        ],
        ["route", "--tokens", "64", "--d-model", "8", "--rounds", "2"],
        [
            "batch",
            "--sizes",
            "1,2",
            "--sequence",
            "8",
            "--d-model",
            "8",
            "--d-ff",
            "16",
            "--rounds",
            "2",
        ],
    ],
    ids=lambda w: w[0],
)
def test_bench_writes_rows_with_their_machine(tmp_path, words):
    file = tmp_path / "rows.json"
    result = runner.invoke(app, ["bench", *words, "--json", str(file)])
    assert result.exit_code == 0, result.output
    written = json.loads(file.read_text())
    assert written["bench"] == words[0]
    assert written["machine"]["cores"] >= 1
    assert all(row["ms"] > 0 for row in written.get("details", written["rows"]))


def test_bench_layer_rows_have_the_promised_columns(tmp_path):
    file, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    words = "bench layer --tokens 64 --d-model 8 --d-ff 16 --experts 4 --rounds 2 --pass fwd"
    result = runner.invoke(app, [*words.split(), "--json", str(file), "--plot", str(picture)])
    assert result.exit_code == 0, result.output
    promised = {"implementation", "default", "tokens", "experts", "k", "dtype", "load", "pass"}
    promised |= {"ratio", "temp_mb", "dropped"}
    written = json.loads(file.read_text())
    rows = written["rows"]
    assert all(promised == row.keys() for row in rows)
    assert all(detail["rounds"] == 2 for detail in written["details"])
    assert len(written["details"]) == len(rows)
    assert any(row["default"] and row["dropped"] == 0 for row in rows)
    assert picture.stat().st_size > 1000


def test_bench_refuses_unknown_words():
    assert runner.invoke(app, ["bench", "layer", "--load", "heavy"]).exit_code == 2
    assert runner.invoke(app, ["bench", "dynamic", "--mean-k", "3"]).exit_code == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("decode --experts -3", "--experts"),
        ("decode --k 100", "at most the 64 experts, got 100"),
        ("decode --d-model 0", "--d-model"),
        ("layer --experts 4 --k 100", "at most the 4 experts, got 100"),
        ("layer --mean-k 5", "at most k=2, got 5"),
        ("dynamic --tokens 0", "--tokens"),
        ("dynamic --tokens 1", "got 1 at a mean of 1.3, which rounds to k"),
        ("layer --peers --load zipf", "expected a uniform load"),
        ("layer --peers --mean-k 1.5", "neither --mean-k nor --max-rows"),
        ("route --experts -3", "--experts"),
        ("batch --k 9", "at most the 8 experts, got 9"),
    ],
)
def test_bench_refuses_sizes_that_make_no_sense(words, said):
    result = runner.invoke(app, ["bench", *words.split()])
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("command", ["", "layer", "decode", "dynamic", "route", "batch", "serve"])
def test_bench_refuses_a_file_that_cannot_be_written_before_it_measures(tmp_path, command):
    (tmp_path / "file").write_text("")
    places = {tmp_path: "got the folder", tmp_path / "file" / "rows.json": "under the file"}
    for place, said in places.items():
        result = runner.invoke(app, ["bench", *command.split(), "--json", str(place)])
        assert result.exit_code == 2, result.output
        assert said in " ".join(result.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("deeper", ["", "new/folders"])
def test_bench_refuses_what_only_the_kernel_refuses_and_leaves_nothing(tmp_path, deeper):
    place = tmp_path / deeper / ("long" * 80 + ".json")
    result = runner.invoke(app, ["bench", "route", "--json", str(place)])
    assert result.exit_code == 2, result.output
    assert "expected a file that can be written" in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_a_file_that_may_be_written_is_as_before_until_it_is(tmp_path):
    from moe_jax.bench.options import writable

    old, new = _write(tmp_path / "old.json", b"old"), tmp_path / "new" / "rows.json"
    assert (writable(old), writable(new)) == (old, new)
    assert old.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [old]


def test_bench_refuses_a_picture_of_another_kind_before_it_measures(tmp_path):
    result = runner.invoke(app, ["bench", "layer", "--plot", str(tmp_path / "rows.bmp")])
    assert result.exit_code == 2
    assert ".png" in result.stderr


def test_what_the_library_refuses_in_a_bench_is_told_without_a_traceback(monkeypatch):
    from moe_jax.bench import routing_cost as route

    def refuse(**settings):
        raise ValueError("x: expected [1], got 2.")

    monkeypatch.setattr(route, "bench_route", refuse)
    result = runner.invoke(app, ["bench", "route"])
    assert result.exit_code == 2
    assert "error: x: expected [1], got 2." in result.stderr


def test_inspect_says_what_differs_by_layer_and_cuts_no_metadata(tmp_path):
    rule, width = MinP(num_experts=4, max_k=2), 8
    params = {f"layer_{i}": rule.init(jax.random.key(i), width) for i in range(2)}
    x = jax.random.normal(jax.random.key(9), (64, width))
    states = {
        name: rule.fit(p, rule.init_state(), x, target_mean_k=1.5) for name, p in params.items()
    }
    history = [{"loss": float(i)} for i in range(100)]
    content = Checkpoint(
        params=params,
        routers=dict.fromkeys(params, rule),
        states=states,
        metadata={"training": {"steps": 100, "history": history}, "variants": ["top_p"]},
    )
    path = save(tmp_path / "two", content)
    done = runner.invoke(app, ["inspect", str(path)])
    assert done.exit_code == 0, done.output
    assert "2 differ" not in done.stdout
    assert "by layer" in done.stdout
    assert "training: history (100 values), steps=100" in done.stdout
    assert "variants: top_p" in done.stdout
