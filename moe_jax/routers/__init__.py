"""Routing rules. Each is a value in a separate file; a new rule is one file and one line below."""

from moe_jax.routers.ada_k import AdaK, reward_advantages
from moe_jax.routers.adaptive_experts import (
    ExpertRecord,
    adapt_experts,
    empty_record,
    record_experts,
)
from moe_jax.routers.balanced_assignment import BalancedAssignment
from moe_jax.routers.base import BiasState, NoState, Router, Traits, router_from_json
from moe_jax.routers.catalog import catalog
from moe_jax.routers.cosine import Cosine
from moe_jax.routers.dynamic_k import DynamicK
from moe_jax.routers.elastic import Elastic, with_share
from moe_jax.routers.expert_choice import ExpertChoiceRouter
from moe_jax.routers.expert_retrieval import ExpertRetrieval
from moe_jax.routers.expert_threshold import ExpertThreshold
from moe_jax.routers.min_p import MinP
from moe_jax.routers.mixture_of_depths import MixtureOfDepths
from moe_jax.routers.piggyback import Piggyback
from moe_jax.routers.random_second import RandomSecond
from moe_jax.routers.random_skip import RandomSkip
from moe_jax.routers.relu import ReLURouter
from moe_jax.routers.reroute import Reroute, with_similarity
from moe_jax.routers.seq_top_k import SeqTopK
from moe_jax.routers.shared_budget import SharedBudget
from moe_jax.routers.sinkhorn import Sinkhorn
from moe_jax.routers.skip_second import SkipSecond
from moe_jax.routers.token_choice import TokenChoice
from moe_jax.routers.top_any import TopAny
from moe_jax.routers.top_k import TopK
from moe_jax.routers.top_p import TopP
from moe_jax.routing.similarity import expert_similarity

__all__ = [
    "AdaK",
    "BalancedAssignment",
    "BiasState",
    "Cosine",
    "DynamicK",
    "Elastic",
    "ExpertChoiceRouter",
    "ExpertRecord",
    "ExpertRetrieval",
    "ExpertThreshold",
    "MinP",
    "MixtureOfDepths",
    "NoState",
    "Piggyback",
    "RandomSecond",
    "RandomSkip",
    "ReLURouter",
    "Reroute",
    "Router",
    "SeqTopK",
    "SharedBudget",
    "Sinkhorn",
    "SkipSecond",
    "TokenChoice",
    "TopAny",
    "TopK",
    "TopP",
    "Traits",
    "adapt_experts",
    "catalog",
    "empty_record",
    "expert_similarity",
    "record_experts",
    "reward_advantages",
    "router_from_json",
    "with_share",
    "with_similarity",
]
