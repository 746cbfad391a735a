"""Reading checkpoints: the file format, shards, whole folders, and every way they can be wrong."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.interop import load_hf_block, moe_block_from_hf
from moe_jax.interop.safetensors import SafetensorsFile, SafetensorsFolder

RNG = np.random.default_rng(0)
NAMES = {
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "F16": np.float16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
}


def write(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """The format in ten lines, independent of the reader."""
    header, blobs, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, t in tensors.items():
        kind = next(k for k, d in NAMES.items() if np.dtype(d) == t.dtype)
        blob = np.ascontiguousarray(t).tobytes()
        offsets = [at, at + len(blob)]
        header[name] = {"dtype": kind, "shape": list(t.shape), "data_offsets": offsets}
        blobs.append(blob)
        at += len(blob)
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + b"".join(blobs))


def some(*shape: int, dtype=np.float32) -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


# --- the format -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(NAMES.values()))
def test_round_trip(tmp_path, dtype):
    # An odd header length, so that the numbers are not aligned.
    want = {
        "a": some(3, 5, dtype=dtype),
        "bb": some(7, dtype=dtype),
        "empty": some(0, 4, dtype=dtype),
    }
    write(tmp_path / "f.safetensors", want)
    got = SafetensorsFile(tmp_path / "f.safetensors")
    assert dict(got).keys() == want.keys()
    for name, t in want.items():
        assert got[name].dtype == t.dtype
        np.testing.assert_array_equal(got[name], t)
        assert not got[name].flags.writeable


def test_nothing_is_read_before_it_is_used(tmp_path):
    """A file of a terabyte (of holes) opens at once, and its last number can be had."""
    path, size = tmp_path / "big.safetensors", 2**40
    entries = {
        "huge": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]},
        "last": {"dtype": "F32", "shape": [1], "data_offsets": [size, size + 4]},
    }
    head = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head)
    os.truncate(path, 8 + len(head) + size + 4)
    with path.open("r+b") as f:
        f.seek(-4, os.SEEK_END)
        f.write(struct.pack("<f", 1.5))
    file = SafetensorsFile(path)
    assert file["last"][0] == 1.5
    assert file["huge"][-1] == 0.0


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("empty", lambda b: b""),
        ("short", lambda b: b[:5]),
        ("cut off", lambda b: b[:-1]),
        ("header too long", lambda b: struct.pack("<Q", 10**12) + b[8:]),
        ("header is not JSON", lambda b: b[:8] + b"x" * (len(b) - 8)),
        ("header is a list", lambda b: struct.pack("<Q", 2) + b"[]"),
        ("dtype is a number", lambda b: b.replace(b'"F32"', b"12345")),
        ("shape of fractions", lambda b: b.replace(b"[2, 3]", b"[6.0 ]")),
        ("a name twice", lambda b: b.replace(b'"bb"', b'"a" ')),
        ("two tensors in the same bytes", lambda b: b.replace(b"[24, 48]", b"[20, 44]")),
        ("too deep", lambda b: struct.pack("<Q", 200_000) + b"[" * 200_000 + b[8:]),
        ("negative offset", lambda b: b.replace(b"[0, 24]", b"[-4,20]")),
        ("shape and bytes disagree", lambda b: b.replace(b"[2, 3]", b"[2, 2]", 1)),
    ],
)
def test_broken_files_are_refused(tmp_path, name, spoil):
    path = tmp_path / "f.safetensors"
    write(path, {"a": some(2, 3), "bb": some(2, 3)})
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(ValueError, match="expected a whole safetensors file, got"):
        SafetensorsFile(path)


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "F6_E2M3", "F8_E4M3FNUZ", "NEW"])
def test_a_dtype_of_another_tensor_does_not_matter(tmp_path, dtype):
    """A packed dtype in one layer hinders neither the file nor the block of another layer."""
    checkpoint(tmp_path, "mixtral", shards=1)
    path = tmp_path / "model.safetensors"
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + size])
    numbers = path.read_bytes()[8 + size :]
    name, end = "model.layers.0.mlp.experts.0.w1.weight", len(numbers)
    header[name] = {"dtype": dtype, "shape": [4, 2], "data_offsets": [end, end + 8]}
    head = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(head)) + head + numbers + bytes(8))
    file = SafetensorsFile(path)
    assert name in file
    assert file.shape(name) == (4, 2)
    assert load_hf_block(tmp_path, 1).router.num_experts == E
    if dtype == "F8_E8M0":  # bytes with a meaning: a scale, but no weight
        assert file[name].dtype == ml_dtypes.float8_e8m0fnu
    else:
        with pytest.raises(
            ValueError, match=rf"expected '{name}' in one of the dtypes.*got {dtype}"
        ):
            file[name]
        with pytest.raises(ValueError, match=rf"got {dtype}"):
            load_hf_block(tmp_path, 0)


def test_a_file_of_empty_tensors_alone(tmp_path):
    write(tmp_path / "f.safetensors", {"a": some(0, 4), "b": some(0)})
    assert {n: t.shape for n, t in SafetensorsFile(tmp_path / "f.safetensors").items()} == {
        "a": (0, 4),
        "b": (0,),
    }


def _index(folder: Path) -> tuple[Path, dict]:
    path = folder / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_an_index_and_shards_that_disagree(tmp_path):
    checkpoint(tmp_path, "mixtral", shards=3)
    path, index = _index(tmp_path)
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    right = index["weight_map"][name]
    wrong = next(f for f in index["weight_map"].values() if f != right)
    # The index names another shard, then none.
    index["weight_map"][name] = wrong
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"expected '{name}' in the shard '{wrong}'.*without it"):
        load_hf_block(tmp_path, 1)
    del index["weight_map"][name]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"every tensor of the block in the index, got '{name}'"):
        load_hf_block(tmp_path, 1)


def test_a_missing_shard_is_named(tmp_path):
    checkpoint(tmp_path, "mixtral", shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard 'model-00002-of-00003.*Download it"):
        load_hf_block(tmp_path, 1)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {"a": null}}',
        '{"weight_map": {"a": 3}}',
        "x",
    ],
)
def test_a_broken_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"index\.json: expected a JSON object with a 'weight_map'"
    ):
        SafetensorsFolder(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "x", "[" * 100_000])
def test_a_broken_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: expected"):
        load_hf_block(tmp_path, 0)


@pytest.mark.parametrize(("layer", "error"), [(-1, ValueError), ("1", TypeError), (1.0, TypeError)])
def test_a_layer_is_a_number_from_0(tmp_path, layer, error):
    with pytest.raises(error, match="layer: expected"):
        load_hf_block(tmp_path, layer)


def test_a_prefix_that_no_tensor_has(tmp_path):
    checkpoint(tmp_path, "mixtral", shards=1)
    with pytest.raises(ValueError, match=r"under the prefix 'model\.layers\.7\.', got none"):
        load_hf_block(tmp_path, 7, prefix="model.layers.7.")


def test_an_index_may_not_leave_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../other.safetensors"}})
    )
    with pytest.raises(ValueError, match="names of files in this folder"):
        SafetensorsFolder(tmp_path)


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(FileNotFoundError, match="a pickle, which can run any code"):
        load_hf_block(tmp_path, 0)


# --- whole checkpoints ----------------------------------------------------------------------

E, D, F = 4, 8, 6


def fused(shared: bool, bias: bool) -> dict[str, np.ndarray]:
    """A block as transformers has it in memory."""
    block = {
        "gate.weight": some(E, D),
        "experts.gate_up_proj": some(E, 2 * F, D),
        "experts.down_proj": some(E, D, F),
    }
    if bias:
        block["gate.e_score_correction_bias"] = some(E)
    if shared:
        for part, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
            block[f"shared_experts.{part}_proj.weight"] = some(*shape)
    return block


def to_hub(block: dict[str, np.ndarray], gate: str, up: str, down: str) -> dict[str, np.ndarray]:
    """The same as a checkpoint on the Hub has it: one matrix an expert."""
    out = {n: t for n, t in block.items() if not n.startswith("experts.")}
    for e in range(E):
        both = block["experts.gate_up_proj"][e]
        out[f"experts.{e}.{gate}.weight"], out[f"experts.{e}.{up}.weight"] = both[:F], both[F:]
        out[f"experts.{e}.{down}.weight"] = block["experts.down_proj"][e]
    return out


MODELS = {
    "mixtral": (
        {"model_type": "mixtral", "hidden_size": D, "num_local_experts": E},
        "model.layers.{}.block_sparse_moe.",
        ("w1", "w3", "w2"),
        fused(False, False),
    ),
    "olmoe": (
        {"model_type": "olmoe", "hidden_size": D, "num_experts": E, "num_experts_per_tok": 2},
        "model.layers.{}.mlp.",
        ("gate_proj", "up_proj", "down_proj"),
        fused(False, False),
    ),
    "deepseek_v3": (
        {
            "model_type": "deepseek_v3",
            "hidden_size": D,
            "n_routed_experts": E,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
        },
        "model.layers.{}.mlp.",
        ("gate_proj", "up_proj", "down_proj"),
        fused(True, True),
    ),
    "axk1": (  # keeps a norm of the block beside it, in the layer
        {
            "model_type": "axk1",
            "hidden_size": D,
            "n_routed_experts": E,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
        },
        "model.layers.{}.mlp.",
        ("gate_proj", "up_proj", "down_proj"),
        fused(True, True) | {"post_mlp_layernorm.weight": some(D)},
    ),
}


def checkpoint(folder: Path, name: str, *, shards: int) -> None:
    """Two layers, the first dense, the second the block; attention and embeddings around them."""
    config, prefix, parts, block = MODELS[name]
    tensors = {
        "model.embed_tokens.weight": some(5, D),
        "model.layers.0.mlp.gate_proj.weight": some(F, D),
        "model.layers.0.mlp.down_proj.weight": some(D, F),
        "model.layers.1.self_attn.q_proj.weight": some(D, D),
        "model.layers.1.input_layernorm.weight": some(D),
    }
    for n, t in to_hub(block, *parts).items():
        where = prefix.rsplit(".", 2)[0] + "." if n.startswith("post_mlp") else prefix
        tensors[where.format(1) + n] = t
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    if shards == 1:
        write(folder / "model.safetensors", tensors)
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mine = names[i::shards]  # a block is spread over the shards
        write(folder / file, {n: tensors[n] for n in mine})
        weight_map.update(dict.fromkeys(mine, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_checkpoint_on_disk_is_the_block_in_memory(tmp_path, name, shards):
    checkpoint(tmp_path, name, shards=shards)
    config, _, _, block = MODELS[name]
    loaded = load_hf_block(tmp_path, 1)
    want = moe_block_from_hf(config, block)
    jax.tree.map(np.testing.assert_array_equal, loaded, want)  # routers and options too, as statics


def test_other_layers_are_not_opened(tmp_path):
    checkpoint(tmp_path, "mixtral", shards=1)
    write(tmp_path / "block.safetensors", dict(SafetensorsFile(tmp_path / "model.safetensors")))
    names = list(SafetensorsFile(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").unlink()
    files = {n: "block.safetensors" if ".1." in n else "missing.safetensors" for n in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert load_hf_block(tmp_path, 1).params["experts"]["up"].shape == (E, D, F)


def test_a_dense_layer_is_refused(tmp_path):
    checkpoint(tmp_path, "mixtral", shards=1)
    with pytest.raises(ValueError, match=r"experts in layer 0, got none.*Layers with experts: 1\."):
        load_hf_block(tmp_path, 0)


def test_two_stacks_need_a_prefix(tmp_path):
    checkpoint(tmp_path, "mixtral", shards=1)
    one = dict(SafetensorsFile(tmp_path / "model.safetensors"))
    both = {f"{stack}.{n}": t for stack in ("thinker", "talker") for n, t in one.items()}
    write(tmp_path / "model.safetensors", both)
    with pytest.raises(ValueError, match=r"one block of experts in layer 1.*talker.*prefix="):
        load_hf_block(tmp_path, 1)
    prefix = "thinker.model.layers.1.block_sparse_moe."
    assert load_hf_block(tmp_path, 1, prefix=prefix).router.num_experts == E


def test_per_layer_lists_of_the_config(tmp_path):
    checkpoint(tmp_path, "mixtral", shards=1)
    block = MODELS["mixtral"][3] | {
        f"shared_mlp.{p}_proj.weight": t
        for p, t in (("gate", some(F, D)), ("up", some(F, D)), ("down", some(D, F)))
    }
    write(tmp_path / "model.safetensors", {f"model.layers.1.mlp.{n}": t for n, t in block.items()})
    config = {"model_type": "hunyuan_v1_moe", "num_experts": [1, E], "moe_topk": [1, 3]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_hf_block(tmp_path, 1).router.max_k == 3


def test_bfloat16_stays_bfloat16(tmp_path):
    checkpoint(tmp_path, "mixtral", shards=1)
    half = {
        n: t.astype(ml_dtypes.bfloat16)
        for n, t in SafetensorsFile(tmp_path / "model.safetensors").items()
    }
    write(tmp_path / "model.safetensors", half)
    block = load_hf_block(tmp_path, 1)
    assert block.params["experts"]["up"].dtype == jnp.bfloat16
    assert block.params["router"]["kernel"].dtype == jnp.float32
    y = jax.eval_shape(block, jax.ShapeDtypeStruct((2, 3, D), jnp.bfloat16))
    assert y.dtype == jnp.bfloat16


def test_nothing_of_torch_is_imported():
    code = (
        "import sys, moe_jax.interop;"
        "bad = {'torch', 'transformers', 'safetensors', 'pickle5'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
