"""Backup and recovery (B01–B03, B07): an export restores bit for bit, damage is refused by name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from moe_jax.checkpoint import Checkpoint, archive, save
from moe_jax.cli import app
from moe_jax.config import Config, RouterConfig, build_router

runner = CliRunner()
D = 16
CONFIG = Config(router_config=RouterConfig(input_dim=D, num_experts=4, max_experts=3))
BASELINE = {
    "bench": "route",
    "machine": {"cpu": "test"},
    "settings": {"tokens": 8},
    "rows": [{"rule": "TopK", "ratio": 1.0, "spread": [0.9, 1.1]}],
}


def calibrated(folder: Path, seed: int) -> Path:
    router = build_router(CONFIG)
    params = router.init(jax.random.key(seed), D)
    x = jax.random.normal(jax.random.key(seed + 1), (256, D), jnp.float32)
    state = router.fit(params, router.init_state(), x, target_mean_k=1.6)
    saved = Checkpoint(
        params={"router": params},
        routers={"router": router},
        states={"router": state},
        config=CONFIG,
        metadata={"note": f"seed {seed}"},
    )
    return save(folder / f"checkpoint-{seed}", saved)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archive")
    baseline = folder / "measured.json"
    baseline.write_text(json.dumps(BASELINE))
    for seed in (0, 7):
        calibrated(folder, seed)
        archive.export(folder / f"export-{seed}", folder / f"checkpoint-{seed}", baseline=baseline)
    rng = np.random.default_rng(3)
    np.save(folder / "x.npy", rng.normal(size=(2, 32, D)).astype(np.float32))
    return folder


def routed(checkpoint: Path, made: Path, out: Path) -> dict[str, np.ndarray]:
    result = runner.invoke(
        app, ["route", str(made / "x.npy"), "--checkpoint", str(checkpoint), "--save", str(out)]
    )
    assert result.exit_code == 0, result.output
    with np.load(out) as arrays:
        return dict(arrays)


def test_a_restored_release_routes_bit_for_bit_the_same_in_a_clean_process(made, tmp_path):
    wanted = routed(made / "checkpoint-0", made, tmp_path / "before.npz")
    archive.restore(made / "export-0", tmp_path / "releases")
    # Another process with an empty environment: nothing but the release can tell it how to route.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in ("PATH", "HOME", "PYTHONPATH", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS")
    }
    subprocess.run(
        [
            sys.executable,
            "-m",
            "moe_jax.cli",
            "route",
            str(made / "x.npy"),
            "--checkpoint",
            str(tmp_path / "releases" / "current" / "checkpoint"),
            "--save",
            str(tmp_path / "after.npz"),
        ],
        env={**environment, "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    with np.load(tmp_path / "after.npz") as stored:
        assert set(stored) == set(wanted)
        for name, array in wanted.items():
            assert stored[name].dtype == array.dtype, name
            assert stored[name].tobytes() == array.tobytes(), name


def test_an_export_holds_configuration_thresholds_provenance_and_baseline(made):
    folder = made / "export-0"
    manifest = archive.verify(folder)
    assert Config.from_json(json.loads((folder / "config.json").read_text())) == CONFIG
    fit = json.loads((folder / "thresholds.json").read_text())["router"]
    assert fit["target_mean_k"] == pytest.approx(1.6)
    assert manifest["provenance"]["fits"]["router"] == fit
    assert manifest["provenance"]["metadata"] == {"note": "seed 0"}
    assert json.loads((folder / "baseline.json").read_text()) == BASELINE
    assert archive.baseline_of(folder) == folder / "baseline.json"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: _flip(next((f / "checkpoint" / "arrays").rglob("d/*"))), "checkpoint/arrays"),
        (lambda f: _flip(f / "config.json"), "config.json: expected"),
        (lambda f: (f / "baseline.json").unlink(), "1 missing (baseline.json)"),
        (lambda f: (f / "surprise").write_text("?"), "1 unknown (surprise)"),
        (lambda f: _edit(f / "export.json"), "damaged or edited"),
        (lambda f: (f / "export.json").unlink(), "expected an export with export.json"),
        (lambda f: _truncate(f / "export.json"), "expected a JSON file"),
        (lambda f: _newer(f / "export.json"), "Upgrade moe_jax"),
    ],
)
def test_a_damaged_export_is_refused_by_name_and_leaves_the_release_as_it_was(
    made, tmp_path, damage, said
):
    releases = tmp_path / "releases"
    before = archive.restore(made / "export-7", releases)
    shutil.copytree(made / "export-0", tmp_path / "damaged")
    damage(tmp_path / "damaged")
    result = runner.invoke(app, ["restore", str(tmp_path / "damaged"), "--into", str(releases)])
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert os.readlink(releases / "current") == before["release"]
    assert sorted(p.name for p in releases.iterdir()) == sorted([before["release"], "current"])


def test_rollback_goes_back_to_the_previous_release_and_forth_again(made, tmp_path):
    releases = tmp_path / "releases"
    first = archive.restore(made / "export-0", releases)
    assert first["previous"] is None
    second = archive.restore(made / "export-7", releases)
    assert (second["current"], second["previous"]) == (second["release"], first["release"])
    assert archive.restore(made / "export-7", releases) == second  # again changes nothing

    result = runner.invoke(app, ["rollback", str(releases), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["checkpoint"] == first["checkpoint"]
    assert (releases / "current" / "checkpoint" / "manifest.json").is_file()
    assert archive.rollback(releases)["release"] == second["release"]


def test_a_rollback_names_what_another_one_would_make_current(made, tmp_path):
    releases = tmp_path / "releases"
    first = archive.restore(made / "export-0", releases)["release"]
    second = archive.restore(made / "export-7", releases)["release"]
    for before in (second, first):
        result = runner.invoke(app, ["rollback", str(releases)])
        assert f"Another rollback would make {before} current again" in result.output


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: _flip(next((f / "checkpoint" / "arrays").rglob("d/*"))),
        lambda f: (f / "baseline.json").unlink(),
        lambda f: _truncate(f / "export.json"),
    ],
)
def test_restore_replaces_a_damaged_release_by_the_sound_export(made, tmp_path, damage):
    releases = tmp_path / "releases"
    first = archive.restore(made / "export-0", releases)
    archive.restore(made / "export-7", releases)
    folder = releases / first["release"]
    damage(folder)
    result = runner.invoke(app, ["restore", str(made / "export-0"), "--into", str(releases)])
    assert result.exit_code == 0, result.output
    assert "damaged: it was replaced" in " ".join(result.output.split())
    assert archive.verify(folder)["checksum"].startswith(first["release"])
    assert os.readlink(releases / "current") == first["release"]
    assert sorted(releases.glob(".*")) == [], "nothing is left of the damaged one"
    assert not archive.restore(made / "export-0", releases)["repaired"]


def test_a_damaged_release_stays_where_the_export_is_damaged_too(made, tmp_path):
    releases = tmp_path / "releases"
    folder = Path(archive.restore(made / "export-0", releases)["folder"])
    shutil.copytree(made / "export-0", tmp_path / "damaged")
    for one in (folder, tmp_path / "damaged"):
        _flip(one / "config.json")
    before = (folder / "config.json").read_bytes()
    with pytest.raises(archive.ArchiveError, match=r"damaged/config\.json: expected"):
        archive.restore(tmp_path / "damaged", releases)
    assert (folder / "config.json").read_bytes() == before


def test_the_folder_of_releases_is_found_from_a_checkpoint_in_it(made, tmp_path):
    releases = tmp_path / "releases"
    release = archive.restore(made / "export-0", releases)["release"]
    for name in ("current", release):
        assert archive.releases_of(releases / name / "checkpoint") == releases.resolve()
    assert archive.releases_of(made / "export-0" / "checkpoint") is None, "an export is no release"
    assert archive.releases_of(made / "checkpoint-0") is None


def test_rollback_to_nothing_or_to_a_damaged_release_is_refused(made, tmp_path):
    releases = tmp_path / "releases"
    with pytest.raises(archive.ArchiveError, match=r"got nothing there\. Check the path"):
        archive.rollback(releases)
    with pytest.raises(archive.ArchiveError, match=r"got one without current"):
        archive.rollback(tmp_path)
    first = archive.restore(made / "export-0", releases)
    with pytest.raises(archive.ArchiveError, match="nothing to go back to"):
        archive.rollback(releases)
    second = archive.restore(made / "export-7", releases)
    _flip(releases / first["release"] / "config.json")
    with pytest.raises(archive.ArchiveError, match="damaged or changed") as caught:
        archive.rollback(releases)
    assert f"Restoring the export of {first['release']} replaces" in str(caught.value)
    assert os.readlink(releases / "current") == second["release"]


def test_an_export_is_never_replaced_and_takes_the_sizes_of_its_router(made, tmp_path):
    with pytest.raises(archive.ArchiveError, match="never replaced"):
        archive.export(made / "export-0", made / "checkpoint-0")
    router = build_router(CONFIG)
    bare = save(
        tmp_path / "bare",
        Checkpoint(
            params={"router": router.init(jax.random.key(0), D)},
            routers={"router": router},
            states={"router": router.init_state()},
        ),
    )
    archive.export(tmp_path / "out", bare)
    sizes = json.loads((tmp_path / "out" / "config.json").read_text())["router_config"]
    assert (sizes["input_dim"], sizes["num_experts"]) == (D, router.num_experts)
    empty = save(tmp_path / "empty", Checkpoint(params={"w": jnp.ones(3)}))
    with pytest.raises(archive.ArchiveError, match="Pass the configuration"):
        archive.export(tmp_path / "other", empty)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_json()))
    words = ["--out", str(tmp_path / "with"), "--config", str(tmp_path / "config.json"), "--json"]
    result = runner.invoke(app, ["export", str(bare), *words])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["provenance"]["config"] == CONFIG.config_hash
    assert list(tmp_path.glob(".out.saving-*")) == []


def test_a_configuration_that_the_checkpoint_contradicts_is_kept_and_told(made, tmp_path):
    settings = {"router_config": {"input_dim": D, "num_experts": 8, "max_experts": 2}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    words = ["export", str(made / "checkpoint-0"), "--config", str(tmp_path / "config.json")]
    result = runner.invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    for name, value in (("num_experts", 4), ("max_experts", 3)):
        assert f"router_config.{name}; the checkpoint has {value}" in said
    assert "input_dim" not in said
    manifest = archive.verify(tmp_path / "out")
    assert manifest["provenance"]["superseded"] == {"num_experts": 4, "max_experts": 3}
    kept = json.loads((tmp_path / "out" / "config.json").read_text())["router_config"]
    assert (kept["num_experts"], kept["max_experts"]) == (8, 2)
    assert archive.verify(made / "export-0")["provenance"]["superseded"] == {}


def test_settings_that_a_file_leaves_out_are_not_called_contradicted(made, tmp_path):
    (tmp_path / "config.json").write_text('{"router_config": {"min_experts": 2}}')
    words = ["export", str(made / "checkpoint-0"), "--config", str(tmp_path / "config.json")]
    result = runner.invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    said = " ".join(result.stderr.split())
    assert said.count("not in force") == 1
    assert "router_config.min_experts; the checkpoint has 1" in said


def test_a_configuration_that_names_another_router_is_refused(made, tmp_path):
    settings = {"serving": {"checkpoint_router": "layer_7"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    words = ["export", str(made / "checkpoint-0"), "--config", str(tmp_path / "config.json")]
    result = runner.invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "expected one of router, got 'layer_7'" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()


def test_what_is_no_baseline_is_not_exported(made, tmp_path):
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(archive.ArchiveError, match="expected a baseline"):
        archive.export(tmp_path / "out", made / "checkpoint-0", baseline=tmp_path / "no.json")
    assert not (tmp_path / "out").exists()


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def _edit(file: Path) -> None:
    file.write_text(file.read_text().replace("seed 0", "seed 1"))


def _newer(file: Path) -> None:
    file.write_text(file.read_text().replace('"format": 1', '"format": 2'))
