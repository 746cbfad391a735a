"""What a block of a published model is made of, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from moe_jax.experts import ExpertFn
from moe_jax.interop import router_settings
from moe_jax.interop.model_config import HFConfig
from moe_jax.routers import Router


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The parts of the blocks of these model types; the table is in ``families``.

    Attributes:
        types: model types in config.json, of the text model and of composite models that contain it.
        router: the rule of a config.
        defaults: of the config class in transformers, by meaning (see ``model_config.ALIASES``).
        expert: the function of one routed expert.
        shared_expert: the function of the shared expert, if it differs.
        shared: "none", "plain", "gated" (a sigmoid weighs it), "optional" (if tensors are there)
            or "joint" (several, weighed by the router).
        bias: whether a selection bias must be among the tensors: "none", "required", or "optional"
            (the config says so).
        extras: further tensors that must be there, by canonical name (see ``interop.names``).
        accepts: routing keys that the family's functions do not read, with the values that agree with
            what the family does; only where its rule does not show that (see ``routing_keys``).
        output_scale: what the routed output is multiplied by, after the combine weights.
        weight_on_input: weights multiply the input of an expert instead of its output.
        interleaved: gate and up alternate in ``gate_up_proj`` instead of following each other.
        gated: whether experts have a gate projection.
        per_sequence: the rule counts within each sequence, so it needs the length of a sequence.
    """

    types: tuple[str, ...]
    router: Callable[[HFConfig], Router]
    defaults: Mapping[str, Any]
    expert: Callable[[HFConfig], ExpertFn] = router_settings.plain
    shared_expert: Callable[[HFConfig], ExpertFn] | None = None
    shared: str = "none"
    bias: str = "none"
    extras: tuple[str, ...] = ()
    accepts: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    output_scale: Callable[[HFConfig], float] = lambda c: 1.0
    weight_on_input: bool = False
    interleaved: bool = False
    gated: bool = True
    per_sequence: bool = False
