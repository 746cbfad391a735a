"""Routing rules of single published models, beyond what ``TopK`` with a ``Scoring`` expresses.

They are rules like those of ``moe_jax.routers``, which imports them by name when a checkpoint or a
JSON file has one. What a rule needs beyond x comes in ``context``, by the names in each docstring.
"""

from moe_jax.interop.rules.capacity_top_k import CapacityTopK
from moe_jax.interop.rules.depth_router import DepthRouter
from moe_jax.interop.rules.joint_shared import JointShared
from moe_jax.interop.rules.null_experts import NullExperts
from moe_jax.interop.rules.plus_plus import MoEPlusPlus
from moe_jax.interop.rules.product_keys import ProductKeys
from moe_jax.interop.rules.sparse_mixer import SparseMixer
from moe_jax.interop.rules.token_table import TableState, TokenTable
from moe_jax.interop.rules.zero_experts import ZeroExperts

__all__ = [
    "CapacityTopK",
    "DepthRouter",
    "JointShared",
    "MoEPlusPlus",
    "NullExperts",
    "ProductKeys",
    "SparseMixer",
    "TableState",
    "TokenTable",
    "ZeroExperts",
]
