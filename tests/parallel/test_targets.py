"""Compilation for absent accelerators: reading HLO, and the compilers where they are installed."""

from __future__ import annotations

import importlib.util

import jax
import pytest

from moe_jax.parallel import target_layers, targets
from moe_jax.parallel.target_layers import LAYERS, experts_program, parallel_program
from moe_jax.parallel.targets import CompilerMissing, flops_of, kernels_of, open_target

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install libtpu"
)

HLO = """HloModule m
%fused.1 (p: bf16[64,8]) -> bf16[64,4,8] {
  ROOT %b = bf16[64,4,8]{2,1,0} broadcast(%p), dimensions={0,2}
}
%body (c: (s32[])) -> (s32[]) {
  ROOT %t = (s32[]) tuple(%c)
}
ENTRY %main (x: bf16[64,8], w: bf16[4,8,16]) -> bf16[64,16] {
  %x = bf16[64,8]{1,0} parameter(0)
  %f = bf16[64,4,8]{2,1,0} fusion(%x), kind=kLoop, calls=%fused.1
  %l = (s32[]) while(%i), condition=%cond, body=%body
  %k = bf16[64,16]{1,0} custom-call(%x, %w), KERNEL={bf16[64,8]{1,0}, bf16[4,8,16]{2,1,0}}
  %o = f32[4,8,16]{2,1,0} custom-call(%y, %x), KERNEL={bf16[8,64]{1,0}, bf16[64,16]{1,0}}
  ROOT %d = f32[64,3]{1,0} dot(%x, %z), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
""".replace("KERNEL", 'custom_call_target="mosaic_gpu_v2", operand_layout_constraints')


def test_operations_are_counted_from_hlo():
    assert kernels_of(HLO) == {"mosaic_gpu_v2": 2}
    assert kernels_of("%1 = stablehlo.custom_call @tpu_custom_call(%0)") == {"tpu_custom_call": 1}
    assert flops_of(HLO) == 2 * 64 * 8 * 16 * 2 + 2 * 64 * 8 * 3
    # A loop without products does not spoil the count, one with a product does.
    assert not targets._uncountable(HLO)
    assert targets._uncountable(HLO.replace("tuple(%c)", "dot(%c, %c)"))
    assert targets._uncountable(HLO + "is_ragged_dot")


def test_a_buffer_of_all_rows_and_all_experts_is_seen_and_a_fused_one_is_not():
    assert targets._has_expansion(HLO, 64, 4)  # what the fusion writes
    inside_only = HLO.replace("%f = bf16[64,4,8]", "%f = bf16[64,32]")
    assert not targets._has_expansion(inside_only, 64, 4)
    assert not targets._has_expansion(HLO, 65, 4)


@pytest.mark.parametrize("name", ["v5", "v5e", "h100x", "a100", "v5e:2"])
def test_an_unknown_target_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match=r"target: expected v4, v5e, v5p or v6e.*h100x8, got"):
        open_target(name)


def test_a_missing_compiler_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CompilerMissing, match="pip install libtpu"):
        open_target("v5e:2x4")
    version = jax.__version__
    with pytest.raises(CompilerMissing, match=f"jax-cuda12-plugin=={version} jax-cuda12-pjrt"):
        open_target("h100")


def test_an_error_of_a_compiler_is_a_line_of_the_report():
    here = targets.Target(
        name="cpu", platform="cpu", devices=tuple(jax.devices()), memory_bytes=10**9
    )

    def fails(x):
        raise RuntimeError("does not lower\nat all")

    program = targets.compile_program(
        here,
        fails,
        (jax.ShapeDtypeStruct((2,), "float32"),),
        what="x",
        gradient=False,
        implementation="y",
    )
    assert program.error == "RuntimeError: does not lower"
    assert not program.ok
    assert program.summary()["error"] == program.error


def test_a_program_that_exceeds_the_memory_does_not_fit():
    for memory, fits in ((10**9, True), (10, False)):
        here = targets.Target(
            name="cpu", platform="cpu", devices=tuple(jax.devices()), memory_bytes=memory
        )
        program = targets.compile_program(
            here,
            lambda x: x @ x,
            (jax.ShapeDtypeStruct((64, 64), "float32"),),
            what="x",
            gradient=False,
            implementation="y",
            useful_flops=2.0 * 64**3,
        )
        assert program.fits is fits
        assert program.ok is fits
        assert program.work == pytest.approx(1.0, abs=0.05)


@needs_libtpu
def test_a_cpu_host_compiles_the_default_for_a_tpu_to_grouped_kernels():
    target = open_target("v5e:2x4")
    program = experts_program(target, "small", LAYERS["small"])
    assert program.error is None
    assert program.implementation == "default (grouped)"
    assert program.kernels == {"tpu_custom_call": 3}
    assert program.work == pytest.approx(1.0, abs=0.1)
    assert program.ok


@needs_libtpu
def test_experts_over_eight_chips_send_two_all_to_alls():
    target = open_target("v5e:2x4")
    shape = target_layers.LayerShape(d_model=128, d_ff=128, num_experts=8, k=2, tokens=128)
    program = parallel_program(target, "small", shape)
    assert program.error is None
    assert {kind: sent.count for kind, sent in program.collectives.items()} == {"all-to-all": 2}
    assert program.kernels == {"tpu_custom_call": 3}
