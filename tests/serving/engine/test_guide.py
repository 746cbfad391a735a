"""The production guide's Python, word for word but for the import line: docs/promises.md Y01-Y06."""

from __future__ import annotations

import json

import pytest

import moe_jax
from moe_jax.config import PRESETS
from moe_jax.serving.engine import RouterEngine

SNIPPET = """
from moe_jax import RouterFactory

# Create production router
router = RouterFactory.create_optimized_for_inference()

# Health check
health = router.health_check()
print(f"Router status: {health['status']}")

# Process requests
import numpy as np
test_input = np.random.randn(4, 128, 768).astype(np.float32)
result = router.route(test_input)

health_status = router.health_check()
print(f"Status: {health_status['status']}")
print(f"Uptime: {health_status['uptime_seconds']}s")

stats = router.get_metrics()
print(f"Cache hit rate: {stats.get('cache_hit_ratio', 'N/A')}")
print(f"Expert usage: {stats['router_stats']}")
"""


def test_the_guides_snippets(monkeypatch, capsys):
    # Only how many shapes are compiled is set apart: the suite's time is compilation.
    monkeypatch.setenv("MOE_BUCKETS", "512")
    monkeypatch.setenv("MOE_LOG_LEVEL", "CRITICAL")
    names: dict = {}
    exec(SNIPPET, names)
    with names["router"]:
        said = capsys.readouterr().out.splitlines()
        assert said[:2] == ["Router status: healthy", "Status: healthy"]
        assert float(said[2].removeprefix("Uptime: ").removesuffix("s")) > 0
        assert said[3] == "Cache hit rate: 0.0"
        assert "most_used_expert" in said[4]
        k = names["result"]["num_experts_per_token"]
        assert k.shape == (4, 128)
        assert set(k.ravel().tolist()) == {1, 2, 3}, "the inference factory's maximum is 3"


def test_the_factorys_doors(monkeypatch, tmp_path):
    seen = {}

    def note(self, config, **options):
        seen["config"] = config

    monkeypatch.setattr(RouterEngine, "__init__", note)
    for name in list(__import__("os").environ):
        if name.startswith("MOE_"):
            monkeypatch.delenv(name)
    factory = moe_jax.RouterFactory
    factory.create_optimized_for_inference()
    assert seen["config"] == PRESETS["production"]
    assert seen["config"].performance.cache_size >= 10_000
    factory.create_optimized_for_training(max_experts=2)
    assert not seen["config"].performance.enable_caching
    assert seen["config"].router_config.max_experts == 2
    monkeypatch.setenv("MOE_MAX_EXPERTS", "6")
    factory.create_from_environment()
    assert seen["config"].router_config.max_experts == 6
    factory.create_optimized_for_inference()
    assert seen["config"].router_config.max_experts == 6, "the environment wins over the preset"
    file = tmp_path / "production.json"
    file.write_text(json.dumps(PRESETS["balanced"].to_json()))
    monkeypatch.delenv("MOE_MAX_EXPERTS")
    factory.create_from_config_file(str(file))
    assert seen["config"] == PRESETS["balanced"]
    with pytest.raises(ValueError, match="max_expert"):
        factory.create_from_environment(max_expert=3)


def test_the_front_door_is_light_and_complete():
    assert "RouterFactory" not in vars(moe_jax)
    with pytest.raises(AttributeError, match="no attribute"):
        moe_jax.RouterFactry  # noqa: B018
