"""Compiles one layer and the training step of the small model for a target, and checks the programs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

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
    on_start: Callable[[int, int, TargetProgram], None] = lambda number, total, program: None,
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
        on_start: is called before a program is compiled, which takes seconds to minutes: with its
            number from 1, the number of programs that will be compiled, and what is known of it.
        on_program: is called with every row of the report, as soon as it is compiled if it is.

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
    tasks = list(_tasks(target, shape, layer, implementations, model))
    total = sum(task.compile is not None for task in tasks)
    programs: list[TargetProgram] = []
    number = 0
    for task in tasks:
        if task.compile is None:
            program = task.report
        else:
            number += 1
            on_start(number, total, task.report)
            program = task.compile()
        programs.append(program)
        on_program(program)
    return TargetVerification(target=target, programs=tuple(programs))


class _Task(NamedTuple):
    """One row of the report."""

    report: TargetProgram  # what is known of the program before it is compiled
    compile: Callable[[], TargetProgram] | None = None  # None: the report says why it is not


def _tasks(
    target: Target,
    shape: LayerShape,
    layer: str,
    implementations: Sequence[str | None] | None,
    model: LMConfig,
) -> Iterator[_Task]:
    count = len(target.devices)
    several = count > 1
    for name, reason in _selected(target, shape, implementations):
        known = _known(target, layer, name)
        if reason is not None:
            yield _Task(dataclasses.replace(known, refused=reason))
            continue
        for gradient in (False, True):
            needed = memory_excess(target, shape, gradient=gradient) if several else None
            here = dataclasses.replace(known, gradient=gradient, too_large=needed)
            how = {"implementation": name, "gradient": gradient}
            make = functools.partial(experts_program, target, layer, shape, **how)
            yield _Task(here, make if needed is None else None)
        # Rows that arrive are planned without a capacity, which `capacity` needs.
        for gradient in (False, True) if several and name != "capacity" else ():
            data = count // math.gcd(shape.num_experts, count)
            how = {"implementation": name, "gradient": gradient, "data": data}
            yield _Task(
                dataclasses.replace(known, gradient=gradient, devices=count),
                functools.partial(parallel_program, target, layer, shape, **how),
            )
    for name, reason in _selected(target, layer_shape(model), implementations, step=True):
        known = _known(target, "training step of the small model", name)
        if reason is not None:
            yield _Task(dataclasses.replace(known, refused=reason))
            continue
        known = dataclasses.replace(known, gradient=True)
        make = functools.partial(training_program, target, model, implementation=name)
        yield _Task(known, make)
        if several:
            over_all = functools.partial(make, all_devices=True)
            yield _Task(dataclasses.replace(known, devices=count), over_all)


def _known(target: Target, what: str, name: str | None) -> TargetProgram:
    return TargetProgram(
        target=target.name, what=what, gradient=False, implementation=name or "default"
    )


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
