"""What the HLO of an accelerator's compiler holds: kernels, operations, arrays of E times the work."""

from __future__ import annotations

import math
import re
from collections import Counter

_TARGET = re.compile(r'(?:custom_call_target="|custom_call @)([\w.$]+)')
_KERNELS = re.compile(r"tpu_custom_call|mosaic|triton|cublas|cudnn|cutlass", re.IGNORECASE)
_SHAPE = re.compile(r"\b(?:bf16|f16|f32|f64|f8\w+|s8|u8|s4)\[([\d,]+)\]")
_LAYOUTS = re.compile(r"operand_layout_constraints=\{(.*?\})\}")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_PRODUCT = re.compile(r" (?:dot|convolution)\(")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CONSTANT = re.compile(r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)")
_LESS = re.compile(r"\bROOT .* compare\(.*?%?([\w.\-]+)\), direction=LT")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def kernels_of(text: str) -> dict[str, int]:
    """The custom calls of an HLO text that are kernels, by name, with their number.

    Example:
        >>> kernels_of('%a = f32[2] custom-call(), custom_call_target="tpu_custom_call"')
        {'tpu_custom_call': 1}
    """
    names = (m[1] for m in _TARGET.finditer(text) if _KERNELS.search(m[1]))
    return dict(sorted(Counter(names).items()))


def flops_of(text: str) -> float:
    """Operations of the products and grouped kernels in an HLO text, loops counted once.

    For compilers that count none themselves (NVIDIA). A grouped kernel counts 2 M K N for M rows and
    matrices [K, N], whatever the number of experts.
    """
    total = 0.0
    shapes: dict[str, tuple[int, ...]] = {}
    for line in text.splitlines():
        head, _, body = line.strip().removeprefix("ROOT ").partition(" = ")
        result = _SHAPE.match(body.lstrip("("))
        if result is None:
            continue
        out = tuple(int(n) for n in result[1].split(","))
        shapes[head.lstrip("%")] = out
        if " dot(" in body:
            left = re.search(r" dot\(.*?%?([\w.\-]+)[,)]", body)
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", body)
            inner = shapes.get(left[1]) if left else None
            if inner and axes:
                total += 2.0 * math.prod(out) * math.prod(inner[int(a)] for a in axes[1].split(","))
        else:
            total += _kernel_flops(body)
    return total


def kernel_flops_of(text: str) -> float:
    """Operations of the grouped kernels alone; a kernel in a loop counts for every trip.

    For programs with much else in them, such as a training step. 0.0 if there is no such kernel, or
    one in a loop whose number of trips is known at run time only.
    """
    blocks = _blocks(text)
    trips = loop_trips(text)
    called_by = {
        called: name
        for name, lines in blocks.items()
        for line in lines
        for called in _CALLED.findall(line)
    }
    total = 0.0
    for name, lines in blocks.items():
        flops = sum(_kernel_flops(line.partition(" = ")[2]) for line in lines)
        times, at = 1, name
        while flops and at in called_by:
            times *= trips.get(at, 1) or 0
            at = called_by[at]
        if flops and not times:
            return 0.0
        total += flops * times
    return total


def _kernel_flops(body: str) -> float:
    """Operations of a grouped kernel, from an instruction after its name; 0.0 for anything else."""
    result, layouts = _SHAPE.match(body.lstrip("(")), _LAYOUTS.search(body)
    if "custom-call(" not in body or result is None or layouts is None:
        return 0.0
    out = tuple(int(n) for n in result[1].split(","))
    operands = [tuple(map(int, m[1].split(","))) for m in _SHAPE.finditer(layouts[1])]
    return _grouped_flops(out, operands)


def _grouped_flops(out: tuple[int, ...], operands: list[tuple[int, ...]]) -> float:
    matrices = [s for s in operands if len(s) == 3]
    rows = [s for s in operands if len(s) == 2]
    if len(out) == 2 and matrices and rows:  # [M, K] and [E, K, N] give [M, N]
        return 2.0 * out[0] * math.prod(matrices[0][1:])
    if len(out) == 3 and len(rows) >= 2:  # [M, K] and [M, N] give [E, K, N]
        return 2.0 * max(rows[0]) * math.prod(out[1:])
    return 0.0


def is_uncountable(text: str) -> bool:
    """Whether no count of operations is to be had.

    A loop whose number of steps is known at run time only counts as one step, and the compiler of
    TPUs counts a native ragged product as a product with every expert.
    """
    if "is_ragged_dot" in text:
        return True
    blocks = _blocks(text)
    bodies = [body for body, trips in loop_trips(text).items() if trips is None]
    done: set[str] = set()
    while bodies:
        name = bodies.pop()
        if name in done:
            continue
        done.add(name)
        for line in blocks.get(name, ()):
            if _PRODUCT.search(line) or kernels_of(line):
                return True
            bodies += _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                bodies += re.findall(r"[\w.\-]+", branches)
    return False


def loop_trips(text: str) -> dict[str, int | None]:
    """Returns how often each loop runs, by the name of its body; None is known at run time only.

    XLA writes the number beside the loop if it knows it; libtpu does not write it. There a loop whose
    condition compares with a constant counts from 0 up to it, as JAX writes loops of a known length.

    Example:
        >>> loop_trips('ENTRY %m () -> s32[] {\\n  %l = s32[] while(%i), condition=%c, body=%b\\n}')
        {'b': None}
    """
    blocks = _blocks(text)
    trips: dict[str, int | None] = {}
    for lines in blocks.values():
        for line in lines:
            body = _BODY.search(line)
            if " while(" not in line or body is None:
                continue
            count, condition = _TRIP_COUNT.search(line), _CONDITION.search(line)
            if count:
                trips[body[1]] = int(count[1])
            else:
                trips[body[1]] = _upper_bound(blocks.get(condition[1], [])) if condition else None
    return trips


def _upper_bound(condition: list[str]) -> int | None:
    """The constant that the counter of a loop is compared with, or None."""
    constants = {m[1]: int(m[2]) for line in condition if (m := _CONSTANT.search(line))}
    compared = [constants.get(m[1]) for line in condition if (m := _LESS.search(line))]
    return compared[0] if compared else None


def has_expansion(text: str, rows: int, experts: int, widths: tuple[int, ...] = ()) -> bool:
    """Whether a buffer has an axis of all rows and one of all experts.

    Instructions inside fusions are no buffers: a fused mask of that shape is never written.

    Args:
        text: HLO.
        rows: the rows in use.
        experts: E.
        widths: D and F. The stack of an expert's matrices [E, D, F] is no expansion even if D or F
            exceeds the number of rows.
    """
    blocks = _blocks(text)
    fused = {
        name
        for lines in blocks.values()
        for line in lines
        if " fusion(" in line
        for name in _CALLED.findall(line)
    }
    for name, lines in blocks.items():
        for line in lines if name not in fused else ():
            shape = _SHAPE.match(line.partition(" = ")[2])
            sizes = [int(n) for n in shape[1].split(",")] if shape else []
            if len(sizes) < 3 or experts not in sizes:
                continue
            for size in (experts, *widths):
                if size in sizes:
                    sizes.remove(size)
            if sizes and max(sizes) >= rows:
                return True
    return False


def _blocks(text: str) -> dict[str, list[str]]:
    """The lines of each computation of an HLO text, by its name."""
    blocks: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            words = line.removeprefix("ENTRY ").split()
            current = blocks.setdefault(words[0].lstrip("%"), [])
        else:
            current.append(line)
    return blocks
