"""moe_jax: dynamic Mixture-of-Experts routing for JAX, with compute budgets that are held.

Every routing rule produces one ``Routing``; every way of running experts consumes one
``DispatchPlan``; nothing else passes between them.
"""

from moe_jax.experts import FeedForward, explain_choice, quantize_experts, run_experts
from moe_jax.layer import LayerAux, LayerOptions, init_moe_layer, moe_layer
from moe_jax.routers import (
    AdaK,
    BalancedAssignment,
    Cosine,
    DynamicK,
    Elastic,
    ExpertChoiceRouter,
    ExpertRetrieval,
    ExpertThreshold,
    MinP,
    MixtureOfDepths,
    Piggyback,
    RandomSecond,
    RandomSkip,
    ReLURouter,
    Reroute,
    Router,
    SeqTopK,
    SharedBudget,
    Sinkhorn,
    SkipSecond,
    TopAny,
    TopK,
    TopP,
    Traits,
    router_from_json,
    with_share,
)
from moe_jax.routing.budget import fit_thresholds
from moe_jax.routing.dispatch import expert_capacity, kept_weights, plan_dispatch, to_assignments
from moe_jax.routing.elasticity import Schedule, distillation_loss
from moe_jax.routing.gate import Gate
from moe_jax.routing.losses import LossWeights, aux_loss
from moe_jax.routing.row_budget import row_budget
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.stats import flops_report, routing_stats
from moe_jax.types import Assignments, DispatchPlan, ExpertChoice, Routing, RoutingStats, pytree

__version__ = "0.1.0"


def __getattr__(name: str):
    # The service and its libraries load only for those who ask for it.
    if name == "RouterFactory":
        from moe_jax.serving.engine import RouterFactory

        return RouterFactory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "AdaK",
    "Assignments",
    "BalancedAssignment",
    "Cosine",
    "DispatchPlan",
    "DynamicK",
    "Elastic",
    "ExpertChoice",
    "ExpertChoiceRouter",
    "ExpertRetrieval",
    "ExpertThreshold",
    "FeedForward",
    "Gate",
    "LayerAux",
    "LayerOptions",
    "LossWeights",
    "MinP",
    "MixtureOfDepths",
    "Piggyback",
    "RandomSecond",
    "RandomSkip",
    "ReLURouter",
    "Reroute",
    "Router",
    "Routing",
    "RoutingStats",
    "Schedule",
    "Scoring",
    "SeqTopK",
    "SharedBudget",
    "Sinkhorn",
    "SkipSecond",
    "TopAny",
    "TopK",
    "TopP",
    "Traits",
    "aux_loss",
    "distillation_loss",
    "expert_capacity",
    "explain_choice",
    "fit_thresholds",
    "flops_report",
    "init_moe_layer",
    "kept_weights",
    "moe_layer",
    "plan_dispatch",
    "pytree",
    "quantize_experts",
    "router_from_json",
    "routing_stats",
    "row_budget",
    "run_experts",
    "to_assignments",
    "with_share",
]
