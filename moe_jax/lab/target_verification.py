"""Compiles one layer and the training step of the small model for a target, and checks the programs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moe_jax.experts import IMPLEMENTATIONS, choose
from moe_jax.lab.lm_config import LMConfig
from moe_jax.lab.target_step import layer_shape, training_program
from moe_jax.parallel.target_layers import (
    LAYERS,
    LayerShape,
    experts_program,
    memory_excess,
    parallel_program,
    plan_shapes,
    refusal,
)
from moe_jax.parallel.targets import Target, TargetProgram, open_target


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetVerification:
    """The programs compiled for a target, and whether those that the library chooses hold."""

    target: Target
    programs: tuple[TargetProgram, ...]

    @property
    def failed(self) -> tuple[TargetProgram, ...]:
        """The programs of the default choice that are not ok.

        An implementation that was asked for by name may be unfit for a target; the default must not.
        Those in ``too_large`` are not among them.
        """
        excused = self.too_large
        return tuple(
            p
            for p in self.programs
            if p.implementation.startswith("default") and not p.ok and p not in excused
        )

    @property
    def too_large(self) -> tuple[TargetProgram, ...]:
        """The programs that exceed one device of a target that has several.

        A layer that is spread over many devices need not fit into one. The program over all of them is
        judged, and on a target of one device the program of one.
        """
        if len(self.target.devices) == 1:
            return ()
        return tuple(p for p in self.programs if p.devices == 1 and p.lacks_memory)

    @property
    def unread(self) -> int:
        """Number of programs whose HLO the compiler did not write out."""
        return sum(not p.readable for p in self.programs)

    def summary(self) -> dict[str, Any]:
        """The report for JSON."""
        return {
            "target": self.target.name,
            "devices": len(self.target.devices),
            "memory_mb": round(self.target.memory_bytes / 1e6, 1),
            "ok": not self.failed,
            "unread": self.unread,
            "too_large": len(self.too_large),
            "programs": [p.summary() for p in self.programs],
        }


def verify_target(
    name: str,
    shape: LayerShape = LAYERS["small"],
    *,
    layer: str = "layer",
    implementations: Sequence[str | None] | None = None,
    model: LMConfig = LMConfig(),
    on_program: Callable[[TargetProgram], None] = lambda program: None,
) -> TargetVerification:
    """Compiles a layer and the training step of the small model for devices that need not exist.

    Each is compiled for one device and, where the target has several, spread over all of them. Layers
    are compiled forward, and forward with the gradient. Where one of several devices cannot hold the
    arguments and results of a layer, its program for one device is not compiled.

    Args:
        name: the target, see ``open_target``.
        shape: sizes of the layer, with the tokens of one device.
        layer: the layer's name in the report.
        implementations: what runs the experts, by name; a None among them is the library's choice. None
            takes the library's choice and every other implementation that does not refuse the target;
            each that refuses is a row with its reason. An implementation that is named is compiled
            whatever it says.
        model: the small model.
        on_program: is called with every program as soon as it is compiled.

    Raises:
        CompilerMissing: the compiler is not installed; the message has the command that installs it.
        ValueError: an unknown target or implementation.
    """
    if implementations is not None:
        unknown = sorted({n for n in implementations if n is not None} - set(IMPLEMENTATIONS))
        if unknown:
            raise ValueError(
                f"implementations: expected default or names among {', '.join(IMPLEMENTATIONS)}, got "
                f"{', '.join(unknown)}."
            )
    target = open_target(name)
    programs: list[TargetProgram] = []
    for program in _programs(target, shape, layer, implementations, model):
        programs.append(program)
        on_program(program)
    return TargetVerification(target=target, programs=tuple(programs))


def _programs(
    target: Target,
    shape: LayerShape,
    layer: str,
    implementations: Sequence[str | None] | None,
    model: LMConfig,
) -> Iterator[TargetProgram]:
    several = len(target.devices) > 1
    for name, reason in _selected(target, shape, implementations):
        if reason is not None:
            yield _refused(target, layer, name, reason)
            continue
        for gradient in (False, True):
            needed = memory_excess(target, shape, gradient=gradient) if several else None
            if needed is None:
                yield experts_program(target, layer, shape, implementation=name, gradient=gradient)
            else:
                yield TargetProgram(
                    target=target.name,
                    what=layer,
                    gradient=gradient,
                    implementation=name or "default",
                    too_large=needed,
                )
        # Rows that arrive are planned without a capacity, which `capacity` needs.
        for gradient in (False, True) if several and name != "capacity" else ():
            count = len(target.devices)
            yield parallel_program(
                target,
                layer,
                shape,
                data=count // math.gcd(shape.num_experts, count),
                implementation=name,
                gradient=gradient,
            )
    for name, reason in _selected(target, layer_shape(model), implementations, step=True):
        if reason is not None:
            yield _refused(target, "training step of the small model", name, reason)
            continue
        yield training_program(target, model, implementation=name)
        if several:
            yield training_program(target, model, implementation=name, all_devices=True)


def _selected(
    target: Target,
    shape: LayerShape,
    implementations: Sequence[str | None] | None,
    *,
    step: bool = False,
) -> Iterator[tuple[str | None, str | None]]:
    """Names to compile, None for the library's choice, each with its refusal or None."""
    if implementations is not None:
        yield from ((name, None) for name in implementations)
        return
    yield None, None
    chosen = choose(plan_shapes(shape), platform=target.platform).name
    for name in IMPLEMENTATIONS:
        if name == chosen:  # compiled already, as the default
            continue
        if step and name == "capacity":
            yield name, "the training step drops nothing, so its plans have no capacity"
        else:
            yield name, refusal(target.platform, shape, name)


def _refused(target: Target, what: str, name: str | None, reason: str) -> TargetProgram:
    return TargetProgram(
        target=target.name,
        what=what,
        gradient=False,
        implementation=name or "default",
        refused=reason,
    )
