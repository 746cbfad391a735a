"""Compilation for accelerators that are not there: what a program would run, send and hold.

The compilers of TPUs (``pip install libtpu``) and NVIDIA GPUs (``pip install --no-deps
jax-cuda12-plugin jax-cuda12-pjrt``, in JAX's version) run on any host. They show kernels, collectives,
memory and operations. They do not show time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.config.compilers import prepare_tpu_compiler
from moe_jax.parallel.collectives import CollectiveTraffic, collectives_of

# Bytes of memory of one device, and the bytes that its runtime keeps for itself.
_MEMORY = {
    "v4": 32 * 2**30,
    "v5e": 16 * 2**30,
    "v5p": 95 * 2**30,
    "v6e": 32 * 2**30,
    "h100": 80 * 10**9,
}
_RESERVED = 0.05

# Operations over those of the rows in use; the rest is padding to tiles.
_MOST_WORK = 1.1

# The H100 SXM as XLA describes devices; figures of NVIDIA's data sheet and of CUDA's device query.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
runtime_version { major: 12 minor: 8 }
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

_TPU_NAME = re.compile(r"(v4|v5e|v5p|v6e):(\d+(?:x\d+){1,2})")
_GPU_NAME = re.compile(r"h100(?:x(\d+))?")


class CompilerMissing(ValueError):
    """The compiler of a target is not installed; the message says how to install it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Devices that programs are compiled for."""

    name: str
    platform: str  # a name in moe_jax.experts.PLATFORMS
    devices: tuple[Any, ...]
    memory_bytes: int  # of one device, for programs and their data


def open_target(name: str) -> Target:
    """Returns the devices of a target by name; none of them has to exist.

    Args:
        name: a TPU slice, ``v4``, ``v5e``, ``v5p`` or ``v6e`` with its topology such as ``v5e:2x4`` or
            ``v5p:2x2x1``; or ``h100``, ``h100x8``.

    Raises:
        CompilerMissing: the compiler is not installed.
        ValueError: an unknown name, or a topology that the compiler does not know.
    """
    from jax.experimental import topologies

    if tpu := _TPU_NAME.fullmatch(name):
        if importlib.util.find_spec("libtpu") is None:
            raise CompilerMissing(
                f"target {name}: expected the TPU compiler, got no libtpu. Run: pip install libtpu"
            )
        prepare_tpu_compiler()
        sizes = [int(n) for n in tpu[2].split("x")] + [1]
        bounds = (min(sizes[0], 2), min(sizes[1], 2), 1)
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=name, chips_per_host_bounds=bounds
        )
        kind, platform = tpu[1], "tpu"
    elif gpu := _GPU_NAME.fullmatch(name):
        if importlib.util.find_spec("jax_cuda12_plugin") is None:
            raise CompilerMissing(
                f"target {name}: expected the CUDA compiler, got no jax-cuda12-plugin. Run: pip "
                f"install --no-deps jax-cuda12-plugin=={jax.__version__} "
                f"jax-cuda12-pjrt=={jax.__version__}"
            )
        described = topologies.get_topology_desc(
            "h100", "cuda", target_config=_H100, topology=f"1x{gpu[1] or 1}x1"
        )
        kind, platform = "h100", "cuda"
    else:
        raise ValueError(
            f"target: expected v4, v5e, v5p or v6e with a topology, such as v5e:2x4, or h100, h100x8, "
            f"got {name!r}. A topology is the slice's chips along its axes."
        )
    return Target(
        name=name,
        platform=platform,
        devices=tuple(described.devices),
        memory_bytes=int(_MEMORY[kind] * (1 - _RESERVED)),
    )


# --- one program ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TargetProgram:
    """What the compiler of a target makes of one program, for each device."""

    target: str
    what: str  # the program, for people
    gradient: bool  # forward and backward, else forward alone
    implementation: str  # what runs the experts
    work: float | None = None  # operations over those of the rows in use; None: not countable
    temp_bytes: int = 0
    argument_bytes: int = 0
    output_bytes: int = 0
    fits: bool = False  # arguments, results and temporaries in the memory of a device
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)  # custom calls by target
    collectives: dict[str, CollectiveTraffic] = dataclasses.field(default_factory=dict)
    expanded: bool = False  # whether an array has both all rows and all experts: E times the work
    readable: bool = True  # False: the HLO is unreadable, and kernels are those before optimisation
    seconds: float = 0.0  # of lowering and compilation
    error: str | None = None  # why it did not compile

    @property
    def ok(self) -> bool:
        """Whether it compiles, fits, and multiplies no row by experts that it does not use.

        Where ``readable`` is False, expansion is judged by ``work`` alone.
        """
        useful = self.work is None or self.work <= _MOST_WORK
        return self.error is None and self.fits and useful and not self.expanded

    def summary(self) -> dict[str, Any]:
        """The fields for JSON and tables: bytes as MB, and what was measured only."""
        if self.error is not None:
            figures: dict[str, Any] = {"error": self.error}
        else:
            figures = {
                "work": None if self.work is None else round(self.work, 3),
                "temp_mb": round(self.temp_bytes / 1e6, 1),
                "argument_mb": round(self.argument_bytes / 1e6, 1),
                "output_mb": round(self.output_bytes / 1e6, 1),
                "fits": self.fits,
                "kernels": self.kernels,
                "collectives": {
                    kind: {"count": sent.count, "mb": round(sent.num_bytes / 1e6, 2)}
                    for kind, sent in self.collectives.items()
                },
                "expanded": self.expanded,
                "readable": self.readable,
                "seconds": round(self.seconds, 1),
            }
        return {
            "target": self.target,
            "what": self.what,
            "passes": "forward + backward" if self.gradient else "forward",
            "implementation": self.implementation,
            "ok": self.ok,
            **figures,
        }


def compile_program(
    target: Target,
    step: Callable[..., Any],
    arguments: Any,
    *,
    what: str,
    gradient: bool,
    implementation: str,
    useful_flops: float | None = None,
    expansion: tuple[int, int] | None = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
) -> TargetProgram:
    """Compiles ``jit(step)`` for a target and reads what the compiler says.

    Args:
        target: from ``open_target``.
        step: the function.
        arguments: a tuple of trees of ``jax.ShapeDtypeStruct``.
        what, gradient, implementation: for the report.
        useful_flops: operations that the rows in use need on one device; None counts none.
        expansion: (rows, experts): an array with axes of both sizes is an expansion. None skips it.
        in_shardings, out_shardings: for ``jax.jit``; None is the first device alone.

    Returns:
        The report; an error of the compiler is part of it.
    """
    if in_shardings is None:
        in_shardings = out_shardings = jax.sharding.SingleDeviceSharding(target.devices[0])
    report = TargetProgram(
        target=target.name, what=what, gradient=gradient, implementation=implementation
    )
    # Autotuning would time kernels on a device, which this machine does not have.
    options: dict[str, str | bool] | None = (
        {"xla_gpu_autotune_level": "0"} if target.platform == "cuda" else None
    )
    start = time.perf_counter()
    try:
        # Kernel libraries ask the default device what to generate code for.
        with jax.default_device(target.devices[0]):
            jitted = jax.jit(step, in_shardings=in_shardings, out_shardings=out_shardings)
            lowered = jitted.lower(*arguments)
        compiled = lowered.compile(compiler_options=options)
    except Exception as error:  # whatever it is, the table must say it and go on
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return dataclasses.replace(report, error=f"{type(error).__name__}: {first[:300]}")
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    assert memory is not None, "the compilers of TPUs and GPUs report memory"
    text, complete = _text_of(compiled, lowered)
    held = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    # Donated arguments and the results in their memory are the same bytes.
    held -= memory.alias_size_in_bytes
    work = None
    if useful_flops and not (complete and _uncountable(text)):
        counted = (compiled.cost_analysis() or {}).get("flops") or flops_of(text)
        work = counted / useful_flops if counted else None
    return dataclasses.replace(
        report,
        work=work,
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        fits=held <= target.memory_bytes,
        kernels=kernels_of(text),
        collectives=collectives_of(text) if complete else {},
        expanded=expansion is not None and complete and _has_expansion(text, *expansion),
        readable=complete,
        seconds=seconds,
    )


def _text_of(compiled: Any, lowered: Any) -> tuple[str, bool]:
    """The compiled HLO and True; what was handed to the compiler and False if it cannot be written.

    libtpu 0.0.52 compiles some programs for v5p and v6e whose HLO it then fails to write out (a
    RET_CHECK on an async-update). Their memory and operations are known all the same.
    """
    try:
        return compiled.as_text() or "", True
    except jax.errors.JaxRuntimeError:
        return lowered.as_text(), False


# --- reading HLO ----------------------------------------------------------------------------

_TARGET = re.compile(r'(?:custom_call_target="|custom_call @)([\w.$]+)')
_KERNELS = re.compile(r"tpu_custom_call|mosaic|triton|cublas|cudnn|cutlass", re.IGNORECASE)
_SHAPE = re.compile(r"\b(?:bf16|f16|f32|f64|f8\w+|s8|u8|s4)\[([\d,]+)\]")
_LAYOUTS = re.compile(r"operand_layout_constraints=\{(.*?\})\}")
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_PRODUCT = re.compile(r" (?:dot|convolution)\(")
_TRIPS = '"known_trip_count"'


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
        elif "custom-call(" in body and (layouts := _LAYOUTS.search(body)):
            operands = [tuple(map(int, m[1].split(","))) for m in _SHAPE.finditer(layouts[1])]
            total += _grouped_flops(out, operands)
    return total


def _grouped_flops(out: tuple[int, ...], operands: list[tuple[int, ...]]) -> float:
    matrices = [s for s in operands if len(s) == 3]
    rows = [s for s in operands if len(s) == 2]
    if len(out) == 2 and matrices and rows:  # [M, K] and [E, K, N] give [M, N]
        return 2.0 * out[0] * math.prod(matrices[0][1:])
    if len(out) == 3 and len(rows) >= 2:  # [M, K] and [M, N] give [E, K, N]
        return 2.0 * max(rows[0]) * math.prod(out[1:])
    return 0.0


def _uncountable(text: str) -> bool:
    """Whether no count of operations is to be had.

    A loop whose number of steps is known at run time only counts as one step, and the compiler of
    TPUs counts a native ragged product as a product with every expert.
    """
    if "is_ragged_dot" in text:
        return True
    blocks = _blocks(text)
    bodies = [
        body[1]
        for lines in blocks.values()
        for line in lines
        if " while(" in line and _TRIPS not in line and (body := _BODY.search(line))
    ]
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
    return False


def _has_expansion(text: str, rows: int, experts: int) -> bool:
    """Whether a buffer has an axis of all rows and one of all experts.

    Instructions inside fusions are no buffers: a fused mask of that shape is never written.
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
            if len(sizes) >= 3 and experts in sizes and max(sizes) >= rows:
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


# --- layers ---------------------------------------------------------------------------------


def target_mesh(target: Target, **axes: int) -> Mesh:
    """A mesh over the devices of a target, by ``make_mesh``."""
    from moe_jax.parallel.sharding import make_mesh

    return make_mesh(**axes, devices=target.devices)


def bfloat16_shapes(tree: Any) -> Any:
    """Shapes of a tree of float arrays, in bfloat16."""

    def narrow(leaf: Any) -> Any:
        dtype = jnp.bfloat16 if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype
        return jax.ShapeDtypeStruct(np.shape(leaf), dtype)

    return jax.tree.map(narrow, tree)
