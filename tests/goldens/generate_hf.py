"""Writes golden files: the MoE blocks of Hugging Face transformers on tiny random weights.

Not a dependency of the library or of its tests: run it where transformers and torch are installed.

    python -m venv /tmp/hf && /tmp/hf/bin/pip install torch transformers numpy     # CPU is enough
    /tmp/hf/bin/python tests/goldens/generate_hf.py mixtral deepseek_v3
    /tmp/hf/bin/python tests/goldens/generate_hf.py --list

Files go to ``hf_generated/`` (``phimoe_sampler`` beside it); those there were made with transformers
5.23.0 and torch 2.13.0. (``hf/`` holds files of the same kind from another hand, at other sizes.) Keys
of a file:

``x`` input, ``y`` output of the block, ``cot`` cotangent, ``w/<name>`` parameters and buffers under
their own names, ``topk_index`` and ``topk_weight`` as the block hands them to its experts,
``context/<name>`` what the block takes beside x, ``grad/x`` and ``grad/w/<name>`` gradients of
``(y * cot).sum()``, ``meta`` JSON with ``arch`` (the model type), ``used`` (the settings given to the
config class) and ``config`` (all that a config.json of it would say about the MoE block). Indices do
not change under perturbations of 1e-4 of x, so no tie decides.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
from pathlib import Path

import numpy as np
import torch
import transformers

D, F, E, K = 16, 6, 8, 2
SIZES = {
    "hidden_size": D,
    "intermediate_size": F,
    "moe_intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "vocab_size": 64,
    "shared_expert_intermediate_size": F,
    "moe_hidden_size": 12,
    "d_model": D,
    "d_ff": F,
    "expert_ffn_hidden_size": F,
    "ffn_hidden_size": F,
    "router_hidden_size": 10,
    "share_expert_dim": F,
    "shared_intermediate_size": F,
    "dense_intermediate_size": F,
    "moe_shared_expert_intermediate_size": F,
    "shared_experts_intermediate_size": F,
}
COUNTS = {
    "num_experts": E,
    "num_local_experts": E,
    "n_routed_experts": E,
    "moe_num_experts": E,
    "num_experts_per_tok": K,
    "num_experts_per_token": K,
    "moe_topk": K,
    "moe_k": K,
    "top_k_experts": K,
}
# The same for all, so that families which are one computation compile once in the tests.
RULE = {
    "routed_scaling_factor": 1.5,
    "route_scale": 1.5,
    "router_scaling_factor": 1.5,
    "moe_router_scaling_factor": 1.5,
    "moe_routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "moe_renormalize": True,
}
GROUPS = {"n_group": 4, "topk_group": 2, "num_expert_group": 4}
ONE = {"num_experts_per_tok": 1}
THREE = {"num_experts_per_tok": 3, "num_experts_per_token": 3}
SHARED = {"n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1}

# name: (module, config class, block class, further settings, further arguments of the block)
# A name is <model type>__<variant>; a block class "A+B" is a router and experts side by side.
TABLE: dict[str, tuple] = {
    "afmoe": ("afmoe", "AfmoeConfig", "AfmoeSparseMoeBlock", {"route_scale": 1.7}),
    "aria_text": ("aria", "AriaTextConfig", "AriaTextMoELayer", {}),
    "axk1": ("axk1", "AXK1Config", "AXK1MoE", GROUPS | THREE),
    "axk2": ("axk2", "AXK2Config", "AXK2MoE", GROUPS | THREE),
    "axk2__ungrouped": ("axk2", "AXK2Config", "AXK2MoE", {}),
    "bailing_hybrid": ("bailing_hybrid", "BailingHybridConfig", "BailingHybridMoE", GROUPS | THREE),
    "beam": ("beam", "BeamConfig", "BeamMoE", GROUPS | THREE),
    "cohere2_moe": ("cohere2_moe", "Cohere2MoeConfig", "Cohere2MoeSparseMoeBlock", {}),
    "cohere2_moe__noshared": (
        "cohere2_moe",
        "Cohere2MoeConfig",
        "Cohere2MoeSparseMoeBlock",
        {"num_shared_experts": 0},
    ),
    "dbrx__p2": (
        "dbrx",
        "DbrxConfig",
        "DbrxFFN",
        {
            "ffn_config": {
                "hidden_size": D,
                "ffn_hidden_size": F,
                "moe_num_experts": E,
                "moe_top_k": K,
                "moe_normalize_expert_weights": 2.0,
            }
        },
    ),
    "deepseek_ocr2_text": (
        "deepseek_ocr2",
        "DeepseekOcr2TextConfig",
        "DeepseekOcr2TextMoe",
        {"topk_method": "greedy", "num_hidden_layers": 2, "mlp_layer_types": ["sparse", "sparse"]},
    ),
    "deepseek_v32": ("deepseek_v32", "DeepseekV32Config", "DeepseekV32MoE", GROUPS | THREE),
    "deepseek_v4": (
        "deepseek_v4",
        "DeepseekV4Config",
        "DeepseekV4SparseMoeBlock",
        {"mlp_layer_types": ["hash_moe", "moe"]},
        {"layer_idx": 1},
    ),
    "deepseek_v4__hash": (
        "deepseek_v4",
        "DeepseekV4Config",
        "DeepseekV4SparseMoeBlock",
        {"mlp_layer_types": ["hash_moe", "moe"]},
        {"layer_idx": 0},
    ),
    "diffusion_gemma_text": (
        "diffusion_gemma",
        "DiffusionGemmaTextConfig",
        "DiffusionGemmaTextRouter+DiffusionGemmaTextExperts",
        {},
    ),
    "dots1": ("dots1", "Dots1Config", "Dots1MoE", GROUPS | THREE),
    "dots3_note_text": ("dots3_note", "Dots3NoteTextConfig", "Dots3NoteTextMoE", GROUPS | THREE),
    "ernie4_5_moe__noshared": (
        "ernie4_5_moe",
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeSparseMoeBlock",
        {"moe_num_shared_experts": 0},
    ),
    "ernie4_5_vl_moe_text": (
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeTextConfig",
        "Ernie4_5_VLMoeMoeBlock",
        {"moe_intermediate_size": [F, 4]},
    ),
    "exaone_moe": ("exaone_moe", "ExaoneMoeConfig", "ExaoneMoeSparseMoEBlock", GROUPS | THREE),
    "flint": ("flint", "FlintConfig", "FlintSparseMoeBlock", {}),
    "glm4_moe": ("glm4_moe", "Glm4MoeConfig", "Glm4MoeMoE", GROUPS | THREE),
    "glm4_moe_lite": ("glm4_moe_lite", "Glm4MoeLiteConfig", "Glm4MoeLiteMoE", GROUPS | THREE),
    "glm4v_moe_text": ("glm4v_moe", "Glm4vMoeTextConfig", "Glm4vMoeTextMoE", GROUPS | THREE),
    "glm5_next_text": (
        "glm5_next",
        "Glm5NextTextConfig",
        "Glm5NextTextMoE",
        GROUPS | THREE | {"swiglu_limit": 0.8},
    ),
    "glm_moe_dsa": ("glm_moe_dsa", "GlmMoeDsaConfig", "GlmMoeDsaMoE", GROUPS | THREE),
    "granitemoe_swa": ("granitemoe_swa", "GraniteMoeSWAConfig", "GraniteMoeSWAMoE", {}),
    "granitemoehybrid": (
        "granitemoehybrid",
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridMoE",
        {"mamba_n_heads": 4},
    ),
    "granitemoeshared": ("granitemoeshared", "GraniteMoeSharedConfig", "GraniteMoeSharedMoE", {}),
    "gpt_oss__bounds": (
        "gpt_oss",
        "GptOssConfig",
        "GptOssMLP",
        {"swiglu_limit": 0.8, "swiglu_alpha": 1.3},
    ),
    "hunyuan_v1_moe": (
        "hunyuan_v1_moe",
        "HunYuanMoEV1Config",
        "HunYuanMoEV1Moe",
        {},
        {"layer_idx": 0},
    ),
    "hy_v3": ("hy_v3", "HYV3Config", "HYV3MoE", {}),
    "hy_v4": ("hy_v4", "HYV4Config", "HYV4MoE", GROUPS | THREE | {"swiglu_limit": 0.8}),
    "doge": (
        "doge",
        "DogeConfig",
        "DogeCDMoE",
        {"is_moe": True, "num_experts": 16, "mlp_bias": True, "norm_topk_prob": False},
    ),
    "inkling_text": (
        "inkling",
        "InklingTextConfig",
        "InklingMoE",
        {"n_shared_experts": 2, "route_scale": 1.7},
    ),
    "inkling2_text": (
        "inkling2",
        "Inkling2TextConfig",
        "Inkling2SparseMoeBlock",
        {"mlp_gate_softcap": 1.0, "mlp_up_softcap": 2.0},
    ),
    "jetmoe": ("jetmoe", "JetMoeConfig", "JetMoeMoE", {}),
    "kimi_linear": ("kimi_linear", "KimiLinearConfig", "KimiLinearMoE", GROUPS | THREE),
    "kolibri1__norm": (
        "kolibri1",
        "Kolibri1Config",
        "Kolibri1SparseMoeBlock",
        {"norm_topk_prob": True},
    ),
    "laguna__scaled": (
        "laguna",
        "LagunaConfig",
        "LagunaSparseMoeBlock",
        {"moe_routed_scaling_factor": 2.5},
    ),
    "lfm2_moe__nobias": (
        "lfm2_moe",
        "Lfm2MoeConfig",
        "Lfm2MoeSparseMoeBlock",
        {"use_expert_bias": False, "norm_topk_prob": False, "routed_scaling_factor": 1.5},
    ),
    "llama4_text__top2": ("llama4", "Llama4TextConfig", "Llama4TextMoe", {}),
    "mellum": ("mellum", "MellumConfig", "MellumSparseMoeBlock", {}),
    "minimax": ("minimax", "MiniMaxConfig", "MiniMaxSparseMoeBlock", {}),
    "minimax_m3_vl_text": (
        "minimax_m3_vl",
        "MiniMaxM3VLTextConfig",
        "MiniMaxM3VLSparseMoeBlock",
        {"swiglu_limit": 0.8},
    ),
    "mistral4": ("mistral4", "Mistral4Config", "Mistral4MoE", GROUPS | THREE),
    "mistral_large4_text": (
        "mistral_large4",
        "MistralLarge4TextConfig",
        "MistralLarge4TextMoE",
        GROUPS | THREE,
    ),
    "muse_spark_text": ("muse_spark", "MuseSparkTextConfig", "MuseSparkTextMoE", {}),
    "nemotron_h": ("nemotron_h", "NemotronHConfig", "NemotronHMoE", GROUPS | THREE),
    "nemotron_h__latent": (
        "nemotron_h",
        "NemotronHConfig",
        "NemotronHMoE",
        GROUPS | THREE | {"moe_latent_size": 12, "mlp_bias": True},
    ),
    "nllb_moe": (
        "nllb_moe",
        "NllbMoeConfig",
        "NllbMoeSparseMLP",
        {"moe_eval_capacity_token_fraction": 0.25},
        {"ffn_dim": F},
    ),
    "nllb_moe__prioritized": (
        "nllb_moe",
        "NllbMoeConfig",
        "NllbMoeSparseMLP",
        {
            "moe_eval_capacity_token_fraction": -1.0,
            "expert_capacity": 4,
            "router_bias": True,
            "batch_prioritized_routing": True,
            "normalize_router_prob_before_dropping": True,
        },
        {"ffn_dim": F},
    ),
    "openai_privacy_filter": (
        "openai_privacy_filter",
        "OpenAIPrivacyFilterConfig",
        "OpenAIPrivacyFilterMLP",
        {"swiglu_limit": 0.8},
    ),
    "phimoe__wide": (
        "phimoe",
        "PhimoeConfig",
        "PhimoeSparseMoeBlock",
        {"router_jitter_noise": 0.3},
    ),
    "qwen3_5_moe_text": ("qwen3_5_moe", "Qwen3_5MoeTextConfig", "Qwen3_5MoeSparseMoeBlock", {}),
    "qwen3_next": ("qwen3_next", "Qwen3NextConfig", "Qwen3NextSparseMoeBlock", {}),
    "qwen3_omni_moe_text": (
        "qwen3_omni_moe",
        "Qwen3OmniMoeTextConfig",
        "Qwen3OmniMoeThinkerTextSparseMoeBlock",
        {},
    ),
    "qwen3_omni_moe_talker_text": (
        "qwen3_omni_moe",
        "Qwen3OmniMoeTalkerTextConfig",
        "Qwen3OmniMoeTalkerTextSparseMoeBlock",
        {"shared_expert_intermediate_size": F},
    ),
    "qwen3_vl_moe_text": (
        "qwen3_vl_moe",
        "Qwen3VLMoeTextConfig",
        "Qwen3VLMoeTextSparseMoeBlock",
        {},
    ),
    "qwen4_exp_text": ("qwen4_exp", "Qwen4ExpTextConfig", "Qwen4ExpTextSparseMoeBlock", {}),
    "solar_open": ("solar_open", "SolarOpenConfig", "SolarOpenMoE", GROUPS | THREE),
    "step3p5": (
        "step3p7",
        "Step3p7TextConfig",
        "Step3p7SparseMoeBlock",
        {
            "swiglu_limits": [0.8, 0.8],
            "swiglu_limits_shared": [0.6, 0.6],
            "moe_router_scaling_factor": 3.0,
        },
        {"layer_idx": 1},
    ),
    "switch_transformers__bias": (
        "switch_transformers",
        "SwitchTransformersConfig",
        "SwitchTransformersSparseMLP",
        {
            "expert_capacity": 2,
            "router_bias": True,
            "router_jitter_noise": 0.0,
            "dropout_rate": 0.0,
        },
    ),
    "unlimited_ocr_text": (
        "unlimited_ocr",
        "UnlimitedOcrTextConfig",
        "UnlimitedOcrTextMoe",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 3,
            "mlp_layer_types": ["sparse", "sparse"],
        },
    ),
    "zaya": ("zaya", "ZayaConfig", "ZayaSparseMoeBlock", ONE, {"layer_idx": 0}),
    "zaya__depth": ("zaya", "ZayaConfig", "ZayaSparseMoeBlock", ONE, {"layer_idx": 1}),
    "mixtral": ("mixtral", "MixtralConfig", "MixtralSparseMoeBlock", {}),
    "olmoe": ("olmoe", "OlmoeConfig", "OlmoeSparseMoeBlock", {}),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3Config", "DeepseekV3MoE", GROUPS | THREE),
}


class Pair(torch.nn.Module):
    """A router and experts that their model keeps side by side in the decoder layer."""

    def __init__(self, router, experts):
        super().__init__()
        self.router, self.experts = router, experts

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        _, weights, indices = self.router(flat)
        return self.experts(flat, indices, weights).reshape(x.shape)


def make_config(module: str, name: str, settings: dict):
    """The config with every size it knows made tiny; returns it and what was given to it."""
    cls = getattr(
        importlib.import_module(f"transformers.models.{module}.configuration_{module}"), name
    )
    names = set(cls().to_dict()) | set(cls.attribute_map or {})
    given = {k: v for k, v in (SIZES | COUNTS | RULE | SHARED).items() if k in names}
    given |= {k: v for k, v in settings.items() if k in names or k not in GROUPS | THREE}
    # Aliases would be set twice; keep the names that to_dict writes.
    given = {k: v for k, v in given.items() if k not in (cls.attribute_map or {})}
    given |= {
        cls.attribute_map[k]: v for k, v in settings.items() if k in (cls.attribute_map or {})
    }
    config = cls(**given)
    config._experts_implementation = "eager"
    return config, given


def make_block(module: str, config, name: str, arguments: dict):
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    if "+" in name:
        router, experts = (getattr(modeling, part)(config) for part in name.split("+"))
        return Pair(router, experts)
    cls = getattr(modeling, name, None) or getattr(modeling, name.replace("Text", ""))
    return cls(config, **arguments)


def randomize(block, generator) -> None:
    """Values of useful size everywhere; selection biases matter but do not decide alone.

    Multiples of 1/64, which makes the files smaller.
    """
    with torch.no_grad():
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            if not tensor.is_floating_point():
                rows = torch.stack(
                    [
                        torch.randperm(E, generator=generator)[: tensor.shape[1]]
                        for _ in range(tensor.shape[0])
                    ]
                )
                tensor.copy_(rows)
                continue
            noise = (16 * torch.randn(tensor.shape, generator=generator)).round() / 16
            if re.search(r"correction_bias|expert_bias|balancing_biases", name):
                tensor.copy_(0.25 * noise)
            elif re.search(r"norm|scale", name):
                tensor.copy_(1.0 + 0.25 * noise)
            elif re.search(r"gate\.weight|router|classifier|wg\.weight|gate\.", name):
                tensor.copy_(0.5 * noise)
            else:
                tensor.copy_(0.25 * noise)


def run(block, x, extra, record):
    record.clear()
    out = block(x, *extra)
    return out[0] if isinstance(out, tuple) else out


def generate(name: str, seed: int) -> dict[str, np.ndarray] | None:
    module, config_name, block_name, settings, *rest = TABLE[name]
    config, given = make_config(module, config_name, settings)
    torch.manual_seed(seed)
    block = make_block(module, config, block_name, rest[0] if rest else {}).float().eval()
    generator = torch.Generator().manual_seed(seed)
    randomize(block, generator)
    record: dict[str, torch.Tensor] = {}

    def hook(_module, args, kwargs):
        tensors = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.Tensor)]
        for a in tensors:
            key = "topk_weight" if a.is_floating_point() else "topk_index"
            record.setdefault(key, a.detach().clone())

    experts = [m for n, m in block.named_modules() if n.split(".")[-1] == "experts"]
    experts[0].register_forward_pre_hook(hook, with_kwargs=True) if experts else None
    x = (torch.randn((2, 12, D), generator=generator) * 64).round() / 64
    x.requires_grad_()
    extra = ()
    arrays: dict[str, np.ndarray] = {}
    if name.endswith("__hash"):
        ids = torch.randint(0, 64, (2, 12), generator=generator)
        arrays["context/token_ids"], extra = ids.numpy().astype(np.int32), (ids,)
    if name.endswith("__depth"):
        states = torch.randn((2, 12, 10), generator=generator)
        arrays["context/router_states"], extra = states.numpy(), (states,)
    y = run(block, x, extra, record)
    first = dict(record)
    for _ in range(3):
        moved = x.detach() + 1e-4 * torch.randn(x.shape, generator=generator)
        run(block, moved, extra, record)
        if "topk_index" in first and first["topk_index"].ndim == 2:
            was, now = (t["topk_index"].sort(-1).values for t in (first, record))
            if not torch.equal(was, now):
                return None
    cot = (torch.randn(y.shape, generator=generator) * 64).round() / 64
    (y * cot).sum().backward()
    arrays |= {"x": x.detach().numpy(), "y": y.detach().numpy(), "cot": cot.numpy()}
    arrays["grad/x"] = x.grad.numpy()
    for n, p in block.named_parameters():
        arrays[f"w/{n}"] = p.detach().numpy()
        if p.grad is not None:
            arrays[f"grad/w/{n}"] = p.grad.numpy()
    for n, b in block.named_buffers():
        arrays[f"w/{n}"] = b.numpy()
    arrays |= {k: v.numpy() for k, v in first.items()}
    scalars = {
        k: v
        for k, v in config.to_dict().items()
        if isinstance(v, (bool, int, float, str, type(None))) or k in given
    }
    meta = {
        "arch": name.split("__")[0],
        "variant": name.partition("__")[2] or None,
        "block": block_name,
        "used": given,
        "config": {k: v for k, v in scalars.items() if k not in ("transformers_version", "dtype")},
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "seed": seed,
    }
    arrays["meta"] = np.array(json.dumps(meta, default=str))
    return arrays


def phimoe_sampler() -> dict[str, np.ndarray]:
    """PhiMoE's training rule with the random numbers that it drew, so that another can repeat it."""
    from transformers.models.phimoe.modeling_phimoe import sparsemixer

    scores = torch.randn((64, E), generator=torch.Generator().manual_seed(5)).requires_grad_()
    cot = torch.randn((64, 2), generator=torch.Generator().manual_seed(6))
    torch.manual_seed(7)
    drawn = []
    for slot in range(2):
        drawn.append(torch.empty((64, E)).exponential_())
        coin = torch.rand((64, 1))
        drawn.append(coin.uniform_() if slot else coin)  # the second slot draws its coin twice
    torch.manual_seed(7)
    weights, indices = sparsemixer(scores, 0.3, training=True)
    (weights * cot).sum().backward()
    return {
        "scores": scores.detach().numpy(),
        "cot": cot.numpy(),
        "grad": scores.grad.numpy(),
        "weights": weights.detach().numpy(),
        "indices": indices.numpy().astype(np.int32),
        "gumbel": np.stack([-drawn[0].log().numpy(), -drawn[2].log().numpy()]),
        "coins": np.stack([drawn[1][:, 0].numpy(), drawn[3][:, 0].numpy()]),
        "meta": np.array(
            json.dumps(
                {
                    "function": "transformers.models.phimoe.modeling_phimoe.sparsemixer",
                    "eps": 0.3,
                    "transformers": transformers.__version__,
                    "torch": torch.__version__,
                }
            )
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="which; all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "hf_generated")
    parser.add_argument("--list", action="store_true", help="say what there is")
    args = parser.parse_args()
    if args.list:
        print("\n".join(sorted(TABLE)))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.names or "phimoe_sampler" in args.names:
        np.savez_compressed(args.out.parent / "phimoe_sampler.npz", **phimoe_sampler())
    for name in [n for n in args.names or sorted(TABLE) if n != "phimoe_sampler"]:
        arrays = next(filter(None, (generate(name, seed) for seed in range(1, 40))), None)
        if arrays is None:
            raise SystemExit(f"{name}: every seed had a tie within 1e-4; change the sizes")
        path = args.out / f"{name}.npz"
        np.savez_compressed(path, **arrays)
        print(
            f"{path.name}: {path.stat().st_size} bytes, seed {json.loads(str(arrays['meta']))['seed']}"
        )


if __name__ == "__main__":
    main()
