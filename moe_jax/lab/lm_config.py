"""The sizes and settings of the small language model, as one value with JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from moe_jax.checks import check_count, check_finite
from moe_jax.experts import FeedForward
from moe_jax.routers import Elastic, Router, TopK, router_from_json
from moe_jax.routing.elasticity import Schedule
from moe_jax.routing.losses import LossWeights
from moe_jax.routing.scoring import Scoring

# Least and most of each size: a larger one is a slip of the pen, which would fill the memory.
_SIZES = {
    **dict.fromkeys(("num_heads", "num_experts", "k", "d_model", "d_ff"), (1, 2**20)),
    **dict.fromkeys(("length", "batch_size"), (1, 2**20)),
    "num_layers": (1, 4096),
    "moe_every": (1, 4096),
    "dense_d_ff": (0, 2**20),
}
_RATES = (
    *("learning_rate", "warmup", "weight_decay", "router_rate", "expert_rate", "router_decay"),
    *("expert_decay", "max_grad_norm", "load_balancing", "router_z", "balance_rate", "distill"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """The model and how it is trained. Python values only: hashable, equal by value, JSON.

    The defaults train to something worth measuring in two to three minutes on two cores.

    Args:
        num_layers: transformer layers.
        moe_every: every n-th layer has experts, the last one among them; the others have a plain
            feed-forward part. Must divide num_layers; 1 is experts everywhere.
        d_model: D.
        num_heads: H; must divide D into heads of even width.
        num_experts: E.
        k: experts per token while training.
        d_ff: F, width of one expert.
        dense_d_ff: width of a plain feed-forward part; 0 is ``k * d_ff``, which costs a token as much
            as its experts do.
        length: S, bytes predicted per sequence.
        batch_size: B.
        learning_rate: peak rate of AdamW, after a linear warm-up, before a cosine to a tenth.
        warmup: share of the steps that warm up.
        weight_decay: of AdamW; norms are not decayed.
        router_rate: factor on the learning rate for routers.
        expert_rate: factor on the learning rate for experts.
        router_decay: weight decay of routers; None is ``weight_decay``.
        expert_decay: weight decay of experts; None is ``weight_decay``.
        max_grad_norm: gradients are scaled down to this global norm.
        load_balancing: coefficient of the load-balancing loss.
        router_z: coefficient of the router z-loss.
        balance_rate: step of the loss-free bias that ``router.update`` moves; 0 is off.
        renormalize: whether combine weights are divided by their sum. Off, as dropping an expert
            then leaves the weights of the others as they were trained.
        implementation: see ``moe_jax.experts``.
        rule: the rule to train with, of the same ``num_experts``; None is ``TopK``. ``k`` then only
            says what savings are relative to.
        schedule: when tokens draw their budget, for a ``rule`` that is ``Elastic``; None is never.
        distill: weight of the self-distillation: 0 trains on the drawn budgets themselves; else each
            step runs all k experts with the usual loss and, while the schedule's share is above 0, a
            drawn pass that is taught by the first (KL divergence).

    Raises:
        TypeError, ValueError: a value of another type, or one that does not fit.
    """

    num_layers: int = 4
    moe_every: int = 1
    d_model: int = 128
    num_heads: int = 4
    num_experts: int = 16
    k: int = 4
    d_ff: int = 128
    dense_d_ff: int = 0
    length: int = 128
    batch_size: int = 16
    learning_rate: float = 3e-3
    warmup: float = 0.05
    weight_decay: float = 0.05
    router_rate: float = 1.0
    expert_rate: float = 1.0
    router_decay: float | None = None
    expert_decay: float | None = None
    max_grad_norm: float = 1.0
    load_balancing: float = 1e-2
    router_z: float = 1e-3
    balance_rate: float = 0.0
    renormalize: bool = False
    implementation: str | None = None
    rule: Router | None = None
    schedule: Schedule | None = None
    distill: float = 0.0

    def __post_init__(self) -> None:
        for name, (least, most) in _SIZES.items():
            value = getattr(self, name)
            fix = f"Give a size of at most {most:,}."
            check_count(name, value, least=least, fix=fix)
            if value > most:
                raise ValueError(f"{name}: expected at most {most:,}, got {value:,}. {fix}")
        for name in _RATES:
            value = getattr(self, name)
            if value is not None:
                check_finite(name, value)
        if self.d_model % (2 * self.num_heads):
            raise ValueError(
                f"num_heads: expected heads of even width, got d_model={self.d_model} over "
                f"{self.num_heads} heads. Rotary positions turn pairs of channels."
            )
        if self.num_layers % self.moe_every:
            raise ValueError(
                f"moe_every: expected a divisor of num_layers={self.num_layers}, got "
                f"{self.moe_every}. Layers come in groups of moe_every, the last of each with experts."
            )
        for name in ("router_rate", "expert_rate", "router_decay", "expert_decay", "distill"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name}: expected at least 0, got {value}.")
        if self.schedule is not None and not isinstance(self.rule, Elastic):
            raise ValueError(
                f"schedule: expected it with rule=Elastic(...), got rule={self.rule!r}. Only that rule "
                "draws budgets."
            )
        if self.distill and self.schedule is None:
            raise ValueError(
                f"distill: expected a schedule with it, got distill={self.distill} alone. Pass "
                "schedule=Schedule(start=0.7)."
            )
        router = self.router()  # refuses a k that does not fit
        if router.num_experts != self.num_experts:
            raise ValueError(
                f"rule: expected one of num_experts={self.num_experts}, got {router!r}. Give both "
                "the same number."
            )

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts: as many as there are routers and states."""
        return self.num_layers // self.moe_every

    def router(self) -> Router:
        """The rule that the model is trained with."""
        if self.rule is not None:
            return self.rule
        return TopK(
            num_experts=self.num_experts,
            k=self.k,
            scoring=self.scoring,
            balance_rate=self.balance_rate,
        )

    @property
    def scoring(self) -> Scoring:
        """How the model weighs experts; rules that are tried later must use the same."""
        return Scoring(norm="sum" if self.renormalize else "none")

    @property
    def experts(self) -> FeedForward:
        """The expert function of every layer."""
        return FeedForward(activation="relu2")

    @property
    def loss_weights(self) -> LossWeights:
        """The coefficients of the auxiliary losses of every layer."""
        return LossWeights(load_balancing=self.load_balancing, router_z=self.router_z)

    def summary(self) -> str:
        """Returns the sizes in words.

        Example:
            >>> LMConfig().summary()
            '4 layers, 16 experts, k=4, width 128'
        """
        return f"{self.num_layers} layers, {self.num_experts} experts, k={self.k}, width {self.d_model}"

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object with every field.

        Raises:
            TypeError: the rule has a field that JSON cannot hold, such as a function.
        """
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.rule is not None:
            data["rule"] = self.rule.to_json()
        if self.schedule is not None:
            data["schedule"] = dataclasses.asdict(self.schedule)
        return data

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> LMConfig:
        """The configuration that ``to_json`` described.

        Raises:
            ValueError: an unknown field.
        """
        accepted = {f.name for f in dataclasses.fields(LMConfig)}
        unknown = sorted(set(data) - accepted)
        values = dict(data)
        if unknown:
            near = [get_close_matches(name, accepted, n=1) for name in unknown]
            meant = [f"Did you mean {match[0]}? " for match in near if match]
            problem = (
                f"LMConfig: expected fields among {', '.join(sorted(accepted))}, got "
                f"{', '.join(unknown)}. {''.join(meant)}Correct the name, or, if the library wrote the "
                "file, use the version that wrote it."
            )
            try:  # what is wrong besides is said at once
                LMConfig.from_json({k: v for k, v in values.items() if k in accepted})
            except (TypeError, ValueError) as error:
                problem = f"{problem}\n{error}"
            raise ValueError(problem)
        if isinstance(values.get("rule"), Mapping):
            values["rule"] = router_from_json(values["rule"])
        if isinstance(values.get("schedule"), Mapping):
            values["schedule"] = Schedule(**values["schedule"])
        return LMConfig(**values)


# --- the model ------------------------------------------------------------------------------
