"""The guide's advice as presets (Q02–Q05, K08): in code, in configs/, and the same in both."""

import re
from pathlib import Path

import pytest

from moe_jax.config import PRESETS, load_config
from moe_jax.config.settings import SECRETS, SETTINGS

CONFIGS = Path(__file__).parents[2] / "configs"


def test_every_preset_has_a_file_and_every_file_a_preset():
    files = {file.stem: load_config(file, env={}) for file in CONFIGS.glob("*.json")}
    assert files == dict(PRESETS)


@pytest.mark.parametrize(
    ("name", "experts", "most"),
    [
        ("high_accuracy", range(12, 17), range(4, 7)),
        ("low_latency", range(6, 9), range(2, 4)),
        ("balanced", range(8, 9), range(3, 4)),
    ],
)
def test_experts_are_within_the_guides_ranges(name, experts, most):
    router = PRESETS[name].router_config
    assert router.num_experts in experts
    assert router.max_experts in most
    assert 1 <= router.min_experts <= router.max_experts


@pytest.mark.parametrize(
    ("name", "enabled", "size"),
    [("production", True, 10_000), ("training", False, 10_000), ("mixed", True, 5_000)],
)
def test_caches_are_the_guides(name, enabled, size):
    performance = PRESETS[name].performance
    assert performance.enable_caching is enabled
    assert performance.cache_size == size


def test_every_knob_of_the_manual_is_a_setting():
    text = (CONFIGS.parent / "docs" / "operations.md").read_text()
    names = {f"MOE_{name.upper()}" for name in SETTINGS}
    named = set(re.findall(r"\bMOE_[A-Z_]+\b", text))
    assert len(named) > 20
    assert named <= names, sorted(named - names)


def test_the_defaults_in_the_manual_are_the_settings_defaults():
    text = (CONFIGS.parent / "docs" / "operations.md").read_text()
    table = text.split("| variable | default | meaning |")[1].split("\n\n")[0]
    stated = {}
    for row in table.splitlines()[2:]:
        _, variables, cell, _ = row.split("|", 3)
        names = re.findall(r"MOE_([A-Z_]+)", variables)
        words = [word.strip() for word in (cell.split(",") if len(names) > 1 else [cell])]
        stated |= dict(
            zip(names, words if len(words) == len(names) else words * len(names), strict=True)
        )
    for name, word in re.findall(r"`MOE_([A-Z_]+)` \((\d[\d.]*)\)", text):
        assert float(word) == SETTINGS[name.lower()][1].default, name
    for name, word in stated.items():
        default = SETTINGS[name.lower()][1].default
        if default == "":
            assert not re.match(r"[\dA-Z]+$", word), name
        elif isinstance(default, int | float) and not isinstance(default, bool):
            assert float(word) == default, name
        else:
            assert word.lower() == str(default).lower(), name
    # `config show` lists every other setting, and no secret.
    assert {name.upper() for name in SECRETS} <= stated.keys()
