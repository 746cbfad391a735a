"""Checkpoints: what is restored is what was saved, bit for bit, in any process (R11, R13, B01-B03).

A damaged or truncated checkpoint is not restored. The ids are those of docs/promises.md.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from moe_jax.checkpoint import (
    FORMAT,
    Checkpoint,
    CheckpointError,
    load_metadata,
    reader,
    restore,
    save,
    save_async,
    sealed,
)
from moe_jax.config import PRESETS, build_router
from moe_jax.interop.rules import MoEPlusPlus
from moe_jax.routers import DynamicK, ExpertThreshold, MinP, ReLURouter, Router, TopAny, TopK, TopP


def bits(x: Any) -> tuple[str, tuple[int, ...], bytes]:
    host = np.asarray(x)
    return host.dtype.name, host.shape, host.tobytes()


def same(a: Any, b: Any) -> bool:
    """Whether two trees have the same containers, types and bits."""
    same_tree = jax.tree.structure(a) == jax.tree.structure(b)
    return same_tree and list(map(bits, jax.tree.leaves(a))) == list(map(bits, jax.tree.leaves(b)))


def calibrated(router: DynamicK) -> Any:
    """A state with values that no ``init_state`` has."""
    state = router.init_state()
    state = jax.tree.map(lambda x: x + jnp.ones_like(x), state)
    thresholds = jnp.linspace(0.1, 0.9, router.max_k - router.min_k, dtype=jnp.float32)
    return dataclasses.replace(state, thresholds=thresholds)


def example() -> Checkpoint:
    router = DynamicK(num_experts=8, min_k=1, max_k=4, difficulty="activation_norm")
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.float32)
    return Checkpoint(
        params={"layer_0": {"router": {"kernel": kernel}}},
        routers={"layer_0": router},
        states={"layer_0": calibrated(router)},
        config=PRESETS["high_accuracy"],
        metadata={"step": 3, "bits_per_byte": 1.25, "data": ["a.py", "b.py"], "none": None},
    )


class Momentum(NamedTuple):
    count: Any
    moments: Any


def refused(call, *args, **kwargs) -> str:
    """The message of a refusal, which always says what was expected and what it got."""
    with pytest.raises(CheckpointError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "expected" in text
    assert "got" in text
    assert text.rstrip().endswith("."), "it ends with what to do"
    return text


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp("checkpoints") / "pristine", example())


@pytest.fixture
def copied(pristine, tmp_path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "copied"))


# --- what comes back ------------------------------------------------------------------------


def test_everything_comes_back_bit_for_bit(pristine):  # R13
    saved, actual = example(), restore(pristine)
    assert same(actual.params, saved.params)
    assert same(actual.states, saved.states)
    assert actual.routers == saved.routers
    assert actual.config == saved.config
    assert actual.metadata == saved.metadata
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves((actual.params, actual.states)))
    router, state = actual.routers["layer_0"], actual.states["layer_0"]
    assert type(state) is type(router.init_state())
    assert jax.eval_shape(lambda: state) == jax.eval_shape(router.init_state)


def test_every_dtype_and_container(tmp_path):
    nan_payloads = np.array([0x7FC01234, 0xFFC00001, 0x7F800001, 0x80000000], np.uint32)
    params = {
        "float32": nan_payloads.view(np.float32),
        "bfloat16": jnp.array([1.1, jnp.nan, -0.0], jnp.bfloat16),
        "float16": np.array([1.1, np.inf], np.float16),
        "float8": jnp.ones((3,), jnp.float8_e4m3fn),
        "int4": jnp.array([-8, 7], jnp.int4),
        "int8": np.array([-128, 127], np.int8),
        "uint32": np.array(2**32 - 1, np.uint32),
        "bool": np.array([True, False]),
        "complex64": np.array([1 + 2j], np.complex64),
        "scalar": jnp.float32(3.25),
        "numpy scalar": np.float32(3.25),
        "empty": np.zeros((0, 3), jnp.bfloat16),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)),
        "strided": np.arange(10, dtype=np.int32)[::3],
        "lists": [np.ones(1, np.float32), (np.zeros(2, np.float32),), [], (), {}, None],
        "a.b/c é": {"": np.ones(1, np.float32)},
    }
    actual = restore(save(tmp_path / "c", Checkpoint(params=params))).params
    assert same(actual, params)
    assert {x.weak_type for x in jax.tree.leaves(actual)} == {False}


@pytest.mark.parametrize("params", [None, {}, [], np.ones(3, np.float32), (np.ones((), np.int32),)])
def test_small_trees(tmp_path, params):
    actual = restore(save(tmp_path / "c", Checkpoint(params=params)))
    assert same(actual.params, params)
    assert (actual.routers, actual.states, actual.config, actual.metadata) == ({}, {}, None, {})


def test_states_of_several_rules_keep_their_types(tmp_path):
    routers: dict[str, Router] = {
        "a": TopK(num_experts=4, k=2),
        "b/c": DynamicK(num_experts=4, min_k=2, max_k=2),  # no thresholds: an array of size 0
        "d": TopP(num_experts=4, p=0.5),
        "e": ExpertThreshold(num_experts=4, target_k=1.5),
        "f": build_router(PRESETS["production"]),
        "g": ReLURouter(num_experts=4, target_k=1.5),
        "h": TopAny(num_experts=4, min_k=0),
    }
    states = {name: router.init_state() for name, router in routers.items()}
    actual = restore(save(tmp_path / "c", Checkpoint(routers=routers, states=states)))
    assert same(actual.states, states)
    assert actual.routers == routers
    assert [type(actual.states[n]) for n in routers] == [type(states[n]) for n in routers]


ROUTE = """
import sys
import jax, numpy as np
from moe_jax.checkpoint import restore
found = restore(sys.argv[1])
x = np.load(sys.argv[2])
routing = jax.jit(found.routers["layer_0"])(
    found.params["layer_0"]["router"], found.states["layer_0"], x)
np.savez(sys.argv[3], indices=routing.expert_indices, weights=routing.combine_weights)
assert "moe_jax.interop.rules" not in sys.modules
print(restore(sys.argv[4]).routers["a"])
"""


def test_a_fresh_process_routes_bit_for_bit_the_same(pristine, tmp_path):  # R13
    """And it opens a rule of a single model, which nobody imported there."""
    rule = MoEPlusPlus(num_experts=4)
    own = Checkpoint(routers={"a": rule}, states={"a": rule.init_state()})
    x = np.random.default_rng(1).normal(size=(64, 16)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    saved = example()
    here = jax.jit(saved.routers["layer_0"])(
        saved.params["layer_0"]["router"], saved.states["layer_0"], x
    )
    arguments = [str(pristine), str(tmp_path / "x.npy"), str(tmp_path / "there.npz")]
    arguments.append(str(save(tmp_path / "own", own)))
    root = str(Path(__file__).parents[2])
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", ROUTE, *arguments],
        env={**os.environ, "PYTHONPATH": root},
        check=True,
        timeout=120,
        stdout=subprocess.PIPE,
    )
    assert ended.stdout.decode().strip() == repr(rule)
    with np.load(tmp_path / "there.npz") as there:
        assert bits(there["indices"]) == bits(here.expert_indices)
        assert bits(there["weights"]) == bits(here.combine_weights)


def test_orbax_alone_can_read_the_arrays(pristine):
    name, kernel = "layer_0/router/kernel", example().params["layer_0"]["router"]["kernel"]
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as orbax:
        target = {name: jax.ShapeDtypeStruct(kernel.shape, kernel.dtype)}
        actual = orbax.restore(
            pristine / "arrays" / "params", args=ocp.args.StandardRestore(target)
        )
    assert bits(actual[name]) == bits(kernel)


def test_inside_a_running_event_loop(tmp_path):
    """Notebooks and servers have one, and orbax runs its own."""

    async def main() -> Checkpoint:
        save(tmp_path / "c", Checkpoint(params=np.ones(3, np.float32)))
        return restore(tmp_path / "c")

    assert same(asyncio.run(main()).params, np.ones(3, np.float32))


def test_no_array_comes_back_twice(tmp_path):
    """G: whatever was saved, all of it can be donated at once, and nothing else is lost."""
    router, one = DynamicK(num_experts=4, min_k=2, max_k=2), jnp.ones((2, 2))
    twice = {"a": one, "b": one, "empty": jnp.zeros((0, 2)), "none": jnp.zeros((0, 2))}
    state = router.init_state()
    path = save(
        tmp_path / "c",
        Checkpoint(
            params=twice,
            routers={"x": router, "y": router},
            states={"x": state, "y": state},
            extra={"optimizer": twice},
        ),
    )
    actual = restore(path, expected=Checkpoint(extra={"optimizer": twice}))
    trees = (actual.params, actual.states, actual.extra)
    assert len({id(leaf) for leaf in jax.tree.leaves(trees)}) == len(jax.tree.leaves(trees))
    step = jax.jit(lambda t: jax.tree.map(lambda v: v + 1, t), donate_argnums=0)
    jax.block_until_ready(step(trees))


# --- metadata and expectations --------------------------------------------------------------


@pytest.mark.parametrize("name", ["run[ab]", "a*b?", "back\\slash", "gs:", "a b", "\u00e9[x]"])
def test_a_path_with_any_characters_is_written_and_read(tmp_path, name):
    """Orbax took "[ab]" for a pattern: it saved without an error what nothing could restore."""
    path = save(tmp_path / name / "one", Checkpoint(params={"w": jnp.arange(3.0)}))
    np.testing.assert_array_equal(restore(path).params["w"], [0.0, 1.0, 2.0])
    moved = path.rename(path.with_name("[two]"))
    np.testing.assert_array_equal(restore(moved).params["w"], [0.0, 1.0, 2.0])


def test_metadata_without_arrays(copied):  # B01
    shutil.rmtree(copied / "arrays")
    saved, report = example(), load_metadata(copied)
    router = saved.routers["layer_0"]
    assert report["format"] == FORMAT
    assert report["metadata"] == saved.metadata
    assert report["config"] == PRESETS["high_accuracy"].to_json()
    assert report["routers"] == {
        "layer_0": {"router": router.to_json(), "fingerprint": router.fingerprint()}
    }
    assert report["arrays"]["params"] == {"layer_0/router/kernel": "float32[16, 8]"}
    assert report["arrays"]["states"]["layer_0/thresholds"] == "float32[3]"
    assert report["versions"]["jax"] == jax.__version__
    assert len(report["checksum"]) == 64
    assert report["num_bytes"] > 0
    json.dumps(report)
    assert "missing" in refused(restore, copied)


def test_extras_come_on_request_in_their_own_containers(tmp_path):
    optimizer = (Momentum(jnp.int32(7), {"w": jnp.full((2,), 0.5, jnp.bfloat16)}), None)
    path = save(
        tmp_path / "c",
        Checkpoint(params={"w": jnp.ones(2)}, extra={"optimizer": optimizer, "ema": jnp.ones(2)}),
    )
    assert restore(path).extra == {}
    shapes = jax.eval_shape(lambda: optimizer)
    actual = restore(path, expected=Checkpoint(extra={"optimizer": shapes}))
    assert set(actual.extra) == {"optimizer"}
    assert same(actual.extra["optimizer"], optimizer)
    assert isinstance(actual.extra["optimizer"][0], Momentum)

    message = refused(restore, path, expected=Checkpoint(extra={"optimiser": shapes}))
    assert "ema, optimizer" in message
    wrong = (Momentum(jnp.int32(0), {"w": jnp.ones((2,), jnp.float32)}), None)
    message = refused(restore, path, expected=Checkpoint(extra={"optimizer": wrong}))
    assert "0/moments/w: bfloat16[2] instead of float32[2]" in message


def test_params_in_other_containers_need_an_example(tmp_path):
    params = {"inner": Momentum(jnp.int32(1), [jnp.ones(2)])}
    path = save(tmp_path / "c", Checkpoint(params=params))
    message = refused(restore, path)
    assert "Momentum" in message
    assert "expected=Checkpoint(params=" in message
    shapes = jax.eval_shape(lambda: params)
    assert same(restore(path, expected=Checkpoint(params=shapes)).params, params)


def test_expectations_are_checked(pristine):
    saved = example()
    assert same(restore(pristine, expected=saved).params, saved.params)
    wider = {"layer_0": {"router": {"kernel": jax.ShapeDtypeStruct((32, 8), jnp.float32)}}}
    message = refused(restore, pristine, expected=Checkpoint(params=wider))
    assert "layer_0/router/kernel: float32[16, 8] instead of float32[32, 8]" in message
    message = refused(restore, pristine, expected=Checkpoint(params={"other": jnp.ones(1)}))
    assert "other: nothing instead of float32[1]" in message
    for routers in (
        {"layer_0": DynamicK(num_experts=8, min_k=1, max_k=3)},
        {"layer_1": saved.routers["layer_0"]},
    ):
        assert "routers" in refused(restore, pristine, expected=Checkpoint(routers=routers))


# --- what is not whole is not restored ------------------------------------------------------


def every_file(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_any_file_lost_cut_short_or_flipped_is_refused(copied):
    assert len(every_file(copied)) > 8
    for file in every_file(copied):
        good = file.read_bytes()
        file.unlink()
        refused(restore, copied)
        for bad in (
            b"",
            good[: len(good) // 2],
            good[:-1],
            good + b"\0",
            *(
                bytes([*good[:i], good[i] ^ bit, *good[i + 1 :]])
                for i in {0, len(good) // 2, len(good) - 1}
                if good
                for bit in (1, 128)
            ),
        ):
            if bad != good:
                file.write_bytes(bad)
                refused(restore, copied)
        file.write_bytes(good)
    assert same(restore(copied).params, example().params), "and whole again it is accepted"


def test_the_manifest_is_sealed_everywhere(copied):
    """Whitespace is sealed too, so there is no place where damage could hide."""
    file = copied / "manifest.json"
    good = file.read_bytes()
    for place in range(0, len(good), 13):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        refused(load_metadata, copied)
    file.write_bytes(good.replace(b"\n", b"\r\n"))  # as a copy in text mode would
    assert "damaged or edited" in refused(load_metadata, copied)


def test_damage_is_told_by_name(copied):
    data = max(every_file(copied / "arrays"), key=lambda file: file.stat().st_size)
    data.write_bytes(data.read_bytes()[:-1] + b"\x55")
    message = refused(restore, copied)
    assert str(data) in message
    assert "SHA-256" in message
    assert "backup" in message


def test_a_file_that_nobody_wrote_is_refused(copied):
    (copied / "arrays" / "params" / "more").write_text("x")
    assert "arrays/params/more" in refused(restore, copied)


def test_foreign_folders_are_refused(tmp_path):
    assert "nothing there" in refused(restore, tmp_path / "none")
    (tmp_path / "file").write_text("x")
    assert "a file" in refused(restore, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "manifest.json" in refused(restore, tmp_path / "empty")
    with ocp.StandardCheckpointer() as writer:
        writer.save(tmp_path / "orbax", {"w": np.ones(3, np.float32)})
    assert "manifest.json" in refused(restore, tmp_path / "orbax")
    (tmp_path / "empty" / "manifest.json").write_text('{"name": "a web app"}')
    assert "something else" in refused(restore, tmp_path / "empty")
    (tmp_path / "empty" / "manifest.json").write_text("[" * 100_000)
    refused(restore, tmp_path / "empty")


def reseal(folder: Path, **changes: Any) -> None:
    """Another program's manifest: changed and sealed again, so that only its meaning is wrong."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["checksum"]
    (folder / "manifest.json").write_text(sealed.sealed_text({**manifest, **changes}))


def test_a_newer_format_says_what_to_do(copied):
    reseal(copied, format=FORMAT + 1, library_version="9.9")
    for call in (restore, load_metadata):
        message = refused(call, copied)
        assert f"got format {FORMAT + 1}" in message
        assert "9.9" in message
        assert "Upgrade" in message


def test_a_rule_that_is_unknown_or_reads_differently(copied):
    entry = load_metadata(copied)["routers"]["layer_0"]
    reseal(copied, routers={"layer_0": {**entry, "fingerprint": "0" * 32}})
    assert "reads the rule differently" in refused(restore, copied)
    unknown = {**entry, "router": {**entry["router"], "kind": "NoSuchRule"}}
    reseal(copied, routers={"layer_0": unknown})
    assert "NoSuchRule" in refused(restore, copied)


def test_a_configuration_of_another_version(copied):
    reseal(copied, config={"router_config": {"num_expert": 8}})
    assert "Did you mean num_experts?" in refused(restore, copied)


def test_a_state_that_does_not_belong_to_its_rule_is_refused(copied):
    """L: the rule of a manifest with the arrays of another state, as a copied state would have."""
    other = DynamicK(num_experts=8, min_k=1, max_k=3, difficulty="activation_norm")
    entry = {"router": other.to_json(), "fingerprint": other.fingerprint()}
    reseal(copied, routers={"layer_0": entry})
    message = refused(restore, copied)
    assert "layer_0/thresholds: float32[3] instead of float32[2]" in message
    assert "belongs to another rule or to other sizes" in message


def test_replaced_while_it_is_read(copied, pristine, monkeypatch):
    """Files are opened by path one by one: parts of two checkpoints must not be mixed."""
    read = reader.read_arrays

    def and_then_replaced(folder, item, *rest):
        actual = read(folder, item, *rest)
        if item == "params":
            save(copied, dataclasses.replace(example(), metadata={"step": 4}), overwrite=True)
        return actual

    monkeypatch.setattr(reader, "read_arrays", and_then_replaced)
    assert "replaced while it was read" in refused(restore, copied)


# --- saving is all or nothing ---------------------------------------------------------------


def test_nothing_is_replaced_unasked(tmp_path):
    path = save(tmp_path / "deep" / "er" / "c", Checkpoint(params=jnp.ones(1)))
    assert "overwrite=True" in refused(save, path, Checkpoint(params=jnp.zeros(1)))
    assert float(restore(path).params[0]) == 1
    save(path, Checkpoint(params=jnp.zeros(2)), overwrite=True)
    assert restore(path).params.shape == (2,)
    assert [entry.name for entry in path.parent.iterdir()] == ["c"], "nothing is left beside it"

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("x")
    for wrong in (tmp_path / "home", tmp_path / "home" / "thesis.txt"):
        assert "Only checkpoints" in refused(save, wrong, Checkpoint(), overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "x"


def test_a_link_is_followed_not_replaced(tmp_path):
    path = save(tmp_path / "v1", Checkpoint(params=jnp.ones(1)))
    (tmp_path / "current").symlink_to(path)
    save(tmp_path / "current", Checkpoint(params=jnp.zeros(1)), overwrite=True)
    assert (tmp_path / "current").is_symlink()
    assert float(restore(path).params[0]) == float(restore(tmp_path / "current").params[0]) == 0


@pytest.mark.parametrize("step", ["file_digests", "sealed_text", "sync_folder", "move_into_place"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_save_that_fails_at_any_step_changes_nothing(tmp_path, monkeypatch, step, overwrite):
    path = tmp_path / "c"
    if overwrite:
        save(path, Checkpoint(params=jnp.ones(1)))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sealed, step, full)
        message = refused(save, path, Checkpoint(params=jnp.zeros(1)), overwrite=overwrite)
    assert "No space left" in message
    assert [entry.name for entry in tmp_path.iterdir()] == (["c"] if overwrite else [])
    if overwrite:
        assert float(restore(path).params[0]) == 1


KILLED = """
import os, signal, sys
import numpy as np
from moe_jax.checkpoint import Checkpoint, save, sealed
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
sealed.move_into_place = die
save(sys.argv[1], Checkpoint(params=np.zeros(1, np.float32)), overwrite=True)
"""


def test_a_process_killed_before_the_rename_leaves_the_old_one(tmp_path):
    path = save(tmp_path / "c", Checkpoint(params=jnp.ones(1)))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=env, timeout=120)
    assert ended.returncode == -9
    assert float(restore(path).params[0]) == 1
    save(path, Checkpoint(params=jnp.full(1, 2.0)), overwrite=True)
    assert float(restore(path).params[0]) == 2


def test_the_second_rename_of_an_overwrite_fails_or_never_comes(tmp_path, monkeypatch):
    path = save(tmp_path / "c", Checkpoint(params=jnp.ones(1)))
    rename = os.rename

    def second_fails(source, target):  # orbax renames too, inside the new folder
        if Path(target) == path and ".saving-" in str(source):
            raise OSError(5, "Input/output error")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", second_fails)
        message = refused(save, path, Checkpoint(params=jnp.zeros(1)), overwrite=True)
    assert "Input/output error" in message
    assert float(restore(path).params[0]) == 1, "the old one was put back"

    rename(path, tmp_path / ".c.replaced-0")  # as a power cut between the two leaves it
    message = refused(restore, path)
    assert f"rename {tmp_path / '.c.replaced-0'} to it" in message
    rename(tmp_path / ".c.replaced-0", tmp_path / ".run[1].replaced-0")
    assert ".run[1].replaced-0 to it" in refused(restore, tmp_path / "run[1]")


def test_an_asynchronous_save_keeps_the_values_of_the_call(tmp_path):
    host, device = np.ones(4, np.float32), jnp.full((4,), 2.0)
    handle = save_async(tmp_path / "c", Checkpoint(params={"host": host, "device": device}))
    host[:] = 9
    device.delete()
    assert handle.wait(timeout=60) == (tmp_path / "c").resolve()
    assert handle.done()
    actual = restore(tmp_path / "c").params
    assert actual["host"].tolist() == [1] * 4
    assert actual["device"].tolist() == [2] * 4


def test_an_asynchronous_save_tells_its_failure(tmp_path, monkeypatch):
    save(tmp_path / "c", Checkpoint())
    refused(save_async, tmp_path / "c", Checkpoint())  # what can be known at once is told at once

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sealed, "move_into_place", full)
    handle = save_async(tmp_path / "d", Checkpoint())
    assert "No space left" in refused(handle.wait)
    assert not (tmp_path / "d").exists()


ROUTER = TopK(num_experts=4, k=2)
STATE = ROUTER.init_state()


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"params": {"w": 1.0}}, ["params: w", "a float", "jnp.asarray"]),
        ({"params": {"w": "text"}}, ["params: w", "a str"]),
        ({"params": {"w": np.array(["a"])}}, ["params: w", "<U1", "metadata"]),
        ({"params": {"w": np.array([None])}}, ["params: w", "object"]),
        ({"params": {"w": np.ones(2)}}, ["params: w", "float64", "jax_enable_x64"]),
        ({"params": {"w": jax.random.key(0)}}, ["params: w", "random key", "key_data"]),
        ({"params": {"a/b": np.int32(1), "a": {"b": np.int32(2)}}}, ["'a/b' twice"]),
        ({"routers": {"a": ROUTER}}, ["states", "(a)", "init_state()"]),
        ({"states": {"a": STATE}}, ["states", "got a"]),
        (
            {
                "routers": {"a": ROUTER},
                "states": {"a": dataclasses.replace(STATE, expert_bias=jnp.zeros(5))},
            },
            ["states['a']", "expert_bias: float32[5] instead of float32[4]"],
        ),
        # L: a state of another rule, or of the same rule for other sizes.
        (
            {
                "routers": {"a": DynamicK(num_experts=4, min_k=1, max_k=2)},
                "states": {"a": DynamicK(num_experts=4, min_k=1, max_k=4).init_state()},
            },
            [
                "states['a']",
                "DynamicK.init_state()",
                "thresholds: float32[3] instead of float32[1]",
            ],
        ),
        (
            {
                "routers": {"a": TopP(num_experts=4)},
                "states": {"a": MinP(num_experts=4).init_state()},
            },
            ["states['a']", "TopP.init_state()", "MinP"],
        ),
        (
            {
                "routers": {
                    "a": DynamicK(num_experts=4, min_k=1, max_k=2, difficulty=lambda x, c: x[:, 0])
                },
                "states": {"a": None},
            },
            ["routers['a']", "register_estimator"],
        ),
        ({"metadata": {"loss": float("nan")}}, ["metadata['loss']", "float(x)"]),
        ({"metadata": {"w": np.ones(1)}}, ["metadata['w']", "extra"]),
        ({"metadata": {"counts": {1: 2}}}, ["metadata['counts']", "str()"]),
        ({"extra": {"../x": jnp.ones(1)}}, ["extra", "'../x'"]),
        ({"extra": {"ema": {"w": 1}}}, ["extra-ema: w", "a int"]),
    ],
)
def test_what_cannot_be_saved_is_refused_before_the_disk_is_touched(tmp_path, given, parts):
    message = refused(save, tmp_path / "c", Checkpoint(**given))
    for part in parts:
        assert part in message, message
    assert list(tmp_path.iterdir()) == []
