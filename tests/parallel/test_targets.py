"""Compilation for absent accelerators: reading HLO, and the compilers where they are installed."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from typer.testing import CliRunner

from moe_jax.cli import app
from moe_jax.experts import IMPLEMENTATIONS, FeedForward
from moe_jax.lab import target_step, target_verification
from moe_jax.lab.lm_config import LMConfig
from moe_jax.lab.target_verification import verify_target
from moe_jax.layer import init_moe_layer, moe_layer
from moe_jax.parallel import target_layers, targets
from moe_jax.parallel.memory_cost import MemoryCost
from moe_jax.parallel.sharded_layer import sharded_moe_layer
from moe_jax.parallel.sharding import parallel_of
from moe_jax.parallel.target_hlo import (
    flops_of,
    has_expansion,
    is_uncountable,
    kernel_flops_of,
    kernels_of,
    loop_trips,
)
from moe_jax.parallel.target_layers import LAYERS, experts_program, parallel_program
from moe_jax.parallel.targets import CompilerMissing, open_target
from moe_jax.routers import TopK

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install libtpu"
)


@pytest.fixture(autouse=True)
def without_flags_of_the_cpu(monkeypatch):
    """libtpu ends the process at a flag that it does not know, such as those that conftest.py sets."""
    jax.devices()  # the CPU's compiler reads them first
    monkeypatch.delenv("XLA_FLAGS", raising=False)


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
    assert not is_uncountable(HLO)
    assert is_uncountable(HLO.replace("tuple(%c)", "dot(%c, %c)"))
    branch = "%branch (c: f32[2]) -> f32[2] {\n  ROOT %d = f32[2] dot(%c, %c)\n}\nENTRY"
    branched = HLO.replace("tuple(%c)", "conditional(%c), branch_computations={%branch, %body}")
    assert is_uncountable(branched.replace("ENTRY", branch))
    assert is_uncountable(HLO + "is_ragged_dot")


def test_a_buffer_of_all_rows_and_all_experts_is_seen_and_a_fused_one_is_not():
    assert has_expansion(HLO, 64, 4)  # what the fusion writes
    inside_only = HLO.replace("%f = bf16[64,4,8]", "%f = bf16[64,32]")
    assert not has_expansion(inside_only, 64, 4)
    assert not has_expansion(HLO, 65, 4)


def test_the_stack_of_matrices_is_no_expansion_even_if_it_is_wider_than_the_rows():
    stack = "ENTRY %m (x: bf16[2]) -> bf16[4,64,32] {\n  %w = bf16[4,64,32]{2,1,0} parameter(0)\n}"
    assert has_expansion(stack, 16, 4)
    assert not has_expansion(stack, 16, 4, (64, 32))
    expanded = stack.replace("[4,64,32]", "[64,4,32]").replace("32]", "64]")
    assert has_expansion(expanded, 64, 4, (64, 32))


def test_kernels_in_a_loop_count_for_every_trip():
    head, tail = HLO.split("  ROOT %t")
    kernel = next(line for line in HLO.splitlines() if "%k =" in line)
    looped = f"{head}{kernel}\n  ROOT %t{tail}"
    assert kernel_flops_of(HLO) == 2 * 64 * 8 * 16 * 2
    assert kernel_flops_of(looped) == 0.0  # the number of trips is not known
    counted = looped.replace("body=%body", 'body=%body, {"known_trip_count":{"n":"5"}}')
    assert kernel_flops_of(counted) == 2 * 64 * 8 * 16 * (2 + 5)


def test_the_trips_of_a_loop_are_read_from_its_condition_where_the_compiler_does_not_write_them():
    condition = """%cond (c: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(3)
  %c = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%c, %n), direction=LT, metadata={op_name="lt"}
}
"""
    text = HLO.replace("ENTRY", f"{condition}ENTRY")
    assert loop_trips(HLO) == {"body": None}
    assert loop_trips(text) == {"body": 3}
    assert loop_trips(text.replace("compare(%c, %n)", "compare(%c, %rounds)")) == {"body": None}
    written = text.replace("body=%body", 'body=%body, {"known_trip_count":{"n":"5"}}')
    assert loop_trips(written) == {"body": 5}
    with_product = text.replace("tuple(%c)", "dot(%c, %c)")
    assert not is_uncountable(with_product)


@pytest.mark.parametrize(
    "name", ["v5", "v5e", "h100x", "a100", "v5e:2", "h100x0", "v5e:0x2", "v7:2x4", ""]
)
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


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (NotImplementedError("not implemented for cuda"), "set JAX_PLATFORMS=cpu"),
        (
            jax.errors.JaxRuntimeError("layout is not divisible\nmore"),
            "got: layout is not divisible",
        ),
    ],
)
def test_a_target_that_jax_or_a_compiler_refuses_is_a_value_error(monkeypatch, error, words):
    def refuses(**_):
        raise error

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", refuses)
    for name in ("v5e:2x3", "h100"):
        with pytest.raises(ValueError, match=f"target {name}: expected .*{words}"):
            open_target(name)
    result = CliRunner().invoke(app, ["verify", "--target", "v5e:2x3"])
    assert result.exit_code == 2
    assert "target v5e:2x3: expected" in result.stderr


def test_sizes_that_no_layer_has_are_refused():
    with pytest.raises(ValueError, match="k: expected at most num_experts=8, got 9"):
        dataclasses.replace(LAYERS["small"], k=9)
    with pytest.raises(ValueError, match="tokens: expected"):
        dataclasses.replace(LAYERS["small"], tokens=0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--layer", "olmoe", "--d-model", "64"], "--target: expected one with --layer, --d-model"),
        (["--target", "h100", "--devices", "2"], "--devices: expected none with --target, got 2"),
        (["--target", "h100", "--k", "9"], "k: expected at most num_experts=8, got 9"),
    ],
)
def test_options_that_the_command_would_not_read_are_refused(given, words):
    result = CliRunner().invoke(app, ["verify", *given])
    assert result.exit_code == 2
    assert words in result.stderr


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


def squared(memory_bytes: int):
    """The square of a matrix, compiled for this CPU as a target with so much memory."""
    here = targets.Target(
        name="cpu", platform="cpu", devices=tuple(jax.devices()), memory_bytes=memory_bytes
    )
    return targets.compile_program(
        here,
        lambda x: x @ x,
        (jax.ShapeDtypeStruct((64, 64), "float32"),),
        what="x",
        gradient=False,
        implementation="y",
        useful_flops=2.0 * 64**3,
    )


def test_a_program_that_exceeds_the_memory_does_not_fit():
    for memory, fits in ((10**9, True), (10, False)):
        program = squared(memory)
        assert program.fits is fits
        assert program.ok is fits
        assert program.work == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    ("lowered", "counted"),
    [("stablehlo.custom_call @tpu_custom_call(%0)", True), ('"chlo.ragged_dot"(%0, %1)', False)],
)
def test_a_program_that_is_not_written_out_is_counted_if_its_products_are_kernels(
    monkeypatch, lowered, counted
):
    monkeypatch.setattr(targets, "_text_of", lambda compiled, before, dump: (lowered, False))
    program = squared(10**9)
    assert not program.readable
    assert (program.work is not None) is counted


class Unwritable:
    """A compiled program whose HLO its client fails to write out."""

    def as_text(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")


def test_hlo_that_the_client_cannot_write_is_read_from_the_compilers_dump(tmp_path):
    lowered = jax.jit(lambda x: x).lower(1.0)
    assert targets._text_of(Unwritable(), lowered, tmp_path) == (lowered.as_text(), False)
    (tmp_path / "module_0000.jit_f.before_optimizations.txt").write_text("before")
    (tmp_path / "module_0000.jit_f.after_optimizations.txt").write_text(HLO)
    assert targets._text_of(Unwritable(), lowered, tmp_path) == (HLO, True)
    (tmp_path / "module_0001.jit_g.after_optimizations.txt").write_text("another program")
    assert targets._text_of(Unwritable(), lowered, tmp_path) == (lowered.as_text(), False)


# --- the verification of a target -------------------------------------------------------------


@pytest.fixture
def compiled(monkeypatch):
    """Names of what would be compiled, in order; every program fits and does the work once."""
    made: list[tuple[str, str | None, bool]] = []

    def program(what, target, implementation, gradient, **fields):
        made.append((what, implementation, gradient))
        name = implementation or "default (grouped)"
        return targets.TargetProgram(
            target=target.name,
            what=what,
            gradient=gradient,
            implementation=name,
            **{"fits": True, "work": 1.0} | fields,
        )

    def layer(target, name, shape, *, implementation, gradient):
        return program("layer", target, implementation, gradient)

    def parallel(target, name, shape, *, data, implementation, gradient):
        what = f"parallel, data={data}"
        return program(what, target, implementation, gradient, devices=len(target.devices))

    def step(target, model, *, implementation, all_devices=False):
        work = 1.3 if model.num_layers == 7 else 1.0
        what, devices = ("step over all", len(target.devices)) if all_devices else ("step", 1)
        return program(what, target, implementation, True, work=work, devices=devices)

    def target(name):
        devices = (None,) * math.prod(int(n) for n in name.partition(":")[2].split("x"))
        return targets.Target(name=name, platform="tpu", devices=devices, memory_bytes=10**9)

    monkeypatch.setattr(target_verification, "open_target", target)
    monkeypatch.setattr(target_verification, "experts_program", layer)
    monkeypatch.setattr(target_verification, "parallel_program", parallel)
    monkeypatch.setattr(target_verification, "training_program", step)
    return made


def test_a_verification_compiles_what_can_run_and_gives_the_reason_for_the_rest(compiled):
    shape = dataclasses.replace(LAYERS["small"], num_experts=4)
    seen = []
    report = verify_target("v5e:2x4", shape, on_program=seen.append)
    assert report.summary()["ok"]
    assert list(report.programs) == seen
    names = dict.fromkeys(name for what, name, _ in compiled if what == "layer")
    assert list(names) == [None, "ragged", "tiered", "capacity"]
    refused = {p.implementation: p.refused for p in report.programs if p.what == "layer"}
    assert "oracle" in refused["dense"]
    assert "kernels of tpu" in refused["active"]
    # Four experts over eight devices leave two copies of them.
    assert ("parallel, data=2", None, True) in compiled
    assert ("step over all", "ragged", True) in compiled
    assert not any(name == "capacity" for what, name, _ in compiled if what != "layer")


def test_only_an_unfit_default_fails_a_verification(compiled):
    assert not verify_target("v5e:2x4", model=LMConfig(num_layers=7)).summary()["ok"]
    named = verify_target("v5e:2x4", model=LMConfig(num_layers=7), implementations=["dense"])
    assert {p.ok for p in named.programs} == {True, False}
    assert named.summary()["ok"]
    with pytest.raises(ValueError, match=r"expected default or names among .*grouped.*, got what"):
        verify_target("v5e:2x4", implementations=["what"])


def changed(monkeypatch, name, **fields):
    """Every program that ``name`` compiles has these fields."""
    made = getattr(target_verification, name)
    monkeypatch.setattr(
        target_verification,
        name,
        lambda *args, **options: dataclasses.replace(made(*args, **options), **fields),
    )


OUT_OF_MEMORY = "JaxRuntimeError: RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory"
OUT_OF_VMEM = "JaxRuntimeError: RESOURCE_EXHAUSTED: E1001: CompileTimeScopedVmemOom:"


@pytest.mark.parametrize(
    ("fields", "excused"),
    [
        ({"fits": False}, True),
        ({"error": OUT_OF_MEMORY, "fits": False}, True),
        ({"error": OUT_OF_VMEM, "fits": False}, False),
        ({"fits": False, "expanded": True}, False),
        ({"fits": False, "work": 8.0}, False),
        ({"work": 8.0}, False),
    ],
)
def test_a_layer_too_large_for_one_of_many_devices_fails_for_no_other_reason(
    compiled, monkeypatch, fields, excused
):
    changed(monkeypatch, "experts_program", **fields)
    many = verify_target("v5e:2x4", implementations=[None])
    assert many.summary()["ok"] is excused
    assert many.summary()["too_large"] == (2 if excused else 0)
    one = verify_target("v5e:1x1", implementations=[None])
    assert not one.summary()["ok"]
    assert len(one.failed) == 2
    assert one.too_large == ()


def test_a_layer_whose_arguments_exceed_one_of_many_devices_is_not_compiled_for_one(
    compiled, monkeypatch
):
    # 0.8 GB of experts in a device of 1 GB, and as many bytes of gradients.
    shape = dataclasses.replace(LAYERS["small"], d_model=1024, d_ff=4096, num_experts=32)
    many = verify_target("v5e:2x4", shape, implementations=[None])
    assert ("layer", None, False) in compiled
    assert ("layer", None, True) not in compiled
    assert many.summary()["ok"]
    (row,) = [p for p in many.summary()["programs"] if "too_large_mb" in p]
    # 32 experts of 3 matrices and 1,024 tokens, both with their gradients, and as many outputs.
    assert row["too_large_mb"] == round((2 * 32 * 3 * 1024 * 4096 + 3 * 1024 * 1024) * 2 / 1e6, 1)
    sizes = ["--d-model", "1024", "--d-ff", "4096", "--num-experts", "32"]
    command = ["verify", "--target", "v5e:2x4", "--implementations", "default", *sizes]
    table = CliRunner().invoke(app, command)
    assert table.exit_code == 0
    assert "Programs that exceed the memory of one device: 1." in table.stdout
    # On a target of one device it is compiled, and its verdict counts.
    compiled.clear()
    verify_target("v5e:1x1", shape, implementations=[None])
    assert ("layer", None, True) in compiled


def test_every_program_is_announced_before_it_is_compiled(compiled):
    events = []
    report = verify_target(
        "v5e:2x4",
        on_start=lambda number, total, p: events.append((number, total, p.gradient, len(compiled))),
        on_program=lambda p: events.append(None),
    )
    started = [e for e in events if e is not None]
    assert [(number, before) for number, _, _, before in started] == [
        (i + 1, i) for i in range(len(compiled))
    ]
    assert {total for _, total, _, _ in started} == {len(compiled)}
    assert [gradient for _, _, gradient, _ in started] == [gradient for _, _, gradient in compiled]
    assert events.count(None) == len(report.programs) > len(compiled)


@pytest.mark.parametrize("fields", [{"fits": False}, {"error": OUT_OF_MEMORY, "fits": False}])
def test_a_program_over_all_devices_that_exceeds_them_fails(compiled, monkeypatch, fields):
    changed(monkeypatch, "parallel_program", **fields)
    assert len(verify_target("v5e:2x4", implementations=[None]).failed) == 2


def test_the_command_prints_a_table_or_json_and_exits_by_the_default(compiled, monkeypatch):
    run = CliRunner().invoke
    good = run(app, ["verify", "--target", "v5e:2x4", "--json", "--tokens", "64"])
    assert good.exit_code == 0
    rows = json.loads(good.stdout)["programs"]  # progress is on standard error
    made = [row for row in rows if "refused" not in row]
    lines = good.stderr.splitlines()
    assert lines[0] == f"1 of {len(made)}: compiling small, default, forward, 1 device"
    assert f"4 of {len(made)}: compiling small, default, forward + backward, 8 devices" in lines
    assert lines.count("  compiled in 0 s") == len(made) == len(lines) // 2
    assert {"refused", "what", "implementation", "ok"} <= set(rows[-1])
    monkeypatch.setattr(target_verification, "layer_shape", lambda model: LAYERS["small"])
    bad = dataclasses.replace(verify_target("v5e:2x4").programs[0], expanded=True)
    monkeypatch.setattr(target_verification, "experts_program", lambda *args, **_: bad)
    table = run(app, ["verify", "--target", "v5e:2x4", "--implementations", "default"])
    assert table.exit_code == 1
    assert "2 default programs fail." in table.stdout
    # Two lines a program where a table of ten columns has no room.
    lines = table.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("BAD "))
    assert "work / 1×" in lines[first + 1]
    assert "fits yes" in lines[first + 1]


def test_the_table_shows_the_model_of_memory_in_brackets():
    from moe_jax.cli.target_report import _cells

    cost = MemoryCost(argument_bytes=10**6, output_bytes=10**6, temp_bytes=2 * 10**6, step="send")
    program = targets.TargetProgram(
        target="v5e:2x4",
        what="layer",
        gradient=False,
        implementation="default",
        temp_bytes=3 * 10**6,
        argument_bytes=10**6,
        output_bytes=10**6,
        model=cost,
    )
    assert "5.0 (4.0)" in _cells(program.summary())
    assert "5.0" in _cells(dataclasses.replace(program, model=None).summary())
    # Programs without figures have as many cells, with the reason among the kernels.
    for reason in ({"error": "no"}, {"refused": "no"}):
        cells = _cells(dataclasses.replace(program, **reason).summary())
        assert len(cells) == 10
        assert cells[8].endswith("no")
    cells = _cells(dataclasses.replace(program, too_large=10**9).summary(), excused=True)
    assert cells[0] == "[dim]-[/dim]"
    assert cells[6:] == ["> 1,000.0", "no", "not compiled", ""]


def test_the_command_says_how_to_install_a_missing_compiler(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = CliRunner().invoke(app, ["verify", "--target", "v6e:2x4"])
    assert result.exit_code == 2
    assert "Run: pip install libtpu" in result.stderr


# --- the committed table ----------------------------------------------------------------------


def compiled_benchmark():
    path = Path(__file__).parents[2] / "benchmarks" / "compiled.py"
    spec = importlib.util.spec_from_file_location("compiled", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, json.loads((path.parent / "results" / "compiled.json").read_text())["rows"]


def test_the_committed_table_holds_what_the_default_promises():
    compiled, rows = compiled_benchmark()
    asked = {
        (r["target"], r["what"], r["passes"])
        for r in rows
        if r["asked"] == "default" and "error" not in r
    }
    assert len(asked) == len(compiled.TARGETS) * 3 * 2
    assert compiled.faults(rows) == []
    # Every implementation has its row on every target, with figures or with a reason.
    keys = {(r["target"], r["what"], r["asked"], r["passes"]) for r in rows}
    wanted = itertools.product(
        compiled.TARGETS, compiled.LAYERS_OF_THE_TABLE, compiled.ORDER, compiled.PASSES
    )
    assert keys == set(wanted)
    assert len(keys) == len(rows)
    assert set(compiled.ORDER) | {"grouped"} == {"default", *IMPLEMENTATIONS}  # it is the default
    (row,) = [r for r in rows if r["asked"] == "default"][:1]
    for broken in (
        {"work": 1.05},
        {"expanded": True},
        {"fits": False},
        {"error": "no"},
        {"skipped": "no"},
    ):
        assert len(compiled.faults([row | broken])) == 1


def test_the_page_shows_the_committed_table():
    compiled, rows = compiled_benchmark()
    page = (Path(__file__).parents[2] / "docs" / "accelerators.md").read_text()
    assert compiled.table(rows) in page


# --- the exchange -----------------------------------------------------------------------------


@pytest.mark.parametrize(("platform", "ragged"), [("cpu", False), ("tpu", True), (None, True)])
def test_the_ragged_exchange_runs_where_the_platform_has_it(platform, ragged):
    device = None
    if platform is not None:
        kind = {"cpu": "cpu", "tpu": "TPU v5 lite"}[platform]
        device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    mesh = AbstractMesh((2,), ("expert",), axis_types=(AxisType.Auto,), abstract_device=device)
    router, ffn = TopK(num_experts=2, k=1), FeedForward()
    init = functools.partial(init_moe_layer, router, ffn, d_model=8, d_ff=8)
    params = jax.eval_shape(init, jax.random.key(0))
    layer = functools.partial(
        sharded_moe_layer, mesh=mesh, parallel=parallel_of(mesh, exchange="ragged")
    )
    traced = jax.make_jaxpr(functools.partial(layer, router, ffn))(
        params, router.init_state(), jax.ShapeDtypeStruct((4, 8), jnp.float32)
    )
    assert ("ragged_all_to_all" in str(traced)) is ragged


@needs_libtpu
def test_a_training_step_over_eight_chips_runs_kernels_and_sends_four_messages_a_layer():
    model = LMConfig(num_layers=2, num_heads=2, num_experts=8, k=2, batch_size=8, length=64)
    program = target_step.training_program(open_target("v5e:2x4"), model, all_devices=True)
    assert program.error is None
    # Forward two products. Backward four, and the first of the forward pass once more.
    assert program.kernels == {"tpu_custom_call": 7}
    assert program.work is None  # the rounds of the dropless exchange are known at run time only
    assert program.collectives["all-to-all"].count == 8  # four a layer
    assert program.fits


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
def test_the_kernels_of_a_program_for_v6e_are_read_although_its_client_cannot_write_them():
    program = experts_program(open_target("v6e:2x4"), "small", LAYERS["small"])
    assert program.error is None
    assert program.readable
    assert program.kernels == {"tpu_custom_call": 3}
    assert program.ok


@needs_libtpu
def test_float16_compiles_for_a_tpu_whose_kernels_cannot_load_it():
    ffn = FeedForward(gated=True)
    router = TopK(num_experts=4, k=2)
    params = jax.eval_shape(
        functools.partial(init_moe_layer, router, ffn, d_model=128, d_ff=128), jax.random.key(0)
    )
    x = jax.ShapeDtypeStruct((16, 128), jnp.float16)

    def loss(params, x):
        return moe_layer(router, ffn, params, router.init_state(), x)[0].astype(jnp.float32).sum()

    program = targets.compile_program(
        open_target("v5e:2x2"),
        jax.grad(loss),
        (params, x),
        what="float16",
        gradient=True,
        implementation="default",
    )
    assert program.error is None


@needs_libtpu
def test_the_model_of_memory_agrees_with_the_compiler():
    shape = target_layers.LayerShape(d_model=2048, d_ff=512, num_experts=8, k=2, tokens=8192)
    program = parallel_program(open_target("v5e:2x4"), "rows of 67 MB", shape, gradient=True)
    assert program.error is None
    assert program.model is not None
    assert program.argument_bytes == program.model.argument_bytes
    assert program.output_bytes == pytest.approx(program.model.output_bytes, abs=4096)  # a tuple
    live = program.live_bytes - program.argument_bytes - program.output_bytes
    assert program.model.temp_bytes == pytest.approx(live, rel=0.1)
    assert program.summary()["model_temp_mb"] == round(program.model.temp_bytes / 1e6, 1)


@needs_libtpu
def test_the_model_of_memory_counts_the_gradients_that_a_data_axis_sums():
    # Few rows and large experts: 8 MB for the gradient of one stack of matrices, 0.3 MB for the rows.
    sizes = {"d_model": 1024, "d_ff": 1024, "num_experts": 16, "k": 1, "tokens": 128}
    shape = target_layers.LayerShape(**sizes)
    program = parallel_program(open_target("v5e:2x4"), "few", shape, data=2, gradient=True)
    assert program.error is None
    assert program.collectives["all-reduce"].num_bytes >= 3 * 4 * 1024 * 1024 * 2
    assert program.argument_bytes == program.model.argument_bytes
    assert program.model.step == "gradient of down"
    assert program.model.temp_bytes > 4 * 1024 * 1024 * 2


@needs_libtpu
@pytest.mark.parametrize(
    ("exchange", "sent"),
    [("all_to_all", {"all-to-all": 2}), ("ragged", {"all-to-all": 1, "ragged-all-to-all": 2})],
)
def test_experts_over_eight_chips_send_rows_there_and_back(exchange, sent):
    target = open_target("v5e:2x4")
    shape = target_layers.LayerShape(d_model=128, d_ff=128, num_experts=8, k=2, tokens=128)
    program = parallel_program(target, "small", shape, exchange=exchange)
    assert program.error is None
    assert {kind: traffic.count for kind, traffic in program.collectives.items()} == sent
    assert program.kernels == {"tpu_custom_call": 3}
    assert (program.model is not None) is (exchange == "all_to_all")
