"""A checkpoint says where the parameters of its routers are, and which experts they feed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint import (
    Checkpoint,
    CheckpointError,
    LayerSpec,
    load_metadata,
    open_checkpoint,
    save,
    sealed,
)
from moe_jax.checkpoint.layers import locate_layers
from moe_jax.experts import FeedForward
from moe_jax.layer import init_moe_layer, moe_layer
from moe_jax.routers import TopK

D = 8
ROUTER = TopK(num_experts=4, k=2)
GATED = FeedForward(activation="silu", gated=True)
X = jnp.asarray(np.random.default_rng(0).normal(size=(5, D)), jnp.float32)


def layer_params(seed: int, experts: FeedForward = GATED, shared: int = 0):
    key = jax.random.key(seed)
    return init_moe_layer(ROUTER, experts, key, d_model=D, d_ff=16, shared_d_ff=shared)


def described(params, layers, names=("block",)) -> Checkpoint:
    return Checkpoint(
        params=params,
        routers=dict.fromkeys(names, ROUTER),
        states={name: ROUTER.init_state() for name in names},
        layers=layers,
    )


def output(layer):
    return moe_layer(layer.router, layer.experts, layer.layer, layer.state, X)[0]


def test_layers_that_no_name_would_find_run_from_their_specs(tmp_path):
    """Two stacked layers and one by itself with a shared expert, under names of the user's own."""
    pair = [layer_params(0), layer_params(1)]
    last = layer_params(2, shared=16)
    params = {"tower": {"ffn": jax.tree.map(lambda *x: jnp.stack(x), *pair)}, "top": last}
    where = ("tower", "ffn")
    layers = {
        f"block-{i}": LayerSpec(router=(*where, "router"), layer=where, experts=GATED, index=i)
        for i in (0, 1)
    }
    layers["block-2"] = LayerSpec(router=("top", "router"), layer=("top",), experts=GATED)
    path = save(tmp_path / "c", described(params, layers, tuple(layers)))
    opened = open_checkpoint(path)
    assert opened.content.layers == layers
    assert load_metadata(path)["layers"] == {n: spec.to_json() for n, spec in layers.items()}
    for name, wanted in zip(layers, [*pair, last], strict=True):
        layer = opened.layer(name)
        np.testing.assert_array_equal(
            output(layer), moe_layer(ROUTER, GATED, wanted, ROUTER.init_state(), X)[0]
        )
        assert (layer.width, layer.experts) == (D, GATED)
    assert opened.layer().name == "block-0"


def test_one_read_and_one_verification_answer_every_question(tmp_path, monkeypatch):
    path = save(tmp_path / "c", described({"block": layer_params(0)}, {}))
    digested = []
    digests = sealed.file_digests

    def counted(files, folder, **options):
        digested.append(folder)
        return digests(files, folder, **options)

    monkeypatch.setattr(sealed, "file_digests", counted)
    opened = open_checkpoint(path)
    for _ in range(2):
        assert opened.layer("block").params["kernel"].shape == (D, 4)
    assert opened.about["checksum"] == load_metadata(path)["checksum"]
    assert digested == [path]


def test_a_router_without_a_spec_is_found_by_its_name_or_refused(tmp_path):
    layer = layer_params(0)
    for params, keys in (
        ({"block": layer["router"]}, ("block",)),
        ({"block": layer}, ("block", "router")),
        ({"model": {"block": {"moe": layer}}}, ("model", "block", "moe", "router")),
    ):
        assert locate_layers({"block": ROUTER}, params, {}) == {"block": LayerSpec(router=keys)}
    settings = {"experts": {"activation": "silu", "gated": True}}
    spec = LayerSpec(router=("block", "router"), layer=("block",), experts=GATED)
    assert locate_layers({"block": ROUTER}, {"block": layer}, settings) == {"block": spec}
    # Metadata are free: there "experts" may mean anything, and a restore must not fail on it.
    for other in (["a"], {"count": 4}, {"activation": "nonsense"}):
        actual = locate_layers({"block": ROUTER}, {"block": layer}, {"experts": other})
        assert actual["block"].experts is None
    path = save(tmp_path / "c", described({"other": layer}, {}))
    with pytest.raises(ValueError, match=r"expected parameters of router 'block'.*LayerSpec"):
        open_checkpoint(path).layer()
    with pytest.raises(ValueError, match="expected one of block, got 'x'"):
        open_checkpoint(path).layer("x")


PARAMS = {"block": layer_params(0)}
GOOD = {"router": ("block", "router"), "layer": ("block",), "experts": GATED}


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("other", {}, "expected names of routers (block), got 'other'"),
        ("block", {"router": ("block", "route")}, "got nothing at 'route'"),
        ("block", {"router": ("block", "experts")}, "expected a router's parameters"),
        ("block", {"router": ("block", "router", "kernel")}, "expected a mapping at"),
        ("block", {"layer": ("block", "router")}, "expected the parameters of moe_layer"),
        ("block", {"experts": None}, "expected both of layer and experts or neither"),
        ("block", {"layer": None}, "expected both of layer and experts or neither"),
        ("block", {"index": 0}, "Leave index out where layers are not stacked"),
    ],
)
def test_a_spec_that_points_at_nothing_is_refused_when_it_is_saved(tmp_path, name, changed, said):
    with pytest.raises(CheckpointError) as caught:
        save(tmp_path / "c", described(PARAMS, {name: LayerSpec(**{**GOOD, **changed})}))
    assert said in str(caught.value)
    assert not (tmp_path / "c").exists()
