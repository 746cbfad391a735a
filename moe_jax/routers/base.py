"""The contract of routing rules: frozen values with pure functions."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, TypeVar

import jax.numpy as jnp

from moe_jax.checks import NamedArguments, check_instance, check_k
from moe_jax.routers import registry
from moe_jax.routers.arguments import check_arguments_of
from moe_jax.routing.difficulty import Context
from moe_jax.routing.gate import Gate
from moe_jax.routing.losses import Axes
from moe_jax.types import Array, ExpertChoice, Params, Routing, RoutingStats, pytree

BUDGETS = ("exact", "expected", "none")
State = TypeVar("State")  # the state of a rule: what goes in comes out


@pytree
class NoState:
    """The state of a rule that learns nothing without gradients."""


@pytree
class BiasState:
    """The state of a rule that learns a selection bias and nothing else.

    The bias means the same in every such rule, so the state of a trained ``TopK`` also serves
    ``Piggyback`` or ``SharedBudget``.
    """

    expert_bias: Array  # f32[E], added for selection only; interop rules have one for each class


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What a rule promises; property tests hold it to each of these.

    Attributes:
        causal: a token's routing does not depend on later tokens.
        batch_invariant: a token's routing does not depend on any other token.
        may_leave_token_empty: a real token may end with no expert.
        budget: ``exact`` (fixed mean k by construction), ``expected`` (held on average, by
            calibration or a controller), or ``none``.

    Example:
        >>> from moe_jax import MinP
        >>> MinP(num_experts=8, max_k=2).traits.budget
        'expected'
    """

    causal: bool
    batch_invariant: bool
    may_leave_token_empty: bool
    budget: str


class Router(NamedArguments, abc.ABC):
    """The contract of a routing rule.

    A rule is a frozen dataclass in a file of its own: hashable, equal by value and writable as JSON by
    its fields, so an equal router rebuilt elsewhere hits the same ``jit`` cache entry. Printed, it
    shows the fields that differ from their defaults. Fields are Python values (static); what
    calibration or a controller changes is in the state (arrays).

    Classes are abstract or final. A contract that rules share lists ``abc.ABC`` among its bases, as
    ``TokenChoice`` does; every other class is a rule, must be complete, and has no subclasses.

    Raises:
        TypeError: when a class is defined that inherits from a rule, or a rule that lacks a method.

    Example:
        >>> import jax.numpy as jnp
        >>> from moe_jax import TopK
        >>> router = TopK(num_experts=4, k=2)
        >>> params, state = router.init(jax.random.key(0), 8), router.init_state()
        >>> router(params, state, jnp.ones((3, 8))).expert_indices.shape
        (3, 2)
    """

    num_experts: int
    min_k: int  # fewest experts a real token uses
    max_k: int  # K: most experts one token may use
    gate: Gate

    # Keys that the rule reads from `context` beyond difficulty.CONTEXT_KEYS; None is any.
    context_keys: ClassVar[frozenset[str] | None] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_arguments_of(cls)
        if abc.ABC in cls.__bases__:
            return
        for base in cls.__mro__[1:]:
            if issubclass(base, Router) and abc.ABC not in base.__bases__:
                raise TypeError(
                    f"{cls.__name__}: expected a direct subclass of Router or TokenChoice, got one of "
                    f"the rule {base.__name__}. Rules are final: compose Gate, Scoring and the "
                    "functions in selection instead."
                )
        # Only now does the class exist in full; ABCMeta would complain at the first instance.
        missing = sorted(
            name
            for name in dir(cls)
            if getattr(getattr(cls, name, None), "__isabstractmethod__", False)
        )
        if missing:
            raise TypeError(
                f"{cls.__name__}: expected a complete rule, but these are missing: "
                f"{', '.join(missing)}. Define them as in docs/write_a_rule.md, or add abc.ABC to the "
                "bases of a contract that rules share."
            )
        cls.__repr__ = Router.__repr__  # the dataclass decorator keeps a __repr__ that exists
        registry.register_rule(cls)

    def __post_init__(self) -> None:
        """Checks what all rules share. ``max_k=None`` becomes E.

        A rule with further checks calls ``super().__post_init__()`` first.
        """
        check_declared(self, "num_experts", "min_k", "max_k", "gate")
        check_instance("gate", self.gate, Gate, fix="Write Gate(use_bias=True), for example.")
        if self.max_k is None:
            object.__setattr__(self, "max_k", self.num_experts)
        check_k(num_experts=self.num_experts, min_k=self.min_k, max_k=self.max_k)
        self.gate.check(num_experts=self.num_experts, k=self.min_k)

    def __repr__(self) -> str:
        return registry.short_repr(self)

    # --- what a rule says of itself

    @property
    @abc.abstractmethod
    def traits(self) -> Traits:
        """What the rule promises."""

    # --- what a rule does

    def init(self, key: Array, d_model: int) -> Params:
        """Router parameters for tokens of width ``d_model``; plain dict of f32 arrays."""
        return self.gate.init(key, d_model=d_model, num_experts=self.num_experts)

    @abc.abstractmethod
    def init_state(self) -> Any:
        """What is learned without gradients: a frozen dataclass of arrays, under 4 KB."""

    @abc.abstractmethod
    def __call__(
        self,
        params: Params,
        state: Any,
        x: Array,
        *,
        key: Array | None = None,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Routing | ExpertChoice:
        """Routes tokens.

        Args:
            params: from ``init``.
            state: from ``init_state``, ``fit`` or ``update``.
            x: float[T, D].
            key: randomness for the gate's noise; None means none.
            token_mask: bool[T], False for padding, which then counts in nothing.
            context: what difficulty estimators may need beyond x, see ``difficulty.CONTEXT_KEYS``.

        Raises:
            TypeError: a state of another class; a key that is not one JAX key; a wrong dtype.
            ValueError: a state, parameters or tokens of other sizes; an unknown key in ``context``.
        """

    def observe(self, state: Any, routing: Routing | ExpertChoice) -> Array:
        """f32[E] or f32[E, B]: what ``update`` needs of a batch beyond counts.

        Shards' values are averaged, weighted by their tokens.

        ``state`` is the one that the batch was routed with.
        """
        return jnp.zeros((self.num_experts,), jnp.float32)

    def regularization(
        self,
        params: Params,
        state: Any,
        routing: Routing | ExpertChoice,
        *,
        axis_name: Axes = None,
    ) -> Array:
        """f32[]: what the rule's authors add to the training loss, coefficients included; 0 by default.

        For what belongs to one rule alone, or reads its parameters or state. What holds of any routing
        is in ``losses.aux_loss``. ``axis_name`` is as there.
        """
        return jnp.zeros((), jnp.float32)

    def update(self, state: Any, stats: RoutingStats) -> Any:
        """The state after a training batch with these statistics. By default the same state.

        Raises:
            TypeError: ``stats`` is not ``RoutingStats``, or the state is of another class.
            ValueError: the state or the statistics are of another number of experts.
        """
        return state

    def fit(
        self,
        params: Params,
        state: State,
        x: Array,
        *,
        target_mean_k: float,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> State:
        """Calibrates the state so that tokens like x [T, D] use ``target_mean_k`` experts on average.

        Runs on the host, once. Provenance is recorded in ``state.fit``.

        Raises:
            TypeError: the rule has no budget to calibrate.
            ValueError: the target is out of reach, or x holds NaN or inf.
        """
        raise TypeError(
            f"fit: expected a rule with a budget to calibrate, got {type(self).__name__}, whose "
            f"budget is {self.traits.budget!r}. Use one of {', '.join(_calibrated_rules())}."
        )

    @classmethod
    def calibrates(cls) -> bool:
        """Whether rules of this class have a budget that ``fit`` calibrates."""
        return cls.fit is not Router.fit

    # --- the router as data

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object with ``kind`` and every field.

        Raises:
            TypeError: a field is a function, such as an estimator that is not registered.
        """
        return registry.to_json(self)

    def fingerprint(self) -> str:
        """Returns 32 hex digits over the kind and every field that differs from its default.

        Equal configurations have equal fingerprints, and a field that a later version adds, at its
        default, changes none.
        """
        return registry.fingerprint(self)


def check_declared(rule: Router, *names: str) -> None:
    """Raises TypeError if a rule lacks one of the fields (or properties) that every rule has."""
    # Of the class: reading a property may fail over a wrong value of another field.
    fields = {field.name for field in dataclasses.fields(rule)}  # pyright: ignore[reportArgumentType]
    missing = [name for name in names if name not in fields and not hasattr(type(rule), name)]
    if missing:
        raise TypeError(
            f"{type(rule).__name__}: expected the fields {', '.join(names)}, got none of "
            f"{', '.join(missing)}. Declare them as in docs/write_a_rule.md: min_k: int = 1."
        )


check_arguments_of(Router)  # for the methods that rules inherit


def router_from_json(data: dict[str, Any]) -> Router:
    """Returns the router that ``to_json`` described.

    Rules of single models (``moe_jax.interop.rules``) are imported when they are needed.

    Raises:
        ValueError: an unknown kind or field, or a missing field. The message lists the known ones.

    Example:
        >>> import moe_jax
        >>> router = moe_jax.TopK(num_experts=4, k=2)
        >>> router_from_json(router.to_json()) == router
        True
    """
    return registry.from_json(data)


def _calibrated_rules() -> list[str]:
    return sorted(name for name, rule in registry.registered_rules().items() if rule.calibrates())
