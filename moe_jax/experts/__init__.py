"""Implementations of the experts. Each is one file, obeys the plan and equals the dense oracle.

``implementation=None`` lets ``choose`` decide, a name asks for one, a tuple of names takes the
first that does not refuse. A new implementation is one file and one line in ``_ALL``.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from moe_jax.checks import check_array, check_choice, check_instance, describe_value
from moe_jax.experts.active import ACTIVE
from moe_jax.experts.capacity import CAPACITY
from moe_jax.experts.closure import with_closed_over
from moe_jax.experts.dense import DENSE
from moe_jax.experts.feed_forward import (
    ACTIVATIONS,
    ExpertFn,
    FeedForward,
    check_expert_fn,
    check_params,
)
from moe_jax.experts.grouped import GROUPED
from moe_jax.experts.implementation import ExpertsOutput, Implementation, num_experts_of, vary_like
from moe_jax.experts.platforms import PLATFORMS, Platform, platform_of
from moe_jax.experts.quantized_kernels import quantize_experts, without_gradient
from moe_jax.experts.ragged import RAGGED
from moe_jax.experts.tiered import TIERED
from moe_jax.types import Array, DispatchPlan, Params

_ALL = (ACTIVE, GROUPED, RAGGED, TIERED, CAPACITY, DENSE)  # in order of preference
IMPLEMENTATIONS: dict[str, Implementation] = {i.name: i for i in _ALL}

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "PLATFORMS",
    "Choice",
    "ExpertFn",
    "ExpertsOutput",
    "FeedForward",
    "Implementation",
    "Platform",
    "check_expert_fn",
    "check_implementation",
    "check_params",
    "check_platform",
    "choose",
    "explain_choice",
    "platform_of",
    "quantize_experts",
    "run_experts",
]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What ``explain_choice`` returns: the platform, and what each candidate says."""

    platform: (
        str | None
    )  # None: unknown until lowering, which then takes each platform's own choice
    platform_reason: str  # where the platform is known from
    candidates: tuple[tuple[str, str], ...]  # (name, "chosen" | reason), in order of preference

    def __str__(self) -> str:
        lines = [f"platform: {self.platform or 'any'} ({self.platform_reason})"]
        return "\n".join([*lines, *(f"{name}: {said}" for name, said in self.candidates)])


def explain_choice(
    plan: DispatchPlan,
    implementation: str | tuple[str, ...] | None = None,
    *,
    expert_fn: ExpertFn = FeedForward(),
    platform: str | None = None,
) -> Choice:
    """Returns the platform, why it is taken, and what each implementation says for it.

    A single name is chosen whatever it says, since the caller asked for it.

    Args:
        plan: from ``plan_dispatch``.
        implementation: None, a name, or names in order of preference.
        expert_fn: one expert.
        platform: what is compiled for: a name in ``PLATFORMS``. None takes it from the mesh in use and
            the devices of the plan, see ``platform_of``. Where it is unknown, inside ``jit``, the
            candidates are those of the CPU, and lowering chooses by itself for each platform.

    Example:
        >>> import moe_jax
        >>> router = moe_jax.TopK(num_experts=4, k=2)
        >>> params, x = router.init(jax.random.key(0), 8), jax.numpy.ones((9, 8))
        >>> routing = router(params, router.init_state(), x)
        >>> plan = moe_jax.plan_dispatch(moe_jax.to_assignments(routing))
        >>> print(str(explain_choice(plan, ("grouped", "tiered"), platform="tpu")))
        platform: tpu (stated by platform=)
        grouped: chosen
        tiered: not needed: an earlier one was chosen
    """
    check_platform(platform)
    where = platform_of(plan, platform=platform)
    candidates = _candidates(plan, implementation, expert_fn, where.name or "cpu")
    return Choice(where.name, where.reason, tuple(candidates))


def _candidates(
    plan: DispatchPlan,
    implementation: str | tuple[str, ...] | None,
    expert_fn: ExpertFn,
    platform: str,
) -> list[tuple[str, str]]:
    check_implementation(implementation)
    if isinstance(implementation, str):
        return [(implementation, "chosen")]
    names = tuple(IMPLEMENTATIONS) if implementation is None else implementation
    reasons: list[tuple[str, str]] = []
    chosen = False
    for name in names:
        reason = IMPLEMENTATIONS[name].refuse(expert_fn, plan, platform)
        if reason is None and not chosen:
            reasons.append((name, "chosen"))
            chosen = True
        else:
            reasons.append((name, reason or "not needed: an earlier one was chosen"))
    return reasons


def choose(
    plan: DispatchPlan,
    implementation: str | tuple[str, ...] | None = None,
    *,
    expert_fn: ExpertFn = FeedForward(),
    platform: str | None = None,
) -> Implementation:
    """Returns the implementation that ``explain_choice`` marks as chosen.

    Raises:
        ValueError: an unknown name, or every candidate refused; the reasons are in the message.
    """
    choice = explain_choice(plan, implementation, expert_fn=expert_fn, platform=platform)
    for name, reason in choice.candidates:
        if reason == "chosen":
            return IMPLEMENTATIONS[name]
    reasons = "; ".join(f"{name}: {reason}" for name, reason in choice.candidates)
    raise ValueError(
        f"implementation: expected one that can run, got {implementation!r} ({reasons}). "
        "Name a single one to insist on it."
    )


def check_platform(platform: Any) -> None:
    """Raises unless ``platform`` is None or a name in ``PLATFORMS``."""
    if platform is not None:
        check_choice("platform", platform, PLATFORMS)


def check_implementation(implementation: Any) -> None:
    """Raises unless ``implementation`` is None, a known name, or a tuple of known names.

    Raises:
        TypeError: anything else than None, text and a tuple of text.
        ValueError: an unknown name, or no name at all.
    """
    if implementation is None:
        return
    names = (implementation,) if isinstance(implementation, str) else implementation
    if not isinstance(names, tuple) or not all(isinstance(n, str) for n in names):
        raise TypeError(
            "implementation: expected None, a name or a tuple of names, got "
            f"{describe_value(implementation)}. The names are {', '.join(IMPLEMENTATIONS)}."
        )
    unknown = [n for n in names if n not in IMPLEMENTATIONS]
    if unknown or not names:
        raise ValueError(
            f"implementation: expected names among {sorted(IMPLEMENTATIONS)}, got {unknown}. "
            "None lets the library choose."
        )


def run_experts(
    expert_fn: ExpertFn,
    params: Params,
    x: Array,
    plan: DispatchPlan,
    weights: Array,
    *,
    implementation: str | tuple[str, ...] | None = None,
    platform: str | None = None,
) -> ExpertsOutput:
    """Runs the plan: ``y[t] = sum of weights[n] * expert(x[t])`` over the kept assignments of t.

    Args:
        expert_fn: one expert, see ``ExpertFn``.
        params: expert parameters with a leading axis E.
        x: float[T, D].
        plan: from ``plan_dispatch``.
        weights: f32[N], from ``kept_weights``.
        implementation: None, a name, or names in order of preference.
        platform: what is compiled for, a name in ``PLATFORMS``; None finds out, see ``platform_of``.

    Returns:
        y f32[T, D_out], the rows that were computed, and the name of what computed them.

    Raises:
        ValueError: shapes disagree with the plan, the parameters are not those of ``expert_fn``, or
            no implementation fits.

    Example:
        >>> import jax.numpy as jnp, moe_jax
        >>> expert_fn, router = FeedForward(), moe_jax.TopK(num_experts=4, k=2)
        >>> x = jnp.ones((3, 8))
        >>> routing = router(router.init(jax.random.key(0), 8), router.init_state(), x)
        >>> plan = moe_jax.plan_dispatch(moe_jax.to_assignments(routing))
        >>> params = expert_fn.init(jax.random.key(1), num_experts=4, d_model=8, d_ff=16)
        >>> weights = moe_jax.kept_weights(plan)
        >>> out = run_experts(expert_fn, params, x, plan, weights, implementation="dense")
        >>> out.y.shape, float(out.slots_executed), out.implementation
        ((3, 8), 12.0, 'dense')
    """
    check_expert_fn(expert_fn)
    check_instance("plan", plan, DispatchPlan, fix="Pass what plan_dispatch returned.")
    a = plan.assignments
    check_array(
        "x",
        x,
        "T D",
        sizes={"T": a.num_tokens},
        fix="Pass the tokens that were routed, flattened to [tokens, width].",
    )
    check_array(
        "weights",
        weights,
        "N",
        sizes={"N": a.expert_indices.shape[0]},
        fix="Pass kept_weights(plan), one weight an assignment.",
    )
    if num_experts_of(params) != a.num_experts:
        raise ValueError(
            f"expert params: expected a leading axis of E={a.num_experts}, "
            f"got {num_experts_of(params)}. Initialise as many experts as the router has."
        )
    check_params(expert_fn, params, d_model=x.shape[1], num_experts=a.num_experts)
    where = platform_of((x, params, plan), platform=platform)
    params = without_gradient(expert_fn, params)
    expert_fn, params = with_closed_over(expert_fn, params, x)

    def run(platform: str, *args: Any) -> tuple[Array, Array]:
        params, x, plan, weights = args
        chosen = choose(plan, implementation, expert_fn=expert_fn, platform=platform)
        sizes = {"platform": platform} if chosen.sized_by_platform else {}
        y = chosen.run(expert_fn, params, x, plan, weights, **sizes)
        return y, vary_like(chosen.slots_executed(plan, **sizes), y)

    def named(platform: str) -> str:
        return choose(plan, implementation, expert_fn=expert_fn, platform=platform).name

    args = (params, x, plan, weights)
    if where.name is not None:
        y, executed = run(where.name, *args)
        return ExpertsOutput(y=y, slots_executed=executed, implementation=named(where.name))
    # The platform is unknown until lowering, so the trace holds what each would choose, and lowering
    # keeps one. GPUs of other makers run what CPUs run, unless the caller states the platform.
    names = {name: named(name) for name in ("cpu", "tpu", "cuda")}
    if len(set(names.values())) == 1 and not IMPLEMENTATIONS[names["cpu"]].sized_by_platform:
        y, executed = run("cpu", *args)
        return ExpertsOutput(y=y, slots_executed=executed, implementation=names["cpu"])
    on_tpu, on_cuda = functools.partial(run, "tpu"), functools.partial(run, "cuda")
    y, executed = jax.lax.platform_dependent(
        *args,
        tpu=on_tpu,
        # One trace serves both, as the kernel of `grouped` is chosen while it is lowered.
        cuda=on_tpu if names["tpu"] == names["cuda"] == "grouped" else on_cuda,
        default=functools.partial(run, "cpu"),
    )
    return ExpertsOutput(y=y, slots_executed=executed, implementation=_by_platform(names))


def _by_platform(names: dict[str, str]) -> str:
    """What runs on which platform.

    Example:
        >>> _by_platform({"cpu": "tiered", "tpu": "grouped", "cuda": "grouped"})
        'tiered (cpu), grouped (tpu, cuda)'
        >>> _by_platform({"cpu": "dense", "tpu": "dense", "cuda": "dense"})
        'dense'
    """
    platforms: dict[str, list[str]] = {}
    for platform, name in names.items():
        platforms.setdefault(name, []).append(platform)
    if len(platforms) == 1:
        return names["cpu"]
    return ", ".join(f"{name} ({', '.join(where)})" for name, where in platforms.items())
