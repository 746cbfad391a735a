"""Configuration: docs/promises.md C01-C21, Q02-Q05, R06, R07, R09.

Precedence is argument > environment > file > default, and nothing is ignored in silence.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from moe_jax.config import (
    PRESETS,
    Config,
    ConfigError,
    ConfigFileError,
    PerformanceConfig,
    RouterConfig,
    SecurityConfig,
    build_router,
    load_config,
)
from moe_jax.config import kinds as kinds_module
from moe_jax.config import loading as loading_module
from moe_jax.config.settings import SECRETS, SETTINGS
from moe_jax.routers import DynamicK, ExpertThreshold
from moe_jax.routing.difficulty import ESTIMATORS, register_estimator
from moe_jax.types import RoutingStats

CONFIGS = Path(__file__).parents[2] / "configs"

# The production guide's config/production.json, word for word.
GUIDE_PRODUCTION = {
    "router_config": {
        "input_dim": 768,
        "num_experts": 8,
        "min_experts": 1,
        "max_experts": 3,
        "complexity_estimator": "gradient_norm",
        "routing_strategy": "top_k",
        "load_balancing": True,
        "noise_factor": 0.1,
    },
    "performance": {
        "enable_caching": True,
        "enable_monitoring": True,
        "cache_size": 10000,
        "parallel_threshold": 1000,
    },
    "security": {
        "enable_validation": True,
        "max_tensor_size": 1000000000,
        "max_batch_size": 1024,
    },
}

# Every setting: its variable, the text that an operator types, what it becomes.
VARIABLES = {
    "MOE_INPUT_DIM": ("1024", 1024),
    "MOE_NUM_EXPERTS": ("16", 16),
    "MOE_MIN_EXPERTS": ("2", 2),
    "MOE_MAX_EXPERTS": ("7", 7),
    "MOE_COMPLEXITY_ESTIMATOR": ("perplexity_proxy", "perplexity_proxy"),
    "MOE_ROUTING_STRATEGY": ("threshold", "threshold"),
    "MOE_LOAD_BALANCING": ("off", False),
    "MOE_NOISE_FACTOR": ("0.2", 0.2),
    "MOE_ENABLE_CACHING": ("false", False),
    "MOE_ENABLE_MONITORING": ("0", False),
    "MOE_CACHE_SIZE": ("5000", 5000),
    "MOE_CACHE_TTL_SECONDS": ("60", 60.0),
    "MOE_PARALLEL_THRESHOLD": ("10", 10),
    "MOE_ENABLE_VALIDATION": ("no", False),
    "MOE_MAX_TENSOR_SIZE": ("1000", 1000),
    "MOE_MAX_BATCH_SIZE": ("32", 32),
    "MOE_SECURITY_LEVEL": ("Strict", "strict"),
    "MOE_HOST": ("0.0.0.0", "0.0.0.0"),
    "MOE_PORT": ("9000", 9000),
    "MOE_REQUEST_TIMEOUT_SECONDS": ("2.5", 2.5),
    "MOE_MAX_INFLIGHT": ("8", 8),
    "MOE_MAX_QUEUE": ("0", 0),
    "MOE_DRAIN_SECONDS": ("1", 1.0),
    "MOE_NONFINITE": ("Reject", "reject"),
    "MOE_MAX_MAGNITUDE": ("1e4", 1e4),
    "MOE_RATE_LIMIT_REQUESTS": ("10", 10),
    "MOE_RATE_LIMIT_TOKENS": ("1000", 1000),
    "MOE_REPLICAS": ("3", 3),
    "MOE_CACHE_MAX_BYTES": ("1000000", 1_000_000),
    "MOE_PREFETCH": ("on", True),
    "MOE_TRUSTED_PROXIES": ("10.0.0.0/8, ::1", "10.0.0.0/8, ::1"),
    "MOE_CHECKPOINT": ("runs/demo", "runs/demo"),
    "MOE_CHECKPOINT_ROUTER": ("layer_1", "layer_1"),
    "MOE_RELOAD_FOLDER": ("runs", "runs"),
    "MOE_SEED": ("7", 7),
    "MOE_SERVE_MOE": ("on", "on"),
    "MOE_EXPERT_HIDDEN_DIM": ("64", 64),
    "MOE_BUCKETS": ("64,512", "64,512"),
    "MOE_FALLBACK_STATIC_TOP_K": ("true", True),
    "MOE_SLOW_CALL_SECONDS": ("1", 1.0),
    "MOE_ENVIRONMENT": ("production", "production"),
    "MOE_LOG_LEVEL": ("debug", "DEBUG"),
}


def flat(config: Config) -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in config.to_json().items():
        out |= value if isinstance(value, dict) else {key: value}
    return out


def write(tmp_path: Path, data: object) -> Path:
    file = tmp_path / "config.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return file


def problem(call, *args, **kwargs) -> str:
    """The message of a refusal, which always says what was expected and what it got."""
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert "expected" in text
    assert "got" in text
    return text


# --- defaults, files, presets ---------------------------------------------------------------


def test_defaults_are_the_guides_environment_table():  # C01-C09
    config = load_config(env={})
    assert config == Config()
    r, p, s = config.router_config, config.performance, config.security
    assert (r.input_dim, r.num_experts, r.min_experts, r.max_experts) == (768, 8, 1, 4)
    assert (p.enable_caching, p.enable_monitoring) == (True, True)
    assert (s.security_level, config.log_level) == ("standard", "INFO")


def test_production_file_is_the_guides(tmp_path):  # C10-C19
    shipped = json.loads((CONFIGS / "production.json").read_text())
    for section, values in GUIDE_PRODUCTION.items():
        for name, value in values.items():
            assert shipped[section][name] == value, (section, name)
    # The guide's own text, with the keys that it does not have left to their defaults.
    guides = load_config(write(tmp_path, GUIDE_PRODUCTION), env={}, environment="production")
    assert guides == load_config(CONFIGS / "production.json", env={}) == PRESETS["production"]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_files_hold_what_the_code_holds(name):  # Q02-Q05
    assert load_config(CONFIGS / f"{name}.json", env={}) == PRESETS[name]
    assert json.loads((CONFIGS / f"{name}.json").read_text()) == PRESETS[name].to_json()


def test_every_shipped_file_is_a_preset():
    assert {file.stem for file in CONFIGS.glob("*.json")} == set(PRESETS)


@pytest.mark.parametrize(
    ("name", "experts", "most"),
    [
        ("high_accuracy", range(12, 17), range(4, 7)),
        ("low_latency", range(6, 9), range(2, 4)),
        ("balanced", range(8, 9), range(3, 4)),
    ],
)
def test_presets_follow_the_guides_advice(name, experts, most):  # Q03-Q05
    words = PRESETS[name].router_config
    assert words.num_experts in experts
    assert words.max_experts in most
    assert build_router(PRESETS[name]).max_k == words.max_experts


def test_json_round_trip_and_value_semantics():
    for config in [Config(), *PRESETS.values()]:
        again = Config.from_json(json.loads(json.dumps(config.to_json())))
        assert again == config
        assert hash(again) == hash(config)
        assert again.config_hash == config.config_hash
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().log_level = "DEBUG"  # type: ignore[misc]


def test_hash_tells_every_setting_apart():
    seen = {Config().config_hash}
    for variable, (text, _) in VARIABLES.items():
        seen.add(load_config(env={variable: text}).config_hash)
    assert len(seen) == len(VARIABLES) + 1


# --- the environment and precedence ---------------------------------------------------------


def test_every_setting_has_a_variable():
    assert {"MOE_" + name.upper() for name in flat(Config())} == set(VARIABLES)


@pytest.mark.parametrize("variable", sorted(VARIABLES))
def test_a_variable_changes_its_setting_and_no_other(variable):  # C01-C09, C20
    text, value = VARIABLES[variable]
    name = variable.removeprefix("MOE_").lower()
    before, after = flat(Config()), flat(load_config(env={variable: text}))
    assert before[name] != value, "the table must differ from the default"
    assert after == {**before, name: value}
    assert type(after[name]) is type(before[name])


def test_precedence_is_argument_environment_file_default(tmp_path):
    file = write(tmp_path, {"router_config": {"num_experts": 10, "max_experts": 5}})
    env = {"MOE_NUM_EXPERTS": "12", "PATH": "/bin", "OTHER_MOE_X": "1"}

    def experts(**kwargs):
        return load_config(**kwargs).router_config.num_experts

    assert experts(env={}) == 8
    assert experts(file=file, env={}) == 10
    assert experts(file=file, env=env) == 12
    assert experts(file=file, env=env, num_experts=14) == 14
    assert experts(file=file, env=env, num_experts=None) == 12, "None means not given"
    # What the stronger source leaves out comes from the weaker one.
    assert load_config(file, env, num_experts=14).router_config.max_experts == 5


def test_the_process_environment_is_read_only_when_asked(monkeypatch):
    monkeypatch.setenv("MOE_NUM_EXPERTS", "32")
    assert load_config().router_config.num_experts == 32
    assert load_config(env={}).router_config.num_experts == 8
    assert Config().router_config.num_experts == 8
    monkeypatch.setattr(loading_module, "_process_environment", lambda: {"MOE_NUM_EXPERTS": "9"})
    assert load_config().router_config.num_experts == 9, "there is one place that reads it"


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "text", "parts"),
    [
        ("MOE_NUM_EXPERTS", "eight", ["whole number", '"eight"', "number of experts"]),
        ("MOE_NUM_EXPERTS", "8.0", ["whole number", '"8.0"']),
        ("MOE_NUM_EXPERTS", "0", ["from 1 to", "got 0"]),
        ("MOE_NUM_EXPERTS", "-3", ["got -3"]),
        ("MOE_INPUT_DIM", "", ["whole number", '""']),
        ("MOE_NOISE_FACTOR", "nan", ["from 0 to 1", "NaN", "0.1 to 0.2"]),
        ("MOE_NOISE_FACTOR", "1.5", ["from 0 to 1", "1.5"]),
        ("MOE_CACHE_TTL_SECONDS", "inf", ["Infinity", "enable_caching"]),
        ("MOE_CACHE_SIZE", "0", ["from 1", "enable_caching to false"]),
        ("MOE_ENABLE_CACHING", "maybe", ["true or false", '"maybe"']),
        ("MOE_SECURITY_LEVEL", "strickt", ["minimal, standard, strict", "mean 'strict'"]),
        ("MOE_LOG_LEVEL", "LOUD", ["DEBUG, INFO, WARNING"]),
        ("MOE_ENVIRONMENT", "prod", ["production"]),
        ("MOE_COMPLEXITY_ESTIMATOR", "gradient", ["gradient_norm", "register_estimator"]),
        ("MOE_ROUTING_STRATEGY", "topk", ["top_k, threshold", "mean 'top_k'"]),
    ],
)
def test_a_bad_variable_names_itself_the_value_and_what_is_allowed(variable, text, parts):
    message = problem(load_config, env={variable: text})
    assert message.startswith(variable + ": expected ")
    for part in parts:
        assert part in message, message


# Every setting that is no choice of words: bad texts, and how the message states what is allowed.
# Blanks, "x" and values on either side of each range are added to numbers by the test.
TEXTS = {
    "host": (
        "an IP address or a host name",
        ["", " ", "999.1.1.1", "1.2.3", "[::1]", "::zz", "a b", "http://x", "a..b", "-a", "a:80"],
    ),
    "trusted_proxies": (
        "addresses or networks separated by commas",
        [",", " ", ",,", "everyone", "10.0.0.0/33", "10.0.0.0/8,x", "10.0.0.0/8;::1", "[::1]"],
    ),
    "buckets": (
        "up to 32 whole numbers from 1 to 16777216",
        [
            ",",
            " ",
            "0",
            "-1",
            "64;512",
            "1.5",
            "64,x",
            "16777217",
            "1_000",
            "٣",
            ",".join("9" * 33),
        ],
    ),
    "checkpoint": ("a line of text", [" ", "a\nb", "\x00", "x" * 4097]),
    "checkpoint_router": ("a line of text", [" ", "a\nb", "\x1b[0m", "x" * 4097]),
    "reload_folder": ("a line of text", [" ", "a\nb", "x" * 4097]),
    "api_keys": (
        "keys of printable ASCII without blanks",
        [",", ",,", " ", "hunter2,hunter 3", "hunter2é", "hunter2\n,b", "hunter2" * 1000],
    ),
    "admin_key": (
        "a key of printable ASCII without blanks",
        [" ", "hunter 2", "hunter2é", "hunter2\x7f", "hunter2" * 1000],
    ),
    "redis_url": (
        "redis://host:port/0, rediss://host:port/0 or unix://path",
        [
            " ",
            "http://x",
            "localhost:6379",
            "hunter2@localhost",
            "redis://",
            "redis://:hunter2@",
            "redis://user:hunter2@host:70000",
            "redis://:hunter2",
            "redis://user:hunter2@host:1/name",
            "amqp://user:hunter2@host:1/0?password=hunter2",
            "unix://",
            "redis://[::1",
        ],
    ),
}


def bad_values(name: str) -> list[tuple[str, str]]:
    """(text of a variable, what the message says is allowed) for every kind of bad value."""
    field = SETTINGS[name][1]
    if name in TEXTS:
        allowed, texts = TEXTS[name]
        return [(text, allowed) for text in texts]
    if isinstance(field.default, bool):
        return [(text, "true or false") for text in ("", " ", "2", "maybe", "None")]
    if isinstance(field.default, str):
        return [(text, "one of ") for text in ("", " ", "x", "true", "standard,strict")]
    low, high = field.metadata["low"], field.metadata["high"]
    kind = "a whole number" if isinstance(field.default, int) else "a number"
    ends = [low - 1] if math.isinf(high) else [low - 1, high * 2 + 1]
    words = ["", " ", "x", "1,5", "1 2", "nan", "-inf", "0x10", *map(str, ends)]
    if isinstance(field.default, int):
        words += ["1.5", "1e3", "9" * 5000]
    return [(text, f"{kind} ") for text in words]


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_every_bad_value_names_its_variable_and_what_is_allowed(name):
    """None is accepted, none ends in a raw error, and no secret is repeated."""
    variable = "MOE_" + name.upper()
    secret = SETTINGS[name][1].metadata["secret"]
    for text, allowed in bad_values(name):
        message = problem(load_config, env={variable: text})
        assert message.startswith(f"{variable}: expected {allowed}"), message
        assert len(message.splitlines()) == 1
        assert len(message) < 500
        assert message.endswith(".")
        if secret:
            assert "hunter" not in message, message


# A secret in a file is refused whatever its value.
@pytest.mark.parametrize("name", sorted(SETTINGS.keys() - SECRETS))
def test_every_bad_value_of_a_file_names_its_key(tmp_path, name):
    section, field = SETTINGS[name]
    values: list[object] = [None, [], {}, [1]]
    if isinstance(field.default, str):
        values += [True, 1, *(text for text, _ in bad_values(name))]
    elif isinstance(field.default, bool):
        values += ["true", 1, 0.0]
    else:
        values += ["1", True, float("nan"), float("inf"), -(10**400), 10**400]
    for value in values:
        data = {section: {name: value}} if section else {name: value}
        message = problem(load_config, write(tmp_path, data), env={})
        key = f"{section}.{name}" if section else name
        assert message.startswith(f"{key} in {tmp_path / 'config.json'}: expected "), message
        with pytest.raises(ConfigError, match=name):
            load_config(env={}, **{name: value if value is not None else []})


@pytest.mark.parametrize(
    ("variable", "value", "shown"),
    [
        ("MOE_REDIS_URL", "http://x", "got http://x. "),
        ("MOE_REDIS_URL", "amqp://user:hunter2@host:1/0", "got amqp://host:1. "),
        ("MOE_HOST", "999.1.1.1", 'got "999.1.1.1". '),
        ("MOE_API_KEYS", ",,", "got no key between the commas. "),
        ("MOE_API_KEYS", "a,b c", "got key 2 of 2 with a blank or another character. "),
        ("MOE_TRUSTED_PROXIES", "10.0.0.0/8,x", 'got "x". '),
        ("MOE_BUCKETS", ",", "got no number between the commas. "),
    ],
)
def test_a_bad_text_is_shown_as_far_as_it_is_no_secret(variable, value, shown):
    assert shown in problem(load_config, env={variable: value})


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MOE_HOST", "router.example.org."),
        ("MOE_HOST", "::"),
        ("MOE_HOST", "my_host-1"),
        ("MOE_API_KEYS", "a, b,"),
        ("MOE_API_KEYS", ""),
        ("MOE_ADMIN_KEY", "!~a,b"),
        ("MOE_REDIS_URL", "rediss://user:p%40ss@redis.example.org:6380/3?ssl_cert_reqs=none"),
        ("MOE_REDIS_URL", "redis://[::1]:6379"),
        ("MOE_REDIS_URL", "unix:///run/redis.sock?db=1"),
        ("MOE_TRUSTED_PROXIES", "::ffff:10.0.0.1, 10.1.2.3/8"),
    ],
)
def test_what_an_operator_may_well_write_is_accepted(variable, value):
    config = load_config(env={variable: value})
    assert getattr(config.serving, variable.removeprefix("MOE_").lower()) == value


def test_two_contradictions_and_a_bad_value_are_named_together(tmp_path):
    """Issue 17.7: a bad value does not hide that others contradict each other."""
    env = {"MOE_MIN_EXPERTS": "5", "MOE_BUCKETS": "x", "MOE_PORT": "y", "MOE_HOST": "1.2.3"}
    lines = problem(load_config, env=env).splitlines()
    names = sorted(line.split(":")[0] for line in lines)
    assert names == ["MOE_BUCKETS", "MOE_HOST", "MOE_PORT", "router_config"]
    # A value that is bad by itself is not compared, and neither is what a file would have said.
    lines = problem(load_config, env={"MOE_MIN_EXPERTS": "5", "MOE_MAX_EXPERTS": "z"}).splitlines()
    assert [line.split(":")[0] for line in lines] == ["MOE_MAX_EXPERTS"]
    for content, kind in (("{", ConfigError), (None, ConfigFileError)):
        file = tmp_path / f"{kind.__name__}.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(kind) as caught:
            load_config(file, env={"MOE_MIN_EXPERTS": "5", "MOE_PORT": "y"})
        names = [line.split(":")[0] for line in str(caught.value).splitlines()]
        assert names == [str(file), "MOE_PORT"]


def test_a_file_with_a_number_of_thousands_of_digits_is_refused_in_a_sentence(tmp_path):
    file = write(tmp_path, '{"serving": {"port": ' + "9" * 5000 + "}}")
    assert "a number that is too long" in problem(load_config, file, env={})


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"router_config": {"num_experts": "8"}}, ["router_config.num_experts", '"8"']),
        ({"router_config": {"num_experts": True}}, ["num_experts", "got true"]),
        ({"router_config": {"num_experts": 8.0}}, ["num_experts", "got 8.0"]),
        ({"performance": {"enable_caching": 1}}, ["enable_caching", "true or false", "got 1"]),
        ({"security": {"max_batch_size": None}}, ["security.max_batch_size", "got null"]),
        ({"router_config": {"num_expert": 8}}, ["router_config.num_expert", "mean num_experts?"]),
        ({"router": {}}, ["router", "mean router_config?"]),
        ({"num_experts": 8}, ["num_experts", "inside 'router_config'", "Move it"]),
        ({"zebra": 1}, ["zebra", "Known: router_config, performance, security"]),
        ({"security": {"noise_factor": 0.1}}, ["security.noise_factor", "known name"]),
        ({"security": []}, ["security", "JSON object", "got []"]),
        ([], ["JSON object", "got []"]),
        ("{", ["expected JSON", "line 1 column"]),
        ("", ["expected JSON, got an empty file", "Write {} for the defaults"]),
        (" \n", ["got an empty file"]),
        ('{"log_level": "INFO", "log_level": "DEBUG"}', ["every key once", "log_level"]),
        ({"router_config": {"min_experts": 5}}, ["min_experts=5", "max_experts=4 (default)"]),
        ({"log_level": "x" * 1000}, ["xxx..."]),
        ("[" * 100_000, ["nested without end"]),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, data, parts):  # C21
    file = write(tmp_path, data)
    message = problem(load_config, file, env={})
    for part in [*parts, str(file)]:
        assert part in message, message
    assert len(message) < 600 + len(str(file)) * 2


def test_a_file_that_is_not_there_or_not_text(tmp_path):
    assert "mount" in problem(load_config, tmp_path / "none.json", env={})
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    assert "UnicodeDecodeError" in problem(load_config, tmp_path / "binary.json", env={})


@pytest.mark.parametrize(
    ("variable", "near"),
    [
        ("MOE_NUM_EXPERT", "MOE_NUM_EXPERTS"),
        ("MOE_num_experts", "MOE_NUM_EXPERTS"),
        ("MOE_CACHE_TTL", "MOE_CACHE_TTL_SECONDS"),
        ("MOE_LOGLEVEL", "MOE_LOG_LEVEL"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_one(variable, near):
    message = problem(load_config, env={variable: "1"})
    assert message.startswith(f"{variable}: ")
    assert message.endswith(f"Did you mean {near}?")


def test_no_far_fetched_guess_at_an_unknown_variable():
    message = problem(load_config, env={"MOE_FOO": "1"})
    assert "Did you mean" not in message
    assert "Unset it. Known: " in message


@pytest.mark.parametrize("name", ["api_keys", "admin_key", "redis_url"])
def test_a_secret_is_in_no_json_no_repr_no_hash_and_no_file(tmp_path, name):
    value = "redis://:hunter2@localhost:1/0"
    config = load_config(env={"MOE_" + name.upper(): value})
    assert getattr(config.serving, name) == value
    for text in (json.dumps(config.to_json()), repr(config), repr(config.serving)):
        assert "hunter2" not in text
    assert config.config_hash == Config().config_hash
    message = problem(load_config, write(tmp_path, {"serving": {name: value}}), env={})
    assert f"Set MOE_{name.upper()}" in message
    assert "hunter2" not in message
    assert "hunter2" not in problem(load_config, env={"MOE_" + name.upper(): value + "\x00x"})


@pytest.mark.parametrize(
    ("variable", "text", "part"),
    [
        ("MOE_BUCKETS", "64,x", "whole numbers"),
        ("MOE_BUCKETS", "0", "whole numbers"),
        ("MOE_TRUSTED_PROXIES", "10.0.0.0/8,everyone", "networks"),
        ("MOE_NONFINITE", "drop", "off, sanitize, mask, reject"),
        ("MOE_PORT", "70000", "from 0 to 65535"),
    ],
)
def test_bad_lists_and_choices_of_the_service(variable, text, part):
    message = problem(load_config, env={variable: text})
    assert message.startswith(variable)
    assert part in message


def test_lists_of_the_service_are_read():
    serving = load_config(env={"MOE_BUCKETS": "512, 64,64", "MOE_API_KEYS": "a, b"}).serving
    assert serving.bucket_sizes == (64, 512)
    assert serving.api_key_list == ("a", "b")


def test_a_preset_stands_in_place_of_the_defaults():
    base = PRESETS["production"]
    assert load_config(env={}, base=base) == base
    assert load_config(env={"MOE_MAX_EXPERTS": "2"}, base=base).router_config.max_experts == 2


def test_an_unknown_argument_is_refused():
    assert "Did you mean max_experts?" in problem(load_config, env={}, max_expert=3)


def test_values_that_contradict_each_other_name_their_origins(tmp_path):
    file = write(tmp_path, {"router_config": {"max_experts": 6}})
    message = problem(load_config, file, {"MOE_NUM_EXPERTS": "5"}, min_experts=2)
    assert "min_experts=2 (argument min_experts)" in message
    assert f"max_experts=6 (router_config.max_experts in {file})" in message
    assert "num_experts=5 (MOE_NUM_EXPERTS)" in message


def test_all_problems_are_told_at_once(tmp_path):
    file = write(tmp_path, {"security": {"max_batch_size": 0}, "perfomance": {}})
    message = problem(load_config, file, {"MOE_X": "1", "MOE_LOG_LEVEL": "x"}, nope=1).splitlines()
    starts = [line.split(":")[0].split(" in ")[0] for line in message]
    assert sorted(starts) == sorted(
        ["perfomance", "MOE_X", "argument nope", "security.max_batch_size", "MOE_LOG_LEVEL"]
    )


def test_the_dataclasses_check_themselves():
    """Built in code there is no loader, and the checks hold all the same."""
    assert "router_config.num_experts" in problem(RouterConfig, num_experts=0)
    assert "min_experts=3" in problem(RouterConfig, min_experts=3, max_experts=2)
    assert "performance.cache_size" in problem(PerformanceConfig, cache_size="10")
    assert "security.security_level" in problem(SecurityConfig, security_level="none")
    assert "log_level" in problem(Config, log_level="info")
    assert "RouterConfig" in problem(Config, router_config={"num_experts": 8})
    # An int where a float is meant is the same configuration, hash included.
    assert type(PerformanceConfig(cache_ttl_seconds=60).cache_ttl_seconds) is float


# --- the guide's words to the library's -----------------------------------------------------


@pytest.mark.parametrize(
    ("word", "difficulty"),
    [
        ("gradient_norm", "activation_norm"),
        ("attention_entropy", "attention_entropy"),
        ("perplexity_proxy", "surprisal"),
        ("threshold", "large_activation_share"),
        ("router_entropy", "router_entropy"),
        ("router_margin", "router_margin"),
        ("activation_norm", "activation_norm"),
    ],
)
def test_estimator_words(word, difficulty):  # R03-R06
    router = build_router(load_config(env={}, complexity_estimator=word))
    assert isinstance(router, DynamicK)
    assert router.difficulty == difficulty


def test_an_estimator_of_ones_own_by_name(monkeypatch):  # R06
    monkeypatch.setattr(kinds_module, "ESTIMATORS", dict(ESTIMATORS))
    monkeypatch.setattr("moe_jax.routing.difficulty.ESTIMATORS", kinds_module.ESTIMATORS)
    assert "expected one of" in problem(load_config, env={}, complexity_estimator="first_value")
    register_estimator("first_value", lambda x, context: x[:, 0])
    config = load_config(env={"MOE_COMPLEXITY_ESTIMATOR": "first_value"})
    assert build_router(config).difficulty == "first_value"  # type: ignore[attr-defined]


def test_router_words_reach_the_router():  # C10-C19 "drives the router", R07
    config = load_config(
        env={},
        num_experts=12,
        min_experts=2,
        max_experts=5,
        noise_factor=0.15,
        load_balancing=False,
    )
    router = build_router(config)
    assert isinstance(router, DynamicK)
    assert (router.num_experts, router.min_k, router.max_k) == (12, 2, 5)
    assert router.gate.noise == 0.15
    assert router.balance_rate == 0

    other = build_router(
        load_config(env={}, routing_strategy="threshold", min_experts=2, max_experts=5)
    )
    assert isinstance(other, ExpertThreshold)
    assert (other.num_experts, other.min_k, other.max_k, other.target_k) == (8, 2, 5, 3.5)
    assert other.gate.noise == 0.1


def test_noise_acts_only_where_a_key_is_given():  # R09
    gate = build_router(load_config(env={}, noise_factor=0.2)).gate
    still = build_router(load_config(env={}, noise_factor=0.0)).gate
    params = {"kernel": jnp.eye(8)}
    x = jnp.ones((4, 8))
    assert (gate(params, x) == x).all()
    assert (gate(params, x, key=jax.random.key(2)) != x).any()
    assert (still(params, x, key=jax.random.key(2)) == x).all()


def test_load_balancing_is_a_switch_that_acts():  # R08, C16
    nothing = jnp.zeros(())
    stats = RoutingStats(**{f.name: nothing for f in dataclasses.fields(RoutingStats)})
    stats = dataclasses.replace(
        stats, tokens_per_expert=jnp.array([3.0, 1.0]), token_count=jnp.array(4.0)
    )
    for on in (True, False):
        router = build_router(load_config(env={}, num_experts=2, max_experts=2, load_balancing=on))
        bias = router.update(router.init_state(), stats).expert_bias
        assert (bias[0] < 0 < bias[1]) if on else (bias == 0).all()


def test_equal_configurations_build_equal_routers():
    assert build_router(Config()) == build_router(Config.from_json(Config().to_json()))
