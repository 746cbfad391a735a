"""Compilation for accelerators that are not there: what a program would run, send and hold.

The compilers of TPUs (``pip install libtpu``) and NVIDIA GPUs (``pip install --no-deps
jax-cuda12-plugin jax-cuda12-pjrt``, in JAX's version) run on any host. They show kernels, collectives,
memory and operations. They do not show time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moe_jax.config.compilers import prepare_tpu_compiler
from moe_jax.parallel.collectives import CollectiveTraffic, collectives_of
from moe_jax.parallel.memory_cost import MemoryCost
from moe_jax.parallel.target_hlo import (
    flops_of,
    has_expansion,
    is_uncountable,
    kernel_flops_of,
    kernels_of,
)

# Bytes of memory of one device, and the bytes that its runtime keeps for itself.
_MEMORY = {
    "v4": 32 * 2**30,
    "v5e": 16 * 2**30,
    "v5p": 95 * 2**30,
    "v6e": 32 * 2**30,
    "h100": 80 * 10**9,
}
_RESERVED = 0.05

# The word by which the compiler of TPUs says that a program exceeds the memory of a device.
_OUT_OF_MEMORY = "CompileTimeHbmOom"

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

_TPU_NAME = re.compile(r"(v4|v5e|v5p|v6e):([1-9]\d*(?:x[1-9]\d*){1,2})")
_GPU_NAME = re.compile(r"h100(?:x([1-9]\d*))?")


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
        ValueError: an unknown name, a topology that the compiler does not know, or a compiler that JAX
            did not load. JAX loads that of NVIDIA GPUs on a machine without one only if
            ``jax_platforms`` is ``"cpu"`` before its first use.
    """
    if tpu := _TPU_NAME.fullmatch(name):
        if importlib.util.find_spec("libtpu") is None:
            raise CompilerMissing(
                f"target {name}: expected the TPU compiler, got no libtpu. Run: pip install libtpu"
            )
        prepare_tpu_compiler()
        sizes = [int(n) for n in tpu[2].split("x")] + [1]
        bounds = (min(sizes[0], 2), min(sizes[1], 2), 1)
        described = _describe(
            name, platform="tpu", topology_name=name, chips_per_host_bounds=bounds
        )
        kind, platform = tpu[1], "tpu"
    elif gpu := _GPU_NAME.fullmatch(name):
        if importlib.util.find_spec("jax_cuda12_plugin") is None:
            raise CompilerMissing(
                f"target {name}: expected the CUDA compiler, got no jax-cuda12-plugin. Run: pip "
                f"install --no-deps jax-cuda12-plugin=={jax.__version__} "
                f"jax-cuda12-pjrt=={jax.__version__}"
            )
        described = _describe(
            name,
            platform="cuda",
            topology_name="h100",
            target_config=_H100,
            topology=f"1x{gpu[1] or 1}x1",
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


def _describe(name: str, **topology: Any) -> Any:
    """JAX's description of the devices of a target."""
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(**topology)
    except NotImplementedError as error:  # no plugin of the platform was registered
        raise ValueError(
            f"target {name}: expected JAX to have loaded the compiler of {topology['platform']}, got: "
            f"{error}. On a machine without such a device, set JAX_PLATFORMS=cpu before JAX starts."
        ) from error
    except jax.errors.JaxRuntimeError as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"target {name}: expected a topology that the compiler knows, got: {first}. A topology is "
            "the slice's chips along its axes, such as v5e:2x4 or v5p:2x2x1."
        ) from error


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
    shared_bytes: int = 0  # results in the memory of donated arguments
    live_bytes: int = 0  # the most held at once, without what the allocator loses between buffers
    model: MemoryCost | None = None  # what planning expects; None: there is no model of the program
    fits: bool = False  # held_bytes in the memory of a device
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)  # custom calls by target
    collectives: dict[str, CollectiveTraffic] = dataclasses.field(default_factory=dict)
    expanded: bool = False  # whether an array has both all rows and all experts: E times the work
    readable: bool = True  # False: the HLO is unreadable, and kernels are those before optimisation
    seconds: float = 0.0  # of lowering and compilation
    error: str | None = None  # why it did not compile
    # Why nothing was compiled: the implementation is not for this target, or a device cannot hold so
    # many bytes of arguments and results.
    refused: str | None = None
    too_large: int | None = None
    devices: int = 1  # that run the program together

    @property
    def held_bytes(self) -> int:
        """Bytes of a device that the program holds at once: arguments, results and temporaries."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes - self.shared_bytes

    @property
    def ok(self) -> bool:
        """Whether it compiles, fits, and multiplies no row by experts that it does not use.

        Where ``readable`` is False, expansion is judged by ``work`` alone. A program that was not
        compiled is not ok.
        """
        return self._compiled and self.fits and not self._multiplies

    @property
    def lacks_memory(self) -> bool:
        """Whether all that it lacks is memory: it does not fit, or the compiler says that it cannot."""
        if self.error is not None:
            return _OUT_OF_MEMORY in self.error
        unfit = self._compiled and not self.fits and not self._multiplies
        return self.too_large is not None or unfit

    @property
    def _compiled(self) -> bool:
        return self.error is None and self.refused is None and self.too_large is None

    @property
    def _multiplies(self) -> bool:
        """Whether it multiplies rows by experts that they do not use."""
        return self.expanded or (self.work is not None and self.work > _MOST_WORK)

    def summary(self) -> dict[str, Any]:
        """The fields for JSON and tables: bytes as MB, and what was measured only."""
        model: dict[str, float] = {}
        if self.model is not None:
            model["model_temp_mb"] = round(self.model.temp_bytes / 1e6, 1)
            model["model_held_mb"] = round(self.model.held_bytes / 1e6, 1)
        if self.refused is not None:
            figures: dict[str, Any] = {"refused": self.refused}
        elif self.too_large is not None:
            figures = {"too_large_mb": round(self.too_large / 1e6, 1)}
        elif self.error is not None:
            figures = {"error": self.error}
        else:
            figures = {
                "work": None if self.work is None else round(self.work, 3),
                "temp_mb": round(self.temp_bytes / 1e6, 1),
                "argument_mb": round(self.argument_bytes / 1e6, 1),
                "output_mb": round(self.output_bytes / 1e6, 1),
                "held_mb": round(self.held_bytes / 1e6, 1),
                "live_mb": round(self.live_bytes / 1e6, 1),
                **model,
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
    kernel_work: bool = False,
    expansion: tuple[int, int, tuple[int, ...]] | None = None,
    in_shardings: Any = None,
    out_shardings: Any = None,
    donate_argnums: tuple[int, ...] = (),
) -> TargetProgram:
    """Compiles ``jit(step)`` for a target and reads what the compiler says.

    Args:
        target: from ``open_target``.
        step: the function.
        arguments: a tuple of trees of ``jax.ShapeDtypeStruct``.
        what, gradient, implementation: for the report.
        useful_flops: operations that the rows in use need on one device; None counts none.
        kernel_work: whether ``work`` counts grouped kernels alone, for a program with much else in it.
        expansion: (rows, experts, widths), see ``has_expansion``. None skips it.
        in_shardings, out_shardings: for ``jax.jit``; None is the first device alone.
        donate_argnums: for ``jax.jit``.

    Returns:
        The report; an error of the compiler is part of it.
    """
    devices = 1 if in_shardings is None else len(target.devices)
    if in_shardings is None:
        in_shardings = out_shardings = jax.sharding.SingleDeviceSharding(target.devices[0])
    report = TargetProgram(
        target=target.name,
        what=what,
        gradient=gradient,
        implementation=implementation,
        devices=devices,
    )
    with tempfile.TemporaryDirectory() as dump:
        start = time.perf_counter()
        try:
            # Kernel libraries ask the default device what to generate code for.
            with jax.default_device(target.devices[0]):
                jitted = jax.jit(
                    step,
                    in_shardings=in_shardings,
                    out_shardings=out_shardings,
                    donate_argnums=donate_argnums,
                )
                lowered = jitted.lower(*arguments)
            compiled = lowered.compile(compiler_options=_compiler_options(target.platform, dump))
        except Exception as error:  # whatever it is, the table must say it and go on
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            return dataclasses.replace(report, error=f"{type(error).__name__}: {first[:300]}")
        seconds = time.perf_counter() - start
        text, complete = _text_of(compiled, lowered, Path(dump))
    memory = compiled.memory_analysis()
    assert memory is not None, "the compilers of TPUs and GPUs report memory"
    # Loops and ragged products have no count, and do not show where the HLO is not written out. A
    # program whose experts run by kernels has neither.
    countable = not is_uncountable(text) if complete else bool(kernels_of(text))
    work = None
    if useful_flops and kernel_work:
        work = (kernel_flops_of(text) / useful_flops or None) if complete else None
    elif useful_flops and countable:
        counted = (compiled.cost_analysis() or {}).get("flops") or flops_of(text)
        work = counted / useful_flops if counted else None
    program = dataclasses.replace(
        report,
        work=work,
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        # Donated arguments and the results in their memory are the same bytes.
        shared_bytes=memory.alias_size_in_bytes,
        live_bytes=memory.peak_memory_in_bytes,
        kernels=kernels_of(text),
        collectives=collectives_of(text) if complete else {},
        expanded=expansion is not None and complete and has_expansion(text, *expansion),
        readable=complete,
        seconds=seconds,
    )
    return dataclasses.replace(program, fits=program.held_bytes <= target.memory_bytes)


def _compiler_options(platform: str, dump: str) -> dict[str, str | bool] | None:
    """Options of one compilation; ``dump`` is a folder in which the compiler may write."""
    if platform == "cuda":
        # Autotuning would time kernels on a device, which this machine does not have.
        return {"xla_gpu_autotune_level": "0"}
    if platform == "tpu":
        return {"xla_dump_to": dump, "xla_dump_hlo_as_text": True}
    return None


def _text_of(compiled: Any, lowered: Any, dump: Path) -> tuple[str, bool]:
    """The compiled HLO and True, or what was handed to the compiler and False.

    libtpu 0.0.52 compiles some programs for v5p and v6e whose HLO its client then fails to write out
    (a RET_CHECK on an async-update). The compiler itself has written the same HLO to ``dump``.
    """
    try:
        return compiled.as_text() or "", True
    except jax.errors.JaxRuntimeError:
        dumped = list(dump.glob("*.after_optimizations.txt"))
        if len(dumped) == 1:
            return dumped[0].read_text("utf-8"), True
        return lowered.as_text(), False


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
