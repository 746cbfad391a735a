"""What every rule is: a frozen value with pure functions."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.routing.budget import Fit, record_fit
from moe_jax.routing.difficulty import Context
from moe_jax.routing.gate import Gate
from moe_jax.routing.losses import Axes
from moe_jax.routing.scoring import Scoring
from moe_jax.routing.selection import top_slots
from moe_jax.types import (
    Array,
    ExpertChoice,
    Params,
    Routing,
    RoutingStats,
    pytree,
)

BUDGETS = ("exact", "expected", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traits:
    """What a rule promises; property tests hold it to each of these.

    Attributes:
        causal: a token's routing does not depend on later tokens.
        batch_invariant: a token's routing does not depend on any other token.
        may_leave_token_empty: a real token may end with no expert.
        budget: ``exact`` (fixed mean k by construction), ``expected`` (held on average, by
            calibration or a controller), or ``none``.
    """

    causal: bool
    batch_invariant: bool
    may_leave_token_empty: bool
    budget: str


def _of_statistics(update: Callable[..., Any]) -> Callable[..., Any]:
    """A rule's ``update`` that refuses anything but statistics, say all that a layer reports."""

    @functools.wraps(update)
    def checked(self: Router, state: Any, stats: RoutingStats) -> Any:
        if not isinstance(stats, RoutingStats):
            raise TypeError(
                f"stats: expected RoutingStats, got a {type(stats).__name__}. Pass aux.stats of what "
                "moe_layer returned, or what routing_stats returns."
            )
        return update(self, state, stats)

    return checked


class Router(abc.ABC):
    """An abstract rule. A concrete one is a frozen dataclass in a file of its own, and final.

    Being a frozen dataclass makes it hashable, equal by value and writable as JSON by its fields, so an
    equal router rebuilt elsewhere hits the same ``jit`` cache entry. Printed, it shows the fields that
    differ from their defaults. Fields are Python
    values (static); what calibration or a controller changes is in the state (arrays).
    """

    num_experts: int
    min_k: int  # fewest experts a real token uses
    max_k: int  # K: most experts one token may use
    gate: Gate
    kinds: ClassVar[dict[str, type[Router]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__bases__ != (Router,):
            raise TypeError(
                f"{cls.__name__}: expected a direct subclass of Router, got bases {cls.__bases__}. "
                "Rules are final: compose Gate, Scoring and the functions in selection instead."
            )
        cls.__repr__ = Router.__repr__  # a dataclass keeps one that is there
        if "update" in vars(cls):
            cls.update = _of_statistics(cls.update)
        # The last definition wins, so that a notebook cell may be run again.
        Router.kinds[cls.__name__] = cls

    def __repr__(self) -> str:
        return short_repr(self)

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
            context: what difficulty estimators may need beyond x.
        """

    def observe(self, state: Any, routing: Routing | ExpertChoice) -> Array:
        """f32[E]: what ``update`` needs of a batch beyond counts; may be averaged over shards.

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

    @_of_statistics
    def update(self, state: Any, stats: RoutingStats) -> Any:
        """The state after a training batch with these statistics. By default the same state.

        Raises:
            TypeError: ``stats`` is no ``RoutingStats``.
        """
        return state

    def fit(
        self,
        params: Params,
        state: Any,
        x: Array,
        *,
        target_mean_k: float,
        token_mask: Array | None = None,
        context: Context | None = None,
    ) -> Any:
        """Calibrates the state so that tokens like x [T, D] use ``target_mean_k`` experts on average.

        Host-side, once. Provenance is recorded in ``state.fit``.

        Raises:
            TypeError: the rule has no budget to calibrate.
            ValueError: the target is out of reach, or x holds NaN or inf.
        """
        fitted = sorted(name for name, rule in Router.kinds.items() if rule.fit is not Router.fit)
        raise TypeError(
            f"fit: expected a rule with a budget to calibrate, got {type(self).__name__}, whose "
            f"budget is {self.traits.budget!r}. Use one of {', '.join(fitted)}."
        )

    # --- the router as data

    def to_json(self) -> dict[str, Any]:
        """A JSON object with ``kind`` and every field.

        Raises:
            TypeError: a field is a function (say an unregistered estimator).
        """
        return {"kind": type(self).__name__, **_to_json(self)}

    def fingerprint(self) -> str:
        """32 hex digits over the kind and every field that differs from its default.

        Equal configurations have equal fingerprints, and a field that a later version adds, at its
        default, changes none.
        """
        self.to_json()  # raises where a field is a function
        return hashlib.sha256(_identity(self).encode()).hexdigest()[:32]


def short_repr(value: Any) -> str:
    """A frozen dataclass with only the fields that differ from their defaults; values inside alike.

    Example:
        >>> short_repr(Scoring(norm="sum"))
        "Scoring(norm='sum')"
    """
    shown = []
    for f in dataclasses.fields(value):
        v = getattr(value, f.name)
        if v == f.default:
            continue
        shown.append(f"{f.name}={short_repr(v) if dataclasses.is_dataclass(v) else repr(v)}")
    return f"{type(value).__name__}({', '.join(shown)})"


def router_from_json(data: dict[str, Any]) -> Router:
    """The router that ``to_json`` described.

    Raises:
        ValueError: an unknown kind or field, or a missing one; known ones are listed.

    Example:
        >>> import moe_jax
        >>> router = moe_jax.TopK(num_experts=4, k=2)
        >>> router_from_json(router.to_json()) == router
        True
    """
    if not isinstance(data, dict):
        raise ValueError(
            f"router: expected a JSON object with 'kind', got a {type(data).__name__}. "
            "Pass what to_json returned."
        )
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in Router.kinds:
        raise ValueError(
            f"router kind: expected one of {', '.join(sorted(Router.kinds))}, got {kind!r}. "
            "Import the module that defines it first: your own, or moe_jax.interop.rules for the "
            "rules of single models."
        )
    return _from_json(Router.kinds[kind], fields)


def _to_json(value: Any) -> dict[str, Any]:
    out = {}
    for f in dataclasses.fields(value):
        v = getattr(value, f.name)
        if dataclasses.is_dataclass(v):
            v = _to_json(v)
        elif callable(v):
            raise TypeError(
                f"{f.name}: expected a value that JSON can hold, got the function {v!r}. "
                "Register it (moe_jax.routing.difficulty.register_estimator) and refer to it by name."
            )
        elif isinstance(v, tuple):
            v = list(v)
        out[f.name] = v
    return out


def _identity(router: Router) -> str:
    """The router as text that is the same in every process; functions by their name."""

    def changed(value: Any) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for f in dataclasses.fields(value):
            v = getattr(value, f.name)
            if v == f.default:
                continue
            if dataclasses.is_dataclass(v):
                v = changed(v)
            elif callable(v):
                v = f"{v.__module__}.{getattr(v, '__qualname__', type(v).__qualname__)}"
            out[f.name] = v
        return out

    return json.dumps({"kind": type(router).__name__, **changed(router)}, sort_keys=True)


_NESTED: dict[str, type] = {"gate": Gate, "scoring": Scoring}


def _from_json(cls: type, data: dict[str, Any]) -> Any:
    names = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(data) - set(names))
    if unknown:
        raise ValueError(
            f"{cls.__name__}: expected fields among {', '.join(names)}, got {', '.join(unknown)}. "
            "Remove them, or use the version of the library that wrote them."
        )
    values = {}
    for name, v in data.items():
        if isinstance(v, dict) != (name in _NESTED):
            wanted = "an object" if name in _NESTED else "a plain value"
            raise ValueError(
                f"{cls.__name__}.{name}: expected {wanted}, got {v!r}. Write it as to_json does."
            )
        if isinstance(v, dict):
            v = _from_json(_NESTED[name], v)
        elif isinstance(v, list):
            v = tuple(v)
        values[name] = v
    try:
        return cls(**values)
    except TypeError as error:  # a field without default is missing
        raise ValueError(
            f"{cls.__name__}: expected the fields that to_json writes, got {sorted(values)}: "
            f"{str(error).rstrip('.')}. Add what is missing, or correct its type."
        ) from None


@pytree
class Slots:
    """A batch scored and sorted, before a rule decides how many slots each token uses."""

    logits: Array  # f32[T, E]
    probs: Array  # f32[T, E]
    indices: Array  # i32[T, K], best first
    scores: Array  # f32[T, K]: scores at the slots, which weights are made of
    slot_probs: Array  # f32[T, K]: probs at the slots


def score_slots(
    gate: Gate,
    scoring: Scoring,
    params: Params,
    x: Array,
    *,
    max_k: int,
    expert_bias: Array,
    key: Array | None,
    token_mask: Array | None,
) -> Slots:
    """The part that all token-choice rules share: logits, scores, the ``max_k`` best experts."""
    logits = gate(params, x, key=key, token_mask=token_mask)
    scores = scoring.scores(logits)
    probs = scoring.probs(scores)
    selection = gate.exclude(scoring.selection_scores(logits, scores, expert_bias))
    indices, _ = top_slots(selection, max_k)
    return Slots(
        logits=logits,
        probs=probs,
        indices=indices,
        scores=jnp.take_along_axis(scores, indices, axis=-1),
        slot_probs=jnp.take_along_axis(probs, indices, axis=-1),
    )


def real_tokens(token_mask: Array | None, x: Array) -> np.ndarray:
    """Host-side bool[T]; refuses calibration data without a finite real token."""
    mask = np.ones(x.shape[0], bool) if token_mask is None else np.asarray(token_mask)
    rows = np.asarray(x).astype(np.float32)[mask]
    if not mask.any():
        raise ValueError(
            "token_mask: expected at least one real token, got only padding. "
            "Calibrate on real tokens; True in the mask marks them."
        )
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(axis=-1)).sum())
        raise ValueError(
            f"x: expected finite calibration data, got {bad} of {len(rows)} tokens with NaN or "
            "inf. Drop those tokens, or mask them with token_mask."
        )
    return mask


def finish_fit(
    router: Router,
    params: Params,
    state: Any,
    x: Array,
    *,
    target_mean_k: float,
    token_mask: Array | None,
    context: Context | None,
) -> Any:
    """Routes the calibration data with the fitted state and records what was reached."""
    routing = jax.jit(type(router).__call__, static_argnums=0)(
        router, params, state, x, token_mask=token_mask, context=context
    )
    mask = np.ones(x.shape[0], bool) if token_mask is None else np.asarray(token_mask)
    counts = np.asarray(routing.num_experts_per_token)[mask]
    fit: Fit = record_fit(
        data=np.asarray(x)[mask],
        router_parts=(_identity(router), *[np.asarray(p) for p in jax.tree.leaves(params)]),
        target_mean_k=target_mean_k,
        counts=counts,
        max_k=router.max_k,
    )
    return dataclasses.replace(state, fit=fit)
