"""Published models: the routing rule of a Hugging Face config, the MoE block of a checkpoint.

Nothing here imports torch, transformers or safetensors; checkpoints are read from memory-mapped files.
"""

from moe_jax.interop.block_builder import moe_block_from_hf
from moe_jax.interop.blocks import MoEBlock
from moe_jax.interop.families import router_from_hf, supported_model_types
from moe_jax.interop.hub import load_hf_block
from moe_jax.interop.retrofit import (
    DriftMonitor,
    ModelRetrofitReport,
    RetrofitReport,
    make_dynamic,
    make_model_dynamic,
)

__all__ = [
    "DriftMonitor",
    "MoEBlock",
    "ModelRetrofitReport",
    "RetrofitReport",
    "load_hf_block",
    "make_dynamic",
    "make_model_dynamic",
    "moe_block_from_hf",
    "router_from_hf",
    "supported_model_types",
]
