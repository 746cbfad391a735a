"""No routing key of a config is ignored: it is honoured, says what is done anyway, or is refused."""

from __future__ import annotations

import numpy as np
import pytest

from moe_jax.interop import moe_block_from_hf, router_from_hf, supported_model_types
from moe_jax.interop.families import BY_TYPE, build_router, read

# Key -> values that mean different mathematics.
VALUES: dict[str, tuple] = {
    **dict.fromkeys(
        ("scoring_func", "score_function", "score_func", "moe_router_activation_func"),
        ("softmax", "sigmoid", "sqrtsoftplus", "tanh"),
    ),
    **dict.fromkeys(("norm_topk_prob", "moe_renormalize", "route_norm"), (True, False)),
    **dict.fromkeys(("routed_scaling_factor", "route_scale", "router_scaling_factor"), (1.0, 3.25)),
    "n_group": (1, 2, 4),
    "num_expert_group": (1, 2, 4),
    "topk_group": (1, 2),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "use_routing_bias": (True, False),
    "router_bias": (True, False),
    "moe_router_logit_softcapping": (0.0, 5.0),
    "moe_apply_router_weight_on_input": (True, False),
    "num_experts_per_tok": (1, 2),
    "moe_drop_tokens": (True, False),
    "moe_router_with_a_new_name": (0, "new"),
}
# What a family says twice: the other value is the same mathematics.
SAME = {
    ("doge", "norm_topk_prob"),  # a softmax over the chosen sums to 1
    ("cohere2_moe", "norm_topk_prob"),
    ("cohere2_moe", "moe_renormalize"),
    ("cohere2_moe", "route_norm"),
    ("longcat_flash", "router_bias"),  # transformers allocates it and never adds it
    ("lfm2_moe", "use_routing_bias"),  # says whether the tensor is there
}
SIZES = {"num_experts": 8, "num_experts_per_tok": 2}


def outcome(config):
    """What the config comes to, or None where it is refused."""
    try:
        family, c = read(config)
        return build_router(family, c), family.output_scale(c)
    except ValueError:
        return None


def base(model_type):
    family = BY_TYPE[model_type]
    keys = {"num_experts": "num_experts", "k": "num_experts_per_tok"}
    sizes = {key: SIZES[key] for name, key in keys.items() if name not in family.defaults}
    if model_type in ("switch_transformers", "nllb_moe"):
        sizes.pop("num_experts_per_tok", None)  # k is in the name of the rule
    return {"model_type": model_type, **sizes}


@pytest.mark.parametrize("model_type", supported_model_types())
def test_different_values_never_give_the_same_rule(model_type):
    plain = base(model_type)
    assert outcome(plain) is not None
    for key, values in VALUES.items():
        if (model_type, key) in SAME:
            continue
        accepted = [o for v in values if (o := outcome({**plain, key: v})) is not None]
        assert all(a != b for i, a in enumerate(accepted) for b in accepted[:i]), key


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {
                "model_type": "deepseek_v3",
                "scoring_func": "softmax",
                "n_group": 1,
                "topk_group": 1,
                "n_routed_experts": 8,
                "num_experts_per_tok": 2,
                "norm_topk_prob": True,
            },
            r"scoring_func: expected the text 'sigmoid'.*got the text 'softmax'",
        ),
        (
            {"model_type": "deepseek_v3", "topk_method": "greedy"},
            "topk_method: expected the text 'noaux",
        ),
        (
            {"model_type": "deepseek_v2", "num_experts_per_tok": 2, "norm_topk_prob": True},
            "norm_topk_prob: expected false.*got true",
        ),
        ({"model_type": "mixtral", "norm_topk_prob": False}, "norm_topk_prob: expected true"),
        ({"model_type": "mixtral", "n_group": 4}, "n_group: expected 1"),
        (
            {"model_type": "qwen3_moe", "routed_scaling_factor": 2.5},
            "routed_scaling_factor: expected 1.0",
        ),
        (
            {"model_type": "minimax_m2", "use_routing_bias": False},
            "use_routing_bias: expected true",
        ),
        (
            {"model_type": "olmoe", "moe_router_sharpness": 3},
            "moe_router_sharpness: expected no such",
        ),
        (
            {"model_type": "switch_transformers", "num_experts_per_tok": 2},
            "num_experts_per_tok: expected 1",
        ),
        # A kind of value that the key does not have.
        (
            {"model_type": "qwen3_moe", "norm_topk_prob": "false"},
            "norm_topk_prob: expected true or false, got the text 'false'",
        ),
        (
            {"model_type": "qwen3_moe", "norm_topk_prob": 1},
            "norm_topk_prob: expected true or false, got 1",
        ),
        ({"model_type": "deepseek_v3", "norm_topk_prob": None}, "norm_topk_prob: .*got null"),
        (
            {"model_type": "mixtral", "norm_topk_prob": "true"},
            "norm_topk_prob: expected true, .*'true'",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": "8"},
            "num_local_experts: .*got the text '8'",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 8.0},
            "num_local_experts: expected a whole number",
        ),
        ({"model_type": "mixtral", "num_local_experts": True}, "num_local_experts: .*got true"),
        (
            {"model_type": "mixtral", "num_experts_per_tok": 0},
            "num_experts_per_tok: .*at least 1, got 0",
        ),
        (
            {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 9},
            "got num_local_experts=4, num_experts_per_tok=9 .*1 <= k <= num_experts=4, got 9",
        ),
        (
            {"model_type": "deepseek_v3", "n_routed_experts": 8, "n_group": 3, "topk_group": 1},
            "got n_routed_experts=8, n_group=3, topk_group=1",
        ),
        ({"model_type": "mixtral", "num_experts_per_tok": -2}, "num_experts_per_tok: .*at least 1"),
        ({"model_type": "deepseek_v3", "n_group": 2.5}, "n_group: expected a whole number"),
        (
            {"model_type": "deepseek_v3", "routed_scaling_factor": "2.5"},
            "routed_scaling_factor: expected a f",
        ),
        (
            {"model_type": "deepseek_v3", "routed_scaling_factor": float("nan")},
            "expected a finite number",
        ),
        (
            {"model_type": "switch_transformers", "router_bias": "no"},
            "router_bias: expected true or false",
        ),
        ({"model_type": "deepseek_v4", "scoring_func": 3}, "scoring_func: expected a name, got 3"),
        (
            {"model_type": "mixtral", "router_jitter_noise": "0.1"},
            "router_jitter_noise: expected a number",
        ),
    ],
)
def test_refused_by_the_name_of_the_key(config, message):
    with pytest.raises(ValueError, match=message):
        router_from_hf(config)


@pytest.mark.parametrize(
    ("config", "score", "norm"),
    [
        # As the files on the Hub have them, with keys that transformers does not read.
        (
            {
                "model_type": "deepseek_v3",
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
                "norm_topk_prob": True,
                "moe_layer_freq": 1,
                "ep_size": 1,
                "aux_loss_alpha": 0.001,
                "seq_aux": True,
                "routed_scaling_factor": 2.5,
                "n_group": 8,
                "topk_group": 4,
            },
            "sigmoid",
            "sum_eps",
        ),
        (
            {
                "model_type": "kimi_linear",
                "moe_router_activation_func": "sigmoid",
                "moe_renormalize": True,
                "use_grouped_topk": True,
                "num_expert_group": 1,
                "topk_group": 1,
                "num_experts_per_token": 8,
                "moe_layer_freq": 1,
            },
            "sigmoid",
            "sum_eps",
        ),
        (
            {
                "model_type": "minimax_m2",
                "scoring_func": "sigmoid",
                "use_routing_bias": True,
                "router_jitter_noise": 0.0,
                "router_aux_loss_coef": 0.001,
                "shared_intermediate_size": 0,
            },
            "sigmoid",
            "sum",
        ),
        (
            {
                "model_type": "mimo_v2_flash",
                "scoring_func": "sigmoid",
                "topk_method": "noaux_tc",
                "n_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": None,
                "norm_topk_prob": True,
                "n_shared_experts": None,
                "moe_layer_freq": [0, 1, 1],
            },
            "sigmoid",
            "sum_eps",
        ),
        (
            {
                "model_type": "hunyuan_v1_moe",
                "num_experts": 8,
                "moe_topk": [2, 2],
                "moe_drop_tokens": False,
                "moe_random_routing_dropped_token": False,
                "norm_topk_prob": True,
                "group_limited_greedy": False,
                "n_group": None,
                "routed_scaling_factor": 1.0,
                "num_shared_expert": [1, 1],
            },
            "softmax",
            "sum",
        ),
        (
            {
                "model_type": "step3p5",
                "moe_router_activation": "sigmoid",
                "norm_expert_weight": True,
                "use_moe_router_bias": True,
                "moe_router_scaling_factor": 3.0,
                "need_fp32_gate": True,
            },
            "sigmoid",
            "sum",
        ),
        (
            {
                "model_type": "ernie4_5_moe",
                "moe_use_aux_free": True,
                "moe_gate": "topk",
                "moe_capacity": [64, 64, 64],
                "moe_use_hard_gate": False,
            },
            "softmax",
            "clamp",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_published_configs_load(config, score, norm):
    scoring = router_from_hf(config).scoring  # type: ignore[attr-defined]
    assert (scoring.score, scoring.norm) == (score, norm)


def test_keys_of_the_experts_are_accounted_for_too():
    rng = np.random.default_rng(0)
    tensors = {
        "gate.weight": rng.normal(size=(4, 8)).astype(np.float32),
        "experts.gate_up_proj": rng.normal(size=(4, 12, 8)).astype(np.float32),
        "experts.down_proj": rng.normal(size=(4, 8, 6)).astype(np.float32),
    }
    config = {"model_type": "mixtral", "num_local_experts": 4}
    assert moe_block_from_hf({**config, "hidden_act": "gelu"}, tensors)
    for key, value in {"swiglu_limit": 7.0, "moe_token_dropout": 0.2}.items():
        with pytest.raises(ValueError, match=f"{key}: expected no such setting"):
            moe_block_from_hf({**config, key: value}, tensors)
    lfm2 = {
        "model_type": "lfm2_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "hidden_act": "gelu",
    }
    with pytest.raises(ValueError, match="hidden_act: expected the text 'silu'"):
        moe_block_from_hf(lfm2, tensors)


def test_lfm2_says_whether_it_has_a_selection_bias():
    tensors = {
        "gate.weight": np.zeros((4, 8), np.float32),
        "experts.gate_up_proj": np.zeros((4, 12, 8), np.float32),
        "experts.down_proj": np.zeros((4, 8, 6), np.float32),
    }
    config = {"model_type": "lfm2_moe", "num_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(ValueError, match="expected expert_bias"):
        moe_block_from_hf({**config, "use_expert_bias": True}, tensors)
    assert moe_block_from_hf({**config, "use_expert_bias": False}, tensors)
    with_bias = {**tensors, "expert_bias": np.zeros(4, np.float32)}
    with pytest.raises(ValueError, match="no further tensors, got 'expert_bias'"):
        moe_block_from_hf({**config, "use_expert_bias": False}, with_bias)
