"""Counts the floating-point operations of a model's MoE layers, against a stated baseline."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import numpy as np

from moe_jax.checks import check_choice, check_instance, check_number
from moe_jax.routing.stats import BASELINES, FlopsReport, flops_report
from moe_jax.types import RoutingStats


class FLOPProfiler:
    """A context manager that counts operations of MoE layers, layer by layer.

    Given an NNX model, it watches every MoE layer while the context is open, inside ``jit`` or not.
    Without one, report what a layer returned with ``record``. Costs of routers and difficulty
    estimators are counted on the side of the layer, never hidden in the baseline.

    Args:
        model: an NNX model, or None.
        baseline: ``trained_k``, ``top_max``, ``dense`` or ``mean_k``: what savings are stated against.
        trained_k: for the baseline of that name.
        mean_k: for the baseline of that name: a budget in experts per token.
        estimator_flops_per_token: operations of the difficulty estimator, if it is not negligible.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from moe_jax import FeedForward
        >>> from moe_jax.nn.nnx import DynamicMoE
        >>> layer = DynamicMoE(8, FeedForward(), 1, 3, d_model=8, d_ff=16, rngs=nnx.Rngs(0))
        >>> with FLOPProfiler(layer, baseline="top_max") as profiler:
        ...     y = layer(jnp.ones((4, 8)))
        >>> profiler.total.baseline
        'top_max=3'
    """

    def __init__(
        self,
        model: Any = None,
        *,
        baseline: str,
        trained_k: int | None = None,
        mean_k: float | None = None,
        estimator_flops_per_token: float = 0.0,
    ) -> None:
        check_choice("baseline", baseline, BASELINES)
        # Refused now: later it would be raised from within a callback of the running model.
        needed = {"trained_k": trained_k, "mean_k": mean_k}
        if baseline in needed:
            if needed[baseline] is None:
                raise ValueError(
                    f"{baseline}: expected experts per token above 0 for baseline={baseline!r}, got "
                    f"None. Pass {baseline}=, or choose baseline='top_max' or 'dense'."
                )
            check_number(baseline, needed[baseline])
        self._model = model
        self._options: dict[str, Any] = {
            "baseline": baseline,
            "trained_k": trained_k,
            "mean_k": mean_k,
            "estimator_flops_per_token": estimator_flops_per_token,
        }
        self._reports: dict[str, list[FlopsReport]] = {}
        self._open = False
        self._watching: contextlib.AbstractContextManager[None] = contextlib.nullcontext()

    def __enter__(self) -> FLOPProfiler:
        if self._open:
            raise RuntimeError(
                "profiler: expected to be entered once at a time, got a second time while it is open. "
                "Use one FLOPProfiler for each context."
            )
        if self._model is not None:
            # Flax is only needed for this, and only for a model that already uses it.
            from moe_jax.nn.capture import check_has_layers, watching

            specs = {path: layer.spec for path, layer in check_has_layers(self._model).items()}

            def watch(path: str, x: Any, aux: Any) -> None:
                spec = specs[path]
                self.record(
                    path,
                    aux.stats,
                    d_model=spec.d_model,
                    max_k=spec.router.max_k,
                    flops_per_row=spec.flops_per_row(),
                    shared_flops_per_row=spec.shared_flops(),
                )

            self._watching = watching(self._model, watch)
        self._watching.__enter__()
        self._open = True
        return self

    def __exit__(self, *raised: Any) -> None:
        self._open = False
        self._watching.__exit__(*raised)

    def record(
        self,
        name: str,
        stats: RoutingStats,
        *,
        d_model: int,
        max_k: int,
        flops_per_row: float,
        shared_flops_per_row: float = 0.0,
    ) -> None:
        """Adds one call of the layer ``name`` with these statistics; see ``flops_report``."""
        check_instance(
            "stats", stats, RoutingStats, fix="Pass aux.stats of what the layer returned."
        )
        stats = jax.tree.map(np.asarray, stats)
        report = flops_report(
            stats, d_model=d_model, max_k=max_k, flops_per_row=flops_per_row, **self._options
        )
        # A shared expert runs on every token, under the baseline as well.
        shared = float(stats.token_count) * shared_flops_per_row
        report = dataclasses.replace(
            report,
            baseline_flops=report.baseline_flops + shared,
            used_flops=report.used_flops + shared,
            executed_flops=report.executed_flops + shared,
        )
        self._reports.setdefault(name, []).append(report)

    @property
    def per_layer(self) -> dict[str, FlopsReport]:
        """One report a layer, over all its calls."""
        return {name: _sum(reports) for name, reports in self._reports.items()}

    @property
    def total(self) -> FlopsReport:
        """One report over everything.

        Raises:
            ValueError: nothing was recorded.
        """
        reports = [r for layer in self._reports.values() for r in layer]
        if not reports:
            raise ValueError(
                "profiler: expected at least one recorded layer, got none. Run the model inside "
                "the context, or call record(name, aux.stats, ...)."
            )
        return _sum(reports)

    def summary(self) -> str:
        """A table for people: a line a layer, and the total."""
        lines = [f"{'layer':<24}{'GFLOP used':>12}{'executed':>12}{'baseline':>12}{'saved':>9}"]
        for name, r in [*self.per_layer.items(), ("total", self.total)]:
            lines.append(
                f"{name:<24}{r.used_flops / 1e9:>12.4f}{r.executed_flops / 1e9:>12.4f}"
                f"{r.baseline_flops / 1e9:>12.4f}{r.saving_used:>9.1%}"
            )
        lines.append(f"baseline: {self.total.baseline}; router and estimator counted as cost")
        if self._uncalibrated():
            lines.append(
                f"not calibrated: {', '.join(self._uncalibrated())}; an unfitted rule may sit near its "
                "most experts (fit_model, fit_router)"
            )
        return "\n".join(lines)

    def _uncalibrated(self) -> list[str]:
        """Layers of the model whose rule has a budget that was never fitted."""
        if self._model is None:
            return []
        from moe_jax.nn.capture import moe_layers

        states = {p: layer.router_state.get_value() for p, layer in moe_layers(self._model).items()}
        fits = {path: getattr(state, "fit", None) for path, state in states.items()}
        return [path for path, fit in fits.items() if fit and not fit.describe()["fitted"]]


def _sum(reports: list[FlopsReport]) -> FlopsReport:
    totals = {
        f.name: sum(getattr(r, f.name) for r in reports)
        for f in dataclasses.fields(FlopsReport)
        if f.name != "baseline"
    }
    names = list(dict.fromkeys(r.baseline for r in reports))
    # "top_max=3" where all layers agree, "top_max" where they do not.
    name = names[0] if len(names) == 1 else names[0].split("=")[0]
    return FlopsReport(baseline=name, **totals)
