"""Makes trained fixed-k blocks dynamic: fits them to a budget and reports what that changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from moe_jax.checks import check_number
from moe_jax.interop.blocks import MoEBlock
from moe_jax.interop.budget_shares import shared_budget
from moe_jax.routers import Router, TopK
from moe_jax.routers.twin import control_twin, dynamic_twin, fit_twin
from moe_jax.routing.budget import mean_k_after
from moe_jax.types import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrofitReport:
    """The effect of making one block dynamic, on tokens that the fit did not see. Host values.

    Changes are relative: ``|y_dynamic - y_trained| / |y_trained|`` over all held-out tokens. The
    controls drop as many experts without looking at the token: see ``RandomSkip``.
    """

    rule: str
    trained_k: int
    target_mean_k: float
    calibration_mean_k: float
    held_out_mean_k: float
    histogram: tuple[float, ...]  # share of held-out tokens that use 0..K experts
    output_change: float
    random_control_change: float  # random experts dropped
    lowest_control_change: float  # the lowest-ranked expert of random tokens dropped

    @property
    def saving(self) -> float:
        """Share of expert calls saved against the trained k."""
        return 1.0 - self.held_out_mean_k / self.trained_k

    def summary(self) -> str:
        """Two lines for people."""
        bars = " ".join(f"{k}:{share:.0%}" for k, share in enumerate(self.histogram) if share)
        return (
            f"{self.rule}: {self.held_out_mean_k:.3f} of {self.trained_k} experts a token "
            f"({self.saving:+.1%} calls saved; target {self.target_mean_k:.3f}; {bars})\n"
            f"output changes by {self.output_change:.2%}; dropping as many without looking: "
            f"{self.lowest_control_change:.2%} (lowest), {self.random_control_change:.2%} (random)"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ModelRetrofitReport(Mapping[str, RetrofitReport]):
    """The effect of making a model dynamic: of the whole, and by block name those of its blocks.

    Attributes:
        trained_k: of every block.
        target_mean_k: the mean over all blocks that was asked for.
        calibration_mean_k: the mean over all blocks on the tokens of the fit, with the trained k for
            those that stay as they are.
        held_out_mean_k: the same on held-out tokens.
        num_blocks: how many blocks the model has.
        blocks: reports of those that were made dynamic.
    """

    trained_k: int
    target_mean_k: float
    calibration_mean_k: float
    held_out_mean_k: float
    num_blocks: int
    blocks: Mapping[str, RetrofitReport]

    def __getitem__(self, name: str) -> RetrofitReport:
        return self.blocks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def saving(self) -> float:
        """Share of the model's expert calls saved against the trained k."""
        return 1.0 - self.held_out_mean_k / self.trained_k

    def summary(self) -> str:
        """One line for the model, then two for each dynamic block."""
        whole = (
            f"{self.held_out_mean_k:.3f} of {self.trained_k} experts a token over {self.num_blocks} "
            f"blocks ({self.saving:+.1%} calls saved; target {self.target_mean_k:.3f}); "
            f"{self.num_blocks - len(self)} blocks stay as they are"
        )
        return "\n".join([whole, *(f"{name}: {r.summary()}" for name, r in self.blocks.items())])


def make_dynamic(
    block: MoEBlock,
    calibration_x: Array,
    *,
    target_mean_k: float | None = None,
    target_saving: float | None = None,
    rule: str | Router | type[Router] = "TopP",
    max_k: int | None = None,
    elastic: bool = False,
    held_out_x: Array | None = None,
    difficulty: str = "router_entropy",
) -> tuple[MoEBlock, RetrofitReport]:
    """Returns a dynamic twin of a trained block, fitted to a budget, and a report of what changed.

    The twin has the same parameters, gate, scoring and selection bias. The provenance of its
    thresholds is in ``twin.state.fit``. (Gemma 4's factor on the weights of each expert moves into
    the expert's last projection, where it does the same.)

    Args:
        block: from ``moe_block_from_hf`` or ``load_hf_block``, with a ``TopK`` rule.
        calibration_x: float[..., D], real inputs of the block.
        target_mean_k: experts per token on average.
        target_saving: share of expert calls to save against the trained k, instead of
            ``target_mean_k``.
        rule: ``TopP``, ``MinP``, ``DynamicK`` or ``ExpertThreshold``; or a rule of your own, its class
            or ``module:Class``, see ``moe_jax.routers.twin.dynamic_twin``.
        max_k: most experts one token may use; the trained k by default.
        elastic: allow ``max_k`` above the trained k. A model that was not trained for it gets worse
            there ("inference-time scaling wall", arXiv:2509.21892).
        held_out_x: inputs to measure on; by default the last fifth of ``calibration_x``, which the
            fit then does not see.
        difficulty: estimator for ``DynamicK``.

    Raises:
        ValueError: a block without a fixed-k rule, no or two targets, a target out of reach,
            ``max_k`` above the trained k without ``elastic``, inputs that are not finite, or a rule
            that cannot express the block's scoring.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> shapes = {"gate.weight": (4, 8), "experts.gate_up_proj": (4, 12, 8),
        ...           "experts.down_proj": (4, 8, 6)}
        >>> from moe_jax.interop import moe_block_from_hf
        >>> block = moe_block_from_hf(
        ...     {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
        ...     {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()})
        >>> x = rng.normal(size=(1000, 8)).astype(np.float32)
        >>> dynamic, report = make_dynamic(block, x, target_saving=0.2)
        >>> report.trained_k, round(report.calibration_mean_k, 2)
        (2, 1.6)
    """
    trained = fixed_rule(block)
    target = target_of(trained.k, target_mean_k, target_saving)
    most = trained.k if max_k is None else max_k
    if most > trained.k and not elastic:
        raise ValueError(
            f"max_k: expected at most the trained k={trained.k}, got {most}. A model gets worse "
            "with experts it was not trained to combine; pass elastic=True if this one was."
        )
    fit_x, test_x = _split(calibration_x, held_out_x)
    if trained.use_expert_scale:
        block, trained = fold_expert_scale(block)
    router = dynamic_twin(trained, rule, target_mean_k=target, max_k=most, difficulty=difficulty)
    twin = _with_rule(block, router, fit_x, target)
    # Two controls of the same mean, which do not look at the token: the change of the rule's output
    # means something only beside theirs.
    low = _control(block, trained, "lowest", fit_x, target)
    random = _control(block, trained, "random", fit_x, target)
    y = block(test_x)
    routing = twin.route(test_x)
    counts = np.asarray(routing.num_experts_per_token)
    histogram = np.bincount(counts, minlength=router.max_k + 1) / counts.size
    report = RetrofitReport(
        rule=rule if isinstance(rule, str) else type(router).__name__,
        trained_k=trained.k,
        target_mean_k=target,
        calibration_mean_k=float(twin.state.fit.achieved_mean_k),
        held_out_mean_k=float(counts.mean()),
        histogram=tuple(float(h) for h in histogram),
        output_change=_change(y, twin(test_x)),
        random_control_change=_change(y, random(test_x)),
        lowest_control_change=_change(y, low(test_x)),
    )
    return twin, report


def make_model_dynamic(
    blocks: Mapping[str, MoEBlock],
    calibration_x: Mapping[str, Array],
    *,
    target_mean_k: float | None = None,
    target_saving: float | None = None,
    rule: str | Router | type[Router] = "TopP",
    steps: int = 8,
    **options: Any,
) -> tuple[dict[str, MoEBlock], ModelRetrofitReport]:
    """Makes all blocks of a model dynamic under one budget, spent where it changes least.

    Each block's sensitivity is measured: the squared output change at ``steps`` budgets between 1 and
    the trained k. Starting from the trained k everywhere, the block whose output changes least by it
    takes the next step down, until the steps save at least what was asked for; then every saving is
    scaled so that the mean over blocks is the target. Blocks that stay at their trained k are
    returned as they are, without a report of their own.

    Args:
        blocks: by layer name; all with the same trained k.
        calibration_x: each block's inputs, float[..., D].
        target_mean_k, target_saving: the mean over blocks; give one of the two.
        rule: as in ``make_dynamic``.
        steps: resolution of a block's budget.
        **options: further arguments of ``make_dynamic``.

    Returns:
        The blocks, and a report of the whole, which maps a block's name to its report.

    Raises:
        ValueError: as ``make_dynamic``; or blocks of different k, or inputs missing.
    """
    rules = {name: fixed_rule(block) for name, block in blocks.items()}
    ks = sorted({r.k for r in rules.values()})
    if len(ks) != 1 or set(calibration_x) != set(blocks):
        raise ValueError(
            f"blocks: expected one trained k and inputs for each of {sorted(blocks)}, got k={ks} and "
            f"inputs for {sorted(calibration_x)}. Split the model by k, and give every block's inputs."
        )
    if steps < 2:
        raise ValueError(
            f"steps: expected at least 2, got {steps}. 8 measures seven budgets a block."
        )
    k = ks[0]
    target = target_of(next(iter(rules.values())).k, target_mean_k, target_saving)
    # Without the ends: k changes nothing, and a mean of 1 is no budget that a fit accepts.
    grid = np.linspace(k, 1.0, steps + 1)[1:-1]
    curves: dict[str, list[float]] = {}
    for name, block in blocks.items():
        changes = [
            make_dynamic(block, calibration_x[name], target_mean_k=float(m), rule=rule, **options)[
                1
            ].output_change
            for m in grid
        ]
        # Squares, because independent changes of several blocks add up so. A fit may happen to change
        # less at a lower budget; sharing by the cheapest step needs curves that do not fall.
        curves[name] = [0.0, *(c * c for c in np.maximum.accumulate(changes))]
    means = shared_budget(curves, k=k, target_mean_k=target)
    dynamic: dict[str, MoEBlock] = {}
    reports: dict[str, RetrofitReport] = {}
    for name, block in blocks.items():
        mean_k = means[name]
        if mean_k == k:
            dynamic[name] = block
            continue
        dynamic[name], reports[name] = make_dynamic(
            block, calibration_x[name], target_mean_k=mean_k, rule=rule, **options
        )
    unchanged = k * (len(blocks) - len(reports))
    return dynamic, ModelRetrofitReport(
        trained_k=k,
        target_mean_k=target,
        calibration_mean_k=(unchanged + sum(r.calibration_mean_k for r in reports.values()))
        / len(blocks),
        held_out_mean_k=(unchanged + sum(r.held_out_mean_k for r in reports.values()))
        / len(blocks),
        num_blocks=len(blocks),
        blocks=reports,
    )


class DriftMonitor:
    """Watches whether a dynamic block's mean k stays in its band, and returns to the trained block.

    Thresholds calibrated on one kind of input drift on another: top-p at 2.0 experts gave 3.13 at
    half the input scale. The monitor holds an exponential average of the mean; outside the band
    ``block`` is the static block, until ``reset``.

    Args:
        static: the trained fixed-k block.
        dynamic: its twin from ``make_dynamic``.
        band: tolerated relative distance from the fitted mean.
        decay: of the average, per batch.

    Example:
        >>> monitor = DriftMonitor(static="static", dynamic="dynamic", target_mean_k=1.6)
        >>> monitor.observe(1.61), monitor.block
        (True, 'dynamic')
        >>> monitor.observe(4.0), monitor.block
        (False, 'static')
    """

    def __init__(
        self,
        *,
        static: Any,
        dynamic: Any,
        target_mean_k: float | None = None,
        band: float = 0.1,
        decay: float = 0.9,
    ) -> None:
        check_number("band", band)
        check_number("decay", decay)
        if not band > 0 or not 0 <= decay < 1:
            raise ValueError(
                f"band, decay: expected band > 0 and 0 <= decay < 1, got {band}, {decay}. "
                "A band of 0.1 tolerates a tenth more or less than the fitted mean."
            )
        self._static, self._dynamic = static, dynamic
        if target_mean_k is None:
            fit = dynamic.state.fit
            target_mean_k = float(fit.achieved_mean_k) if fit.describe()["fitted"] else 0.0
        check_number("target_mean_k", target_mean_k)
        if not target_mean_k > 0:
            raise ValueError(
                f"target_mean_k: expected above 0, got {target_mean_k}. Fit the dynamic block first "
                "(make_dynamic), or state the mean that it should have."
            )
        self.target_mean_k = target_mean_k
        self._band, self._decay = band, decay
        self.reset()

    def reset(self) -> None:
        """Forgets what was seen and trusts the dynamic block again."""
        self.mean_k = self.target_mean_k
        self.tripped = False

    def observe(self, mean_experts_per_token: Any) -> bool:
        """Takes a batch's mean, for instance ``stats.mean_experts_per_token``; False once tripped."""
        value = float(mean_experts_per_token)
        self.mean_k = self._decay * self.mean_k + (1.0 - self._decay) * value
        # "Not inside" instead of "outside", so that NaN trips it too.
        if not abs(self.mean_k / self.target_mean_k - 1.0) <= self._band:
            self.tripped = True
        return not self.tripped

    @property
    def block(self) -> Any:
        """The block to use now."""
        return self._static if self.tripped else self._dynamic


def fixed_rule(block: MoEBlock) -> TopK:
    """The rule of a block as it was trained.

    Raises:
        ValueError: the block has another rule than ``TopK``.
    """
    return fixed_k(block.router)


def fixed_k(router: Router) -> TopK:
    """Returns the rule of a block if it is ``TopK``.

    Raises:
        ValueError: another rule.
    """
    if not isinstance(router, TopK):
        raise ValueError(
            f"block: expected one with a fixed k (TopK), got {type(router).__name__}. "
            "Start from the block as it was trained."
        )
    return router


def target_of(trained_k: int, mean_k: float | None, saving: float | None) -> float:
    """The mean k that one of ``mean_k`` and ``saving`` asks of a block trained with ``trained_k``.

    Raises:
        ValueError: no or two targets, or one out of reach.
    """
    if (mean_k is None) == (saving is None):
        raise ValueError(
            f"target: expected one of target_mean_k and target_saving, got {mean_k} and {saving}. "
            "target_saving=0.2 keeps 80 % of the expert calls."
        )
    if saving is not None and trained_k > 1:
        return mean_k_after(float(saving), min_k=1, trained_k=trained_k)
    target = trained_k if mean_k is None else float(mean_k)
    if not 1.0 < target < trained_k:
        raise ValueError(
            f"target: expected a mean strictly between 1 and the trained k={trained_k}, got "
            f"{target:g}. A block trained with k=1 cannot use fewer."
        )
    return target


def _with_rule(block: MoEBlock, router: Router, x: Array, target: float) -> MoEBlock:
    flat = jnp.asarray(x).reshape(-1, x.shape[-1])
    fitted = fit_twin(router, block.params["router"], block.state, flat, target_mean_k=target)
    return dataclasses.replace(block, router=router, state=fitted)


def _control(block: MoEBlock, trained: TopK, drop: str, x: Array, target: float) -> MoEBlock:
    return _with_rule(block, control_twin(trained, drop, mean_k=target), x, target)


def fold_expert_scale(block: MoEBlock) -> tuple[MoEBlock, TopK]:
    """The same block without a factor per expert: its last projection is multiplied instead."""
    router = dataclasses.replace(fixed_rule(block), use_expert_scale=False)
    rest = dict(block.params["router"])
    scale = rest.pop("expert_scale").astype(jnp.float32)
    experts = dict(block.params["experts"])
    for name in [n for n in ("down", "down_bias") if n in experts]:
        old = experts[name]
        factor = scale.reshape((-1,) + (1,) * (old.ndim - 1))
        experts[name] = (old.astype(jnp.float32) * factor).astype(old.dtype)
    params = {**block.params, "router": rest, "experts": experts}
    return dataclasses.replace(block, params=params, router=router), router


def _split(x: Array, held_out: Array | None) -> tuple[Array, Array]:
    if held_out is not None:
        if not np.isfinite(np.asarray(held_out).astype(np.float32)).all():
            raise ValueError(
                "held_out_x: expected finite inputs of the block, got NaN or inf. Drop those tokens."
            )
        return x, held_out
    flat = jnp.asarray(x).reshape(-1, x.shape[-1])
    if flat.shape[0] < 10:
        raise ValueError(
            f"calibration_x: expected at least 10 tokens, got {flat.shape[0]}. Give real inputs of "
            "the block, thousands if you have them."
        )
    # The end of the text, not a random fifth: neighbouring tokens are alike, and a random token
    # would have its neighbours among those fitted on.
    cut = flat.shape[0] * 4 // 5
    return _split(flat[:cut], flat[cut:])


def _change(before: Array, after: Array) -> float:
    before, after = before.astype(jnp.float32), after.astype(jnp.float32)
    return float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before))
