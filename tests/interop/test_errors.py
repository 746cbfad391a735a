"""What does not fit is refused by name, with what was expected and what to do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.interop import moe_block_from_hf, router_from_hf, supported_model_types
from moe_jax.interop.families import FAMILIES, REFUSED
from moe_jax.routers.registry import rule_class

E, D, F = 4, 8, 6
CONFIG = {"model_type": "mixtral", "num_local_experts": E, "hidden_size": D}


def tensors(**changes):
    """A Mixtral block; a change to None removes, names have "__" for "."."""
    rng = np.random.default_rng(0)
    out = {
        "gate.weight": rng.normal(size=(E, D)),
        "experts.gate_up_proj": rng.normal(size=(E, 2 * F, D)),
        "experts.down_proj": rng.normal(size=(E, D, F)),
    }
    out.update({n.replace("__", "."): t for n, t in changes.items()})
    return {n: np.asarray(t, np.float32) for n, t in out.items() if t is not None}


# --- configs --------------------------------------------------------------------------------


def test_many_model_types_are_covered():
    types = supported_model_types()
    assert len(types) >= 90
    assert len(types) == sum(len(f.types) for f in FAMILIES), "a type is in two rows"
    assert not set(types) & set(REFUSED)


OWN_K = ("switch_transformers", "nllb_moe")  # k is in the name of the rule


def defaults(model_type):
    return next(f.defaults for f in FAMILIES if model_type in f.types)


@pytest.mark.parametrize("model_type", supported_model_types())
def test_defaults_give_a_router_or_name_the_missing_key(model_type):
    config = {"model_type": model_type}
    if not {"num_experts", "k"} <= set(defaults(model_type)) and model_type not in OWN_K:
        with pytest.raises(ValueError, match=r"expected a value for (num_experts|k) under"):
            router_from_hf(config)
        config |= {"num_experts": 8, "num_experts_per_tok": 2}
    router = router_from_hf(config)
    assert router.num_experts >= router.max_k >= 1
    assert hash(router) == hash(router_from_hf(config))
    assert rule_class(type(router).__name__) is type(router)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mixtrall"}, r"got 'mixtrall'\. The nearest known are mixtral"),
        ({"model_type": "llama"}, r"got 'llama'\. The nearest known are llama4"),
        (
            {"model_type": "vitpose_backbone"},
            r"data set, not by token.*nearest that it has is deeps",
        ),
        ({"model_type": "dots3_note_vision_encoder"}, r"image patches.*dots3_note_text"),
        ({"model_type": "inkling", "shared_expert_sink": False}, "shared_expert_sink to be True"),
        (
            {"model_type": "doge", "num_experts": 15, "num_experts_per_tok": 2},
            r"num_experts: expected a square, got 15.*is 9",
        ),
        ({"num_experts": 8}, "expected a 'model_type' key"),
        ({"model_type": "dots1", "num_experts_per_tok": 2}, "expected a value for num_experts"),
        (
            {"model_type": "mixtral", "num_local_experts": 8, "num_experts": 16},
            "one value for num_experts, got num_experts=16, num_local_experts=8",
        ),
        ({"model_type": "deepseek_v2", "topk_method": "x"}, "topk_method to be 'greedy'"),
        ({"model_type": "cohere2_moe", "expert_selection_fn": "x"}, "expert_selection_fn"),
        ({"model_type": "deepseek_v4", "scoring_func": "tanh"}, "scoring_func"),
        ({"model_type": "nllb-moe", "second_expert_policy": "random"}, "second_expert_policy"),
        ({"model_type": "hunyuan_v1_moe", "moe_topk": [1, 2]}, "one value for moe_topk"),
    ],
)
def test_config_refused(config, message):
    with pytest.raises(ValueError, match=message):
        router_from_hf(config)


def test_a_config_object_is_refused():
    with pytest.raises(TypeError, match=r"config\.to_dict"):
        router_from_hf(object())  # type: ignore[arg-type]


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"activation among .*silu.*got 'snake'"):
        moe_block_from_hf({**CONFIG, "hidden_act": "snake"}, tensors())


def test_composite_configs_are_read_from_their_text_part():
    text = {"model_type": "qwen3_vl_moe_text", "num_experts": 8, "num_experts_per_tok": 3}
    assert router_from_hf({"model_type": "qwen3_vl_moe", "text_config": text}).max_k == 3
    omni = {
        "model_type": "qwen3_omni_moe",
        "thinker_config": {
            "text_config": {
                "model_type": "qwen3_omni_moe_text",
                "num_experts": 8,
                "num_experts_per_tok": 5,
            }
        },
    }
    assert router_from_hf(omni).max_k == 5


# --- tensors --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate__weight": None}, r"expected router\.kernel \[E=4, D=8\], called gate\.weight"),
        ({"experts__down_proj": None}, r"expected experts\.down \[E=4, D=8, F\], called"),
        ({"experts__gate_up_proj": None}, r"expected experts\.gate_up"),
        (
            {"gate__weight": np.zeros((5, D))},
            r"'gate\.weight' of shape \[E=4, D=8\], got float32\[5, 8\]",
        ),
        ({"gate__weight": np.zeros((E, 9))}, r"\[E=4, D=8\], got float32\[4, 9\]"),
        ({"experts__down_proj": np.zeros((E, 7, F))}, r"\[E=4, D=8, F\], got float32\[4, 7, 6\]"),
        ({"experts__gate_up_proj": np.zeros((E, 11, D))}, r"2F=12, D=8\], got float32\[4, 11, 8\]"),
        ({"experts__gate_up_proj": np.zeros((2, 2 * F, D))}, "for E=4 experts, got 2"),
        ({"q_proj__weight": np.zeros(3)}, r"got also 'q_proj\.weight'"),
        ({"gate__e_score_correction_bias": np.zeros(E)}, "no further tensors, got 'gate.e_score"),
        ({"shared_experts__up_proj__weight": np.zeros((F, D))}, "no further tensors, got 'shared"),
        (
            {"router__weight": np.zeros((E, D))},
            r"one tensor for router\.kernel, got 'gate\.weight'",
        ),
        (
            {"experts__0__w1__weight_scale_inv": np.zeros(1)},
            r"experts\.0\.w1\.weight_scale_inv': expected a weight",
        ),
    ],
)
def test_tensors_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        moe_block_from_hf(CONFIG, tensors(**changes))


def test_one_missing_expert_is_named():
    names = {
        f"experts.{e}.{w}.weight": np.zeros(s, np.float32)
        for e in range(E)
        for w, s in (("w1", (F, D)), ("w2", (D, F)), ("w3", (F, D)))
    }
    whole = {**names, "gate.weight": np.zeros((E, D), np.float32)}
    assert moe_block_from_hf(CONFIG, whole).params["experts"]["up"].shape == (E, D, F)
    del whole["experts.2.w3.weight"]
    with pytest.raises(ValueError, match=r"experts\.2\.up \[F=6, D=8\]"):
        moe_block_from_hf(CONFIG, whole)
    whole["experts.2.w3.weight"] = np.zeros((F + 1, D), np.float32)
    with pytest.raises(ValueError, match=r"'experts\.2\.w3\.weight' of shape \[F=6, D=8\]"):
        moe_block_from_hf(CONFIG, whole)


def test_prefix():
    inside = {f"model.layers.3.mlp.{n}": t for n, t in tensors().items()}
    inside["model.layers.4.mlp.junk"] = np.zeros(1)
    block = moe_block_from_hf(CONFIG, inside, prefix="model.layers.3.mlp.")
    want = moe_block_from_hf(CONFIG, tensors())
    jax.tree.map(np.testing.assert_array_equal, block, want)
    with pytest.raises(ValueError, match=r"under the prefix 'model\.layers\.9\.', got none"):
        moe_block_from_hf(CONFIG, inside, prefix="model.layers.9.")


@pytest.mark.parametrize("f", [F, D // 2, D])  # D // 2 and D make one of the two tensors square
def test_either_layout(f):
    rng = np.random.default_rng(1)
    up = rng.normal(size=(E, 2 * f, D)).astype(np.float32)
    down = rng.normal(size=(E, D, f)).astype(np.float32)
    plain = tensors(experts__gate_up_proj=up, experts__down_proj=down)
    turned = tensors(
        experts__gate_up_proj=up.swapaxes(1, 2), experts__down_proj=down.swapaxes(1, 2)
    )
    a, b = moe_block_from_hf(CONFIG, plain), moe_block_from_hf(CONFIG, turned)
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


def test_the_number_of_experts_may_come_from_the_tensors():
    block = moe_block_from_hf({"model_type": "olmoe", "num_experts_per_tok": 2}, tensors())
    assert block.router.num_experts == E


# --- calling --------------------------------------------------------------------------------


def test_padding_and_leading_axes():
    block = moe_block_from_hf(CONFIG, tensors())
    x = jax.random.normal(jax.random.key(0), (2, 3, D))
    mask = jnp.array([[True, True, False], [True, False, False]])
    call = jax.jit(lambda x, mask: block(x, token_mask=mask, implementation="dense"))
    y, whole = call(x, mask), call(x, jnp.ones(mask.shape, bool))
    np.testing.assert_allclose(y, jnp.where(mask[..., None], whole, 0.0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(call(x[0], mask[0]), y[0], rtol=1e-5, atol=1e-6)
    poisoned = call(jnp.where(mask[..., None], x, jnp.nan), mask)
    assert np.isfinite(poisoned).all()
    with pytest.raises(ValueError, match=r"token_mask: expected bool\[2, 3\]"):
        block(x, token_mask=mask[0])


def test_the_routing_and_its_statistics_beside_the_output():
    block = moe_block_from_hf(CONFIG, tensors())
    x = jax.random.normal(jax.random.key(0), (2, 3, D))
    y, aux = block(x, return_aux=True, implementation="dense")
    np.testing.assert_array_equal(y, block(x, implementation="dense"))
    np.testing.assert_array_equal(aux.routing.expert_indices, block.route(x).expert_indices)
    assert float(aux.stats.token_count) == 6
    assert float(aux.stats.mean_experts_per_token) == block.router.max_k


def test_wrong_width():
    with pytest.raises(ValueError, match="x: expected"):
        moe_block_from_hf(CONFIG, tensors())(jnp.ones((2, D + 1)))


def test_a_block_is_a_pytree_and_an_equal_one_does_not_retrace():
    traces = []

    @jax.jit
    def call(block, x):
        traces.append(1)
        return block(x, implementation="dense")

    x = jnp.ones((2, D))
    call(moe_block_from_hf(CONFIG, tensors()), x)
    call(moe_block_from_hf(CONFIG, tensors()), x)
    assert len(traces) == 1
