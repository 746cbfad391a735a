"""Exports a calibrated routing function, and runs it in a process that has only JAX.

    pip install flatbuffers
    python examples/export_routing.py export routing.bin
    python examples/export_routing.py run routing.bin

The exported program takes any batch size. Parameters and calibrated state are inside it as constants,
and its results are a plain dict of arrays, so the process that runs it imports neither moe_jax nor
Flax. Both commands print a digest of the results: the bits are the same.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

D_MODEL = 32


def tokens() -> jax.Array:
    """f32[37, D]: the batch that both processes route."""
    return jax.random.normal(jax.random.key(7), (37, D_MODEL))


def digest(results: dict[str, jax.Array]) -> str:
    """The first digits of SHA-256 over the bytes of the results."""
    parts = [np.asarray(results[name]).tobytes() for name in sorted(results)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def write(path: Path) -> str:
    """Calibrates a rule, exports it to ``path`` and returns the digest of its results."""
    import moe_jax

    router = moe_jax.DynamicK(num_experts=8, min_k=1, max_k=4)
    params = router.init(jax.random.key(0), D_MODEL)
    sample = jax.random.normal(jax.random.key(1), (4096, D_MODEL))
    state = router.fit(params, router.init_state(), sample, target_mean_k=1.7)

    @jax.jit
    def route(x: jax.Array) -> dict[str, jax.Array]:
        routing = router(params, state, x)
        return {"experts": routing.expert_indices, "weights": routing.combine_weights}

    # The bound lets the sort by expert pack two numbers into one int32.
    (batch,) = jax.export.symbolic_shape("batch", constraints=["batch <= 65536"])
    exported = jax.export.export(route)(jax.ShapeDtypeStruct((batch, D_MODEL), jnp.float32))
    path.write_bytes(exported.serialize())
    return digest(route(tokens()))


def run(path: Path) -> str:
    """Runs what ``write`` exported and returns the digest of its results."""
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    return digest(exported.call(tokens()))


if __name__ == "__main__":
    commands = {"export": write, "run": run}
    if len(sys.argv) != 3 or sys.argv[1] not in commands:
        sys.exit("usage: python examples/export_routing.py export|run PATH")
    print(commands[sys.argv[1]](Path(sys.argv[2])))
    print("moe_jax imported:", "moe_jax" in sys.modules)
