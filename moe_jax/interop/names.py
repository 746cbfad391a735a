"""The meaning of a checkpoint's tensor, from its name inside the MoE block.

One table serves all families: the names that transformers 5 uses in memory, and those of the
safetensors files on the Hub. No name has two meanings, so the families share the table.
"""

from __future__ import annotations

import re

# Canonical name -> names inside the block, as regular expressions that must match in full.
_NAMES: dict[str, str] = {
    "router.kernel": r"(moe\.)?gate\.weight|router\.weight|router\.(layer|classifier|proj|gate)\.weight"
    r"|gate\.wg\.weight|router_gate\.weight",
    "router.bias": r"router\.bias|router\.classifier\.bias",
    "router.input_scale": r"router\.scale",
    "router.expert_scale": r"router\.per_expert_scale",
    "router.global_scale": r"gate\.global_scale",
    "router.table": r"gate\.tid2eid",
    "expert_bias": r"((gate|router|experts)\.)?(moe_statics\.)?e_score_correction_bias"
    r"|((gate|router)\.)?expert_bias|gate\.bias|(moe\.)?router_bias|gate\.balancing_biases",
    "depth.down": r"gate\.down_proj\.weight",
    "depth.down_bias": r"gate\.down_proj\.bias",
    "depth.depth_scale": r"gate\.router_states_scale",
    "depth.norm": r"gate\.router_mlp\.norm\.weight",
    "depth.fc1": r"gate\.router_mlp\.fc1\.weight",
    "depth.fc1_bias": r"gate\.router_mlp\.fc1\.bias",
    "depth.fc2": r"gate\.router_mlp\.fc2\.weight",
    "depth.fc2_bias": r"gate\.router_mlp\.fc2\.bias",
    "depth.kernel": r"gate\.router_mlp\.out_proj\.weight",
    "experts.gate_up": r"experts\.gate_up_proj(\.weight)?|input_linear\.weight|experts\.fc1\.weight",
    "experts.gate_up_interleaved": r"experts\.w13_weight",
    "experts.gate_up_bias": r"experts\.gate_up_proj[._]bias",
    "experts.gate": r"experts\.gate_proj(\.weight)?|moe\.gate_proj\.weight",
    "experts.up": r"experts\.up_proj(\.weight)?|moe\.up_proj\.weight|experts\.gate_and_up_projs",
    "experts.down": r"experts\.down_proj(\.weight)?|moe\.down_proj\.weight|experts\.down_projs"
    r"|output_linear\.weight|experts\.fc2\.weight|experts\.w2_weight",
    "experts.down_bias": r"experts\.down_proj[._]bias",
    "experts.flat_gate": r"experts\.mlp\.w1",
    "experts.flat_up": r"experts\.mlp\.v1",
    "experts.flat_down": r"experts\.mlp\.w2",
    "experts.row_in": r"down_embed\.weight",
    "experts.row_out": r"up_embed\.weight",
    "experts.post_norm": r"experts\.post_expert_norm\.weight",
    "shared_stack.gate": r"shared_experts\.gate_proj",
    "shared_stack.up": r"shared_experts\.up_proj",
    "shared_stack.down": r"shared_experts\.(down_proj|(shared_)?w2_weight)",
    "shared_stack.gate_up_interleaved": r"shared_experts\.(shared_)?w13_weight",
    "shared_gate": r"shared_expert_gate\.weight",
    "latent.in": r"fc1_latent_proj\.weight|pre_expert_proj\.weight",
    "latent.in_bias": r"fc1_latent_proj\.bias",
    "latent.norm": r"pre_expert_norm\.weight",
    "latent.out": r"fc2_latent_proj\.weight|post_expert_proj\.weight",
    "latent.out_bias": r"fc2_latent_proj\.bias",
    "output_norm": r"post_mlp_layernorm\.weight",
    "output_bias": r"bias",
}
_PATTERNS = {canonical: re.compile(pattern) for canonical, pattern in _NAMES.items()}

_PART = {
    "w1": "gate",
    "gate_proj": "gate",
    "linear_v": "gate",
    "w3": "up",
    "up_proj": "up",
    "wi": "up",
    "fc1": "up",
    "w2": "down",
    "down_proj": "down",
    "wo": "down",
    "fc2": "down",
    "gate_up_proj": "gate_up",
    "input_linear": "gate_up",
    "output_linear": "down",
}
_PARTS = "|".join(_PART)
_ONE_EXPERT = re.compile(rf"experts\.(?:expert_)?(\d+)\.({_PARTS})\.(weight|bias)")
# Doge keeps the projections of its shared expert directly in the block.
_BARE = re.compile(r"(gate_proj|up_proj|down_proj)\.(weight|bias)")
_SHARED = re.compile(rf"(?:shared_experts?|shared_mlp|share_expert)\.({_PARTS})\.(weight|bias)")

# For messages: the names that a tensor may have; the first is that of transformers 5.
SPELLINGS: dict[str, str] = {
    "router.kernel": "gate.weight, router.weight, router.classifier.weight, router.proj.weight",
    "router.bias": "router.bias",
    "router.global_scale": "gate.global_scale",
    "experts.row_in": "down_embed.weight",
    "experts.row_out": "up_embed.weight",
    "shared_stack.gate": "shared_experts.gate_proj",
    "shared_stack.up": "shared_experts.up_proj",
    "shared_stack.down": "shared_experts.down_proj",
    "router.input_scale": "router.scale",
    "router.expert_scale": "router.per_expert_scale",
    "router.table": "gate.tid2eid",
    "expert_bias": "gate.e_score_correction_bias, e_score_correction_bias, expert_bias",
    "experts.gate": "experts.gate_up_proj, or experts.<i>.gate_proj.weight or .w1.weight",
    "experts.up": "experts.gate_up_proj, or experts.<i>.up_proj.weight or .w3.weight",
    "experts.down": "experts.down_proj, or experts.<i>.down_proj.weight or .w2.weight",
    "experts.gate_bias": "experts.gate_up_proj_bias",
    "experts.up_bias": "experts.gate_up_proj_bias, or experts.<i>.fc1.bias",
    "experts.down_bias": "experts.down_proj_bias, or experts.<i>.fc2.bias",
    "experts.post_norm": "experts.post_expert_norm.weight",
    "shared.gate": "shared_experts.gate_proj.weight, shared_expert.gate_proj.weight",
    "shared.up": "shared_experts.up_proj.weight, shared_expert.up_proj.weight",
    "shared.down": "shared_experts.down_proj.weight, shared_expert.down_proj.weight",
    "shared_gate": "shared_expert_gate.weight",
    "latent.in": "fc1_latent_proj.weight, pre_expert_proj.weight",
    "latent.norm": "pre_expert_norm.weight",
    "latent.out": "fc2_latent_proj.weight, post_expert_proj.weight",
    "output_norm": "post_mlp_layernorm.weight",
    "output_bias": "bias",
    "depth.down": "gate.down_proj.weight",
    "depth.down_bias": "gate.down_proj.bias",
    "depth.norm": "gate.router_mlp.norm.weight",
    "depth.fc1": "gate.router_mlp.fc1.weight",
    "depth.fc1_bias": "gate.router_mlp.fc1.bias",
    "depth.fc2": "gate.router_mlp.fc2.weight",
    "depth.fc2_bias": "gate.router_mlp.fc2.bias",
    "depth.kernel": "gate.router_mlp.out_proj.weight",
}


def canonical(name: str) -> str | None:
    """The canonical name of a tensor, or None if no family has a tensor of this name.

    ``experts.3.gate`` is the gate of one expert, ``experts.gate_up`` both projections of all.

    Example:
        >>> canonical("experts.3.w1.weight"), canonical("gate.weight"), canonical("self_attn.q")
        ('experts.3.gate', 'router.kernel', None)
    """
    one = _ONE_EXPERT.fullmatch(name)
    if one:
        return f"experts.{int(one[1])}.{_PART[one[2]]}{'_bias' if one[3] == 'bias' else ''}"
    shared = _SHARED.fullmatch(name) or _BARE.fullmatch(name)
    if shared:
        return f"shared.{_PART[shared[1]]}{'_bias' if shared[2] == 'bias' else ''}"
    for meaning, pattern in _PATTERNS.items():
        if pattern.fullmatch(name):
            return meaning
    return None
