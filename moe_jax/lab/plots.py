"""Pictures of routing, by matplotlib, and a page of text coloured by what each byte cost.

A function writes one file and returns its path; without a path a picture is returned as a matplotlib
``Figure``, which a notebook shows. Values are host arrays (NumPy). matplotlib is imported when a
picture is drawn, so importing this module costs nothing, and no window is opened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

# Okabe and Ito's colours, which colour-blind readers can distinguish; markers differ for print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "s", "D", "^", "v", "P")
_GREYS = (("#555555", "x"), ("#999999", "+"))
_INK, _FAINT = "#222222", "#DDDDDD"


def _figure(width: float, height: float, **kwargs: Any) -> tuple[Any, Any]:
    """Returns a figure without pyplot, which needs no display and changes no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(**kwargs)
    for ax in np.atleast_1d(axes).reshape(-1):
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#888888")
        ax.tick_params(colors=_INK, labelsize=9)
    return figure, axes


def _save(figure: Any, path: str | PathLike[str] | None) -> Any:
    if path is None:
        return figure
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def frontier(
    rows: Sequence[Mapping[str, Any]],
    path: str | PathLike[str] | None = None,
    *,
    equal_quality: float = 0.002,
) -> Any:
    """Draws what each saving costs, for every rule and control, with 95 % intervals.

    Args:
        rows: as ``moe_jax.lab.frontier.measure`` gives them; read are ``rule``, ``label``, ``control``,
            ``achieved_saving``, ``relative``, ``relative_low`` and ``relative_high``.
        path: of the PNG; None returns the figure instead.
        equal_quality: relative change up to which quality counts as equal.
    """
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    by_rule = {
        rule: sorted((r for r in rows if r["rule"] == rule), key=lambda r: r["achieved_saving"])
        for rule in rules
    }
    # A control may cost twenty times as much as the rules: it gets a panel with its own scale.
    highest = {rule: max(r["relative_high"] for r in by_rule[rule]) for rule in rules}
    near_top = 5 * min(sorted(highest.values())[len(rules) // 2 :])
    far = [rule for rule in rules if highest[rule] > near_top]
    figure, axes = _figure(
        8.2,
        6.4 if far else 5.2,
        nrows=2 if far else 1,
        sharex=True,
        squeeze=False,
        height_ratios=(1, 3.2) if far else (1,),
    )
    near = axes[-1, 0]
    plain = greys = 0
    ends = {}
    for number, rule in enumerate(rules):
        points = by_rule[rule]
        y = np.array([r["relative"] for r in points]) * 100
        low = y - np.array([r["relative_low"] for r in points]) * 100
        high = np.array([r["relative_high"] for r in points]) * 100 - y
        # Rules meet at the same savings; a small step aside keeps their intervals apart.
        aside = 0.15 * (number - (len(rules) - 1) / 2)
        x = np.array([r["achieved_saving"] for r in points]) * 100 + aside
        if points[0]["control"]:
            colour, marker = _GREYS[greys % len(_GREYS)]
            greys += 1
            style = "--"
        else:
            colour, marker = _COLOURS[plain % len(_COLOURS)], _MARKERS[plain % len(_MARKERS)]
            plain += 1
            style = "-"
        ax = axes[0, 0] if rule in far else near
        line = ax.errorbar(
            x,
            y,
            yerr=np.maximum([low, high], 0),
            color=colour,
            marker=marker,
            linestyle=style,
            markersize=6,
            linewidth=1.6,
            capsize=3,
            elinewidth=1.1,
            label=points[0]["label"],
        )
        ends[rule] = (y[-1], line)
    limit = 100 * equal_quality
    bottom, top = near.get_ylim()
    bottom, top = min(bottom, -0.25 * limit), max(top, 3 * limit)
    near.axhspan(bottom, limit, color="#009E73", alpha=0.10, linewidth=0)
    near.axhline(limit, color="#009E73", linewidth=1, linestyle=":")
    near.axhline(0, color="#888888", linewidth=0.8)
    near.set_ylim(bottom, top)
    near.annotate(
        f"equal quality: interval ends below +{limit:g} %",
        xy=(1, limit),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8,
        color="#00694D",
    )
    for ax in axes[:, 0]:
        ax.grid(axis="y", color=_FAINT, linewidth=0.7)
        ax.set_axisbelow(True)
    near.set_xlabel("expert activations saved on held-out files, % of the trained k", color=_INK)
    near.set_ylabel("change in bits per byte, %\n(95 % interval)", color=_INK)
    figure.suptitle("What a compute budget costs", x=0.01, ha="left", fontsize=13, color=_INK)
    # Listed from the dearest to the cheapest, as the lines end on the right.
    for ax, shown in ((near, [r for r in rules if r not in far]), (axes[0, 0], far)):
        if not shown:
            continue
        shown = sorted(shown, key=lambda rule: -ends[rule][0])
        ax.legend(
            [ends[rule][1] for rule in shown],
            [by_rule[rule][0]["label"] for rule in shown],
            frameon=False,
            fontsize=9,
            loc="upper left",
        )
    return _save(figure, path)


def experts_per_token(
    histogram: np.ndarray,
    path: str | PathLike[str] | None = None,
    *,
    title: str = "Experts per token",
) -> Any:
    """Draws a histogram of experts per token, one panel for each layer.

    Args:
        histogram: f64[layers, K + 1], the share of tokens that use 0..K experts.
        path: of the PNG; None returns the figure instead.
        title: above the panels.
    """
    layers, bins = histogram.shape
    columns = min(layers, 4)
    rows = -(-layers // columns)
    figure, axes = _figure(
        2.3 * columns + 0.8, 2.6 * rows + 0.5, nrows=rows, ncols=columns, sharey=True, squeeze=False
    )
    k = np.arange(bins)
    shown = slice(0 if histogram[:, 0].any() else 1, None)
    for index, ax in enumerate(axes.reshape(-1)):
        if index >= layers:
            ax.set_visible(False)
            continue
        share = 100 * histogram[index]
        bars = ax.bar(k[shown], share[shown], color=_COLOURS[0], width=0.75)
        ax.bar_label(bars, fmt="%.0f", fontsize=8, color=_INK, padding=1)
        ax.set_xticks(k[shown])
        ax.set_title(
            f"layer {index}, mean {histogram[index] @ k:.2f}", fontsize=10, color=_INK, loc="left"
        )
        ax.set_xlabel("experts", fontsize=9, color=_INK)
        ax.margins(y=0.12)
    for ax in axes[:, 0]:
        ax.set_ylabel("% of tokens", fontsize=9, color=_INK)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=_INK)
    return _save(figure, path)


def utilisation(
    loads: Mapping[str, np.ndarray],
    path: str | PathLike[str] | None = None,
    *,
    title: str = "Load of every expert",
) -> Any:
    """Heat maps of layers by experts: how many tokens an expert took, over the layer's mean.

    Args:
        loads: by panel title, f64[layers, E] of tokens per expert.
        path: of the PNG; None returns the figure instead.
        title: above the panels.
    """
    from matplotlib.colors import TwoSlopeNorm

    shares = {
        name: load / np.maximum(load.mean(axis=1, keepdims=True), 1e-9)
        for name, load in loads.items()
    }
    layers, experts = next(iter(shares.values())).shape
    figure, axes = _figure(
        max(6.0, 0.52 * experts + 1.6),
        len(shares) * (0.42 * layers + 0.9) + 0.6,
        nrows=len(shares),
        squeeze=False,
    )
    top = max(1.5, max(float(s.max()) for s in shares.values()))
    norm = TwoSlopeNorm(vmin=0.0, vcenter=1.0, vmax=top)
    image = None
    for ax, (name, share) in zip(axes[:, 0], shares.items(), strict=True):
        image = ax.imshow(share, cmap="RdBu_r", norm=norm, aspect="auto")
        ax.set_yticks(range(layers), [f"layer {i}" for i in range(layers)])
        ax.set_xticks(range(experts) if experts <= 32 else range(0, experts, 8))
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.set_title(name, fontsize=10, loc="left", color=_INK)
        if experts <= 24:
            for i, j in np.ndindex(layers, experts):
                far = abs(float(norm(share[i, j])) - 0.5) > 0.28
                ax.text(
                    j,
                    i,
                    f"{share[i, j]:.1f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if far else _INK,
                )
    axes[-1, 0].set_xlabel("expert", color=_INK)
    bar = figure.colorbar(image, ax=list(axes[:, 0]), pad=0.015, fraction=0.04)
    bar.set_label("load over the layer's mean (1 = balanced)", fontsize=9, color=_INK)
    bar.outline.set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, color=_INK)
    return _save(figure, path)
