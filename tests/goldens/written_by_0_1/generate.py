"""Writes this folder. Run once with the library at commit 7a80f07 (0.1 before the rooms moved).

``PYTHONPATH=OLD_CHECKOUT python generate.py FOLDER``. The module paths are those of that commit.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import archive, calibration, inspection, language_model, train
from moe_jax.checkpoint import Checkpoint, save
from moe_jax.config import Config, RouterConfig, ServingConfig, build_router
from moe_jax.interop.rules import MoEPlusPlus
from moe_jax.layer import moe_layer

WIDTH = 16
MODEL = language_model.LMConfig(
    num_layers=2,
    d_model=WIDTH,
    num_heads=2,
    num_experts=4,
    k=3,
    d_ff=8,
    length=16,
    batch_size=4,
    balance_rate=1e-3,
)
CONFIG = Config(
    router_config=RouterConfig(
        input_dim=WIDTH,
        num_experts=4,
        max_experts=3,
        complexity_estimator="router_entropy",
        noise_factor=0.2,
        load_balancing=False,
    ),
    serving=ServingConfig(
        port=8123, buckets="64,512", trusted_proxies="10.0.0.0/8", serve_moe="off", seed=3
    ),
    environment="staging",
    log_level="WARNING",
)


def main(folder: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(24, WIDTH)).astype(np.float32)
    tokens = rng.integers(0, 256, size=(1, 8)).astype(np.int32)
    arrays = {"x": x, "tokens": tokens}

    trained, _ = train.train(MODEL, folder / "trained", 20, 0, False)
    calibrated, _ = calibration.calibrate(
        trained,
        folder / "language_model",
        ["top_p", "dynamic_k_entropy"],
        target_mean_k=2.0,
        tokens=1024,
        progress=False,
    )
    for name, model in train.load_variants(calibrated).items():
        out = language_model.forward(
            MODEL, model.params, model.states, jnp.asarray(tokens), routers=model.routers
        )
        arrays[f"language_model logits {name}"] = np.asarray(out.logits)
        for layer, (router, state) in enumerate(zip(model.routers, model.states, strict=True)):
            params = language_model.layer_params(model.params, layer)["moe"]
            y, _ = moe_layer(router, MODEL.experts, params, state, jnp.asarray(x))
            label = f"{name}/layer_{layer}" if name else f"layer_{layer}"
            arrays[f"language_model y {label}"] = np.asarray(y)

    router = build_router(CONFIG)
    params = router.init(jax.random.key(0), WIDTH)
    state = router.fit(params, router.init_state(), jnp.asarray(x), target_mean_k=1.7)
    plain = save(
        folder / "plain",
        Checkpoint(
            params={"router": params},
            routers={"router": router},
            states={"router": state},
            config=CONFIG,
            metadata={"note": "written by 0.1"},
        ),
    )
    archive.export(folder / "export", plain)

    rule = MoEPlusPlus(num_experts=4)
    single = save(
        folder / "single_model",
        Checkpoint(
            params={"block": {"router": rule.init(jax.random.key(1), WIDTH)}},
            routers={"block": rule},
            states={"block": rule.init_state()},
        ),
    )
    for kind, path in {
        "language_model": calibrated,
        "export": folder / "export" / "checkpoint",
        "single_model": single,
    }.items():
        for name in inspection.describe_checkpoint(path)["routers"]:
            source = inspection.router_from_checkpoint(path, name)
            for word, value in inspection.route(source, x)[1].items():
                arrays[f"{kind} {word} {name}"] = np.asarray(value)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_json(), indent=1) + "\n")
    np.savez_compressed(folder / "expected.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
