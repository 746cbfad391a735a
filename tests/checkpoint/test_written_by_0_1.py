"""What version 0.1 wrote before its modules moved still opens, and computes the same.

See ``tests/goldens/README.md``. Those checkpoints hold no layer specs, so these tests also hold
``locate_layers`` to the layouts of before.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint import archive, load_metadata, open_checkpoint
from moe_jax.config import Config, load_config
from moe_jax.experts import FeedForward
from moe_jax.lab import language_model
from moe_jax.lab.hidden_states import route_report
from moe_jax.lab.model_files import load_variants
from moe_jax.layer import moe_layer

FILES = Path(__file__).parents[1] / "goldens" / "written_by_0_1"
EXPECTED = dict(np.load(FILES / "expected.npz"))
# The same programs, perhaps by another compiler on another machine.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written_by_0_1")
    with zipfile.ZipFile(FILES / "folders.zip") as file:
        file.extractall(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "path", "routers"),
    [
        (
            "language_model",
            "language_model",
            [f"{v}layer_{i}" for v in ("dynamic_k_entropy/", "", "trained/") for i in (0, 1)],
        ),
        ("export", "export/checkpoint", ["router"]),
        ("single_model", "single_model", ["block"]),
    ],
)
def test_every_router_routes_as_it_did(folders, kind, path, routers):
    opened = open_checkpoint(folders / path)
    assert sorted(opened.content.routers) == routers
    assert "layers" not in json.loads((folders / path / "manifest.json").read_text())
    for name in routers:
        for word, value in route_report(opened.layer(name), EXPECTED["x"])[1].items():
            wanted = EXPECTED[f"{kind} {word} {name}"]
            if value.dtype.kind == "i":
                np.testing.assert_array_equal(value, wanted, err_msg=f"{name} {word}")
            else:
                np.testing.assert_allclose(value, wanted, **CLOSE, err_msg=f"{name} {word}")


def test_the_experts_of_the_language_model_are_known_without_the_language_model(folders):
    """As the service opens it: the squared ReLU and the stacked index come from the layout alone."""
    opened = open_checkpoint(folders / "language_model")
    for name in opened.content.routers:
        layer = opened.layer(name)
        assert layer.experts == FeedForward(activation="relu2")
        assert layer.width == 16
        y, _ = moe_layer(
            layer.router, layer.experts, layer.layer, layer.state, jnp.asarray(EXPECTED["x"])
        )
        np.testing.assert_allclose(y, EXPECTED[f"language_model y {name}"], **CLOSE)


def test_the_language_model_and_its_variants_give_the_same_logits(folders):
    variants = load_variants(folders / "language_model")
    assert list(variants) == ["", "dynamic_k_entropy", "trained"]
    for name, model in variants.items():
        out = language_model.forward(
            model.config,
            model.params,
            model.states,
            jnp.asarray(EXPECTED["tokens"]),
            routers=model.routers,
        )
        np.testing.assert_allclose(
            out.logits, EXPECTED[f"language_model logits {name}"], rtol=1e-3, atol=1e-4
        )


def test_the_export_is_whole_and_restores(folders, tmp_path):
    manifest = archive.verify(folders / "export")
    assert manifest["provenance"]["metadata"] == {"note": "written by 0.1"}
    release = archive.restore(folders / "export", tmp_path / "releases")
    assert release["checkpoint"] == manifest["provenance"]["checkpoint"]
    restored = tmp_path / "releases" / "current" / "checkpoint"
    assert load_metadata(restored)["checksum"] == release["checkpoint"]
    config = load_config(tmp_path / "releases" / "current" / "config.json", env={})
    assert config == load_config(FILES / "config.json", env={})


def test_the_configuration_means_what_it_did():
    data = json.loads((FILES / "config.json").read_text())
    config = load_config(FILES / "config.json", env={})
    assert Config.from_json(data) == config
    written = {(s, k): v for s, x in data.items() if isinstance(x, dict) for k, v in x.items()}
    now = config.to_json()
    assert {(s, k): now[s][k] for s, k in written} == written
    assert (config.serving.port, config.environment) == (8123, "staging")
