"""``moe-jax smoke URL --checkpoint``: what is served is what the checkpoint says (B06)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.checkpoint import Checkpoint, open_checkpoint, save
from moe_jax.config import Config, RouterConfig, build_router, load_config
from moe_jax.serving.engine import RouterEngine
from moe_jax.serving.http.client import Service
from moe_jax.serving.http.smoke import _as_expected, _by_expert, _served_layer

D = 16
CONFIG = Config(router_config=RouterConfig(input_dim=D, max_experts=3))


class Local(Service):
    """What smoke asks of a service, answered by an engine in this process."""

    def __init__(self, engine: RouterEngine, change=lambda arrays: arrays) -> None:
        super().__init__("http://unused")
        self._engine, self._change = engine, change

    def get_json(self, path: str):
        if path == "/health":
            return self._engine.health_check()
        return self._engine.describe(path.rsplit("/", 1)[1])

    def infer(self, model, inputs, outputs=()):
        arrays = dict(self._engine.infer(model, inputs["hidden_states"]).arrays)
        return self._change(arrays), {}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    router = build_router(CONFIG)
    for seed in (0, 1):
        params = router.init(jax.random.key(seed), D)
        x = jax.random.normal(jax.random.key(5), (256, D), jnp.float32)
        state = router.fit(params, router.init_state(), x, target_mean_k=1.8)
        saved = Checkpoint(
            params={"router": params},
            routers={"router": router},
            states={"router": state},
            config=CONFIG,
        )
        save(folder / str(seed), saved)
    settings = dict(input_dim=D, max_experts=3, buckets="128", enable_caching=False)
    with RouterEngine(load_config(env={}, checkpoint=str(folder / "0"), **settings)) as engine:
        opened = [open_checkpoint(folder / str(s)) for s in (0, 1)]
        # Without --router it is the one that the service says it serves.
        yield engine, [_served_layer(Local(engine), one, None) for one in opened]


def test_the_checkpoint_that_is_served_agrees(made):
    engine, (served, _) = made
    assert served.name == engine.health_check()["components"]["router"]["layer"]
    assert "128 random tokens" in _as_expected(Local(engine), served)


def test_another_checkpoint_does_not(made):
    engine, (_, other) = made
    with pytest.raises(AssertionError, match="tokens go to other experts"):
        _as_expected(Local(engine), other)


def test_weights_that_drifted_do_not(made):
    engine, (served, _) = made

    def drifted(arrays):
        return {**arrays, "expert_weights": arrays["expert_weights"] * np.float32(1.001)}

    with pytest.raises(AssertionError, match="weights differ"):
        _as_expected(Local(engine, drifted), served)


def test_slots_may_come_in_any_order():
    one = _by_expert(np.array([[2, 0, -1]]), np.array([[0.5, 0.25, 0.0]]), 3)
    two = _by_expert(np.array([[0, 3, 2]]), np.array([[0.25, 0.0, 0.5]]), 3)
    assert one.tolist() == two.tolist() == [[0.25, 0.0, 0.5]]
