"""Ways of running experts. Each is a file; each obeys the plan; each equals the dense oracle.

``implementation=None`` lets ``choose`` decide, a name asks for one, a tuple of names takes the
first that does not refuse. A new implementation is one file and one line in ``_ALL``.
"""

from __future__ import annotations

import jax

from moe_jax.checks import check_array
from moe_jax.experts.active import ACTIVE
from moe_jax.experts.base import Implementation, num_experts_of
from moe_jax.experts.capacity import CAPACITY
from moe_jax.experts.dense import DENSE
from moe_jax.experts.feed_forward import ACTIVATIONS, ExpertFn, FeedForward
from moe_jax.experts.ragged import RAGGED
from moe_jax.experts.tiered import TIERED
from moe_jax.types import Array, DispatchPlan, Params

_ALL = (ACTIVE, RAGGED, TIERED, CAPACITY, DENSE)  # in order of preference
IMPLEMENTATIONS: dict[str, Implementation] = {i.name: i for i in _ALL}

__all__ = [
    "ACTIVATIONS",
    "IMPLEMENTATIONS",
    "ExpertFn",
    "FeedForward",
    "Implementation",
    "choose",
    "explain_choice",
    "run_experts",
]


def explain_choice(
    plan: DispatchPlan,
    implementation: str | tuple[str, ...] | None = None,
    *,
    expert_fn: ExpertFn = FeedForward(),
    backend: str | None = None,
) -> list[tuple[str, str]]:
    """What each candidate says: ``[(name, "chosen" | reason)]``, in order of preference.

    A single name is chosen whatever it says, since the caller asked for it.
    """
    backend = backend or jax.default_backend()
    if isinstance(implementation, str):
        _known((implementation,))
        return [(implementation, "chosen")]
    names = tuple(IMPLEMENTATIONS) if implementation is None else implementation
    _known(names)
    told: list[tuple[str, str]] = []
    chosen = False
    for name in names:
        reason = IMPLEMENTATIONS[name].refuse(expert_fn, plan, backend)
        if reason is None and not chosen:
            told.append((name, "chosen"))
            chosen = True
        else:
            told.append((name, reason or "not needed: an earlier one was chosen"))
    return told


def choose(
    plan: DispatchPlan,
    implementation: str | tuple[str, ...] | None = None,
    *,
    expert_fn: ExpertFn = FeedForward(),
    backend: str | None = None,
) -> Implementation:
    """The implementation that ``explain_choice`` marks as chosen.

    Raises:
        ValueError: an unknown name, or every candidate refused; the reasons are in the message.
    """
    told = explain_choice(plan, implementation, expert_fn=expert_fn, backend=backend)
    for name, reason in told:
        if reason == "chosen":
            return IMPLEMENTATIONS[name]
    reasons = "; ".join(f"{name}: {reason}" for name, reason in told)
    raise ValueError(
        f"implementation: expected one that runs here, got {implementation!r} ({reasons}). "
        "Name a single one to insist on it."
    )


def _known(names: tuple[str, ...]) -> None:
    unknown = [n for n in names if n not in IMPLEMENTATIONS]
    if unknown:
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
) -> Array:
    """Runs the plan: ``y[t] = sum of weights[n] * expert(x[t])`` over the kept assignments of t.

    Args:
        expert_fn: one expert, see ``ExpertFn``.
        params: expert parameters with a leading axis E.
        x: float[T, D].
        plan: from ``plan_dispatch``.
        weights: f32[N], from ``kept_weights``.
        implementation: None, a name, or names in order of preference.

    Returns:
        f32[T, D_out].

    Raises:
        ValueError: shapes disagree with the plan, or no implementation fits.
    """
    a = plan.assignments
    check_array(
        "x", x, "T D", sizes={"T": a.num_tokens},
        fix="Pass the tokens that were routed, flattened to [tokens, width].",
    )  # fmt: skip
    if num_experts_of(params) != a.num_experts:
        raise ValueError(
            f"expert params: expected a leading axis of E={a.num_experts}, "
            f"got {num_experts_of(params)}. Initialise as many experts as the router has."
        )
    chosen = choose(plan, implementation, expert_fn=expert_fn)
    return chosen.run(expert_fn, params, x, plan, weights)
