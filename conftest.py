"""Strictness for every test and example: no silent promotion of ranks or dtypes, warnings are errors.

(The last of these is ``filterwarnings = ["error"]`` in pyproject.toml.)
"""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parallel import measurement

ROOT = Path(__file__).parent

# No tests: scripts that make golden files with torch and transformers, which are no dependencies, and
# a user's file that tests/test_types.py gives to pyright.
collect_ignore = [
    "tests/goldens/generate_hf.py",
    "tests/goldens/generate_hub.py",
    "tests/goldens/generate_models.py",
    "tests/goldens/written_by_0_1/generate.py",
    "tests/typing/user.py",
]


# Most of the suite's time is compilation, so its programs skip XLA's costlier passes: the same
# programs, less work on their code. XLA's older emitters write the code of a loop in about half of
# the time; XLA reads the flags when its backend starts, and ends the process over a flag that it does
# not know: hence the versions. Splitting a program for threads costs more than the threads give when
# the tests fill the cores. Processes that tests start inherit all of it.
# `XLA_FLAGS= JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test` compiles as users do.
_FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
_KNOWN = (0, 10) <= jax.__version_info__[:2] < (0, 11)
if _KNOWN and importlib.util.find_spec("libtpu") is None:  # the compiler of TPUs reads them too
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(_FLAGS))
_CHEAP = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"


def pytest_configure(config: pytest.Config) -> None:
    jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_disable_most_optimizations", _CHEAP)

    # Compiled code is kept between runs, and the workers of one share it. Small programs are kept too:
    # most tests compile dozens of them, and the files of a folder share theirs. In the environment, so
    # that the processes which tests start do the same.
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
    least = os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", float(least))
    # JAX does not write entries atomically: an xdist worker may read what another is writing. It then
    # warns and compiles for itself, which is no fault of the code under test.
    for what in ("reading", "writing"):
        config.addinivalue_line(
            "filterwarnings", f"ignore:Error {what} persistent compilation cache:UserWarning"
        )

    # Neither a case nor the making of cases has a time: a cold, busy machine compiles in between.
    hypothesis.settings.register_profile(
        "ci",
        deadline=None,
        max_examples=20,
        derandomize=True,
        database=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.register_profile("thorough", deadline=None, max_examples=500)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

    # Tracing makes many objects that live, and JAX does work of its own in every collection.
    gc.set_threshold(100_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests that judge the measurement on eight devices last: it needs minutes."""
    items.sort(key=_waits_for_eight_devices)


def _waits_for_eight_devices(item: pytest.Item) -> bool:
    return "measured" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session", autouse=True)
def _eight_devices_ahead(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """The first worker starts that measurement beside the other tests."""
    first = os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0"
    if not first or not any(map(_waits_for_eight_devices, request.session.items)):
        yield
        return
    thread = measurement.start(tmp_path_factory.getbasetemp())
    yield
    thread.join()  # another worker may wait for the result


@pytest.fixture(autouse=True)
def _names_of_every_example(doctest_namespace: dict[str, object]) -> None:
    """Examples in docstrings may use ``jax``, ``jnp`` and ``np`` without importing them."""
    doctest_namespace.update(jax=jax, jnp=jnp, np=np)


# Linux gives a process 65,530 memory maps; a compiled program takes about four of them. A worker that
# has run thousands of programs otherwise ends in a segmentation fault when it compiles the next one.
_MAPS = Path("/proc/self/maps")
_MOST_MAPS = 30_000


@pytest.fixture(scope="module", autouse=True)
def _bounded_memory_maps() -> Iterator[None]:
    """Releases compiled programs between modules once a worker holds many of them."""
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()
