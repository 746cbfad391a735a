"""``make verify-image``: the image, built and run without a Docker daemon.

buildah builds deploy/docker/Dockerfile.production in a chroot, on a base that debootstrap makes from
Debian bookworm (a stand-in for the public python:3.11-slim-bookworm, given as BASE_IMAGE), from wheels
that pip downloads by the lock file's digests. runc runs it as Kubernetes would: user 10001, read-only
root, no capabilities, 2 GiB. Needs root; whatever is missing is installed from Debian.

    python -m deploy.verify.image [--work FOLDER] [--keep]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from deploy.verify.check import DidNotRun, Report, run
from deploy.verify.processes import ROOT, Process, free_port, get, need, until

IMAGE, BASE = "localhost/dynamic-moe-router:verify", "localhost/base:bookworm"
TWO_GIB = 2 * 2**30


def output(*words: str, seconds: float = 1200.0, cwd: Path | None = None) -> str:
    """Runs a command and returns its standard output. Raises DidNotRun with the end of its output."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, cwd=cwd)
    if done.returncode:
        said = (done.stderr + done.stdout).strip()[-1500:]
        raise DidNotRun(f"{' '.join(words[:6])} ...: exit code {done.returncode}\n{said}")
    return done.stdout.strip()


class Store:
    """buildah with a separate storage, so that images of the machine stay as they are."""

    def __init__(self, folder: Path) -> None:
        self._words = [
            need("buildah", "buildah"),
            f"--root={folder / 'store'}",
            f"--runroot={folder / 'run'}",
            "--storage-driver=vfs",
        ]

    def __call__(self, *words: str) -> str:
        """Runs a buildah command and returns its output."""
        return output(*self._words, *words)


def make_base(store: Store, work: Path, report: Report) -> None:
    """Makes the base image from Debian bookworm; a kept folder saves the download."""
    root = work / "base"
    if not (root / "usr/bin/python3").exists():
        report.say("base: debootstrap bookworm")
        packages = "ca-certificates,python3,python3-venv"
        output(
            need("debootstrap", "debootstrap"),
            "--variant=minbase",
            f"--include={packages}",
            "bookworm",
            str(root),
        )
    container = store("from", "scratch")
    mounted = store("mount", container)
    output("cp", "-a", f"{root}/.", mounted)
    store("umount", container)
    store("commit", "-q", container, BASE)
    store("rm", container)


def make_context(work: Path, report: Report) -> Path:
    """Copies what docker would send: the files that .dockerignore admits, and the wheels."""
    context = work / "context"
    shutil.rmtree(context, ignore_errors=True)
    context.mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".dockerignore"):
        shutil.copy(ROOT / name, context)
    leave = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("moe_jax", "configs", "deploy/docker"):
        shutil.copytree(ROOT / name, context / name, ignore=leave)
    wheels = work / "wheels"
    if not wheels.exists():
        report.say("wheels: pip download by the lock file's digests")
        output(
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--require-hashes",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version=3.11",
            f"--dest={wheels}.part",
            f"--requirement={ROOT / 'deploy/docker/requirements.lock'}",
        )
        os.rename(f"{wheels}.part", wheels)
    shutil.copytree(wheels, context / "deploy/docker/wheels", copy_function=os.link)
    return context


def build(store: Store, context: Path, report: Report) -> dict[str, Any]:
    """Builds the image and returns its configuration."""
    start = time.monotonic()
    said = store(
        "build-using-dockerfile",
        "--isolation=chroot",
        "--format=docker",
        f"--build-arg=BASE_IMAGE={BASE}",
        "--build-arg=PIP_NO_INDEX=1",
        "--file=deploy/docker/Dockerfile.production",
        "-t",
        IMAGE,
        str(context),
    )
    warmed = [line for line in said.splitlines() if "compile cache" in line]
    report.hold(True, "the image builds without a network", f"{time.monotonic() - start:.0f} s")
    report.hold(bool(warmed), "the compile cache is warmed", warmed[0] if warmed else "")
    return json.loads(store("inspect", "--type", "image", IMAGE))["Docker"]["config"]


def check_config(config: dict[str, Any], report: Report) -> None:
    """Holds user, port, health check and stop signal of the image's configuration."""
    report.hold(config["User"] == "10001:10001", "it runs as 10001", config["User"])
    report.hold("8000/tcp" in config["ExposedPorts"], "port 8000 is exposed")
    report.hold(bool(config.get("Healthcheck", {}).get("Test")), "it has a health check")
    report.hold(config.get("StopSignal") in ("SIGTERM", "15"), "it is stopped by SIGTERM")


class Container:
    """The image under runc, on the machine's loopback."""

    def __init__(
        self,
        name: str,
        rootfs: str,
        config: dict[str, Any],
        work: Path,
        *,
        env: dict[str, str],
        mounts: dict[str, Path],
    ) -> None:
        self._runc = [need("runc", "runc"), "--root", str(work / "runc")]
        self.name, self.port = f"moe-verify-{os.getpid()}-{name}", free_port()
        bundle = work / f"bundle-{name}"
        bundle.mkdir()
        environment = dict(pair.split("=", 1) for pair in config["Env"])
        environment |= {"MOE_HOST": "127.0.0.1", "MOE_PORT": str(self.port), **env}
        spec = json.loads(SPEC)
        spec["process"]["args"] = [*config["Entrypoint"], *config["Cmd"]]
        spec["process"]["env"] = [f"{name}={value}" for name, value in environment.items()]
        spec["process"]["cwd"] = config["WorkingDir"]
        spec["root"] = {"path": rootfs, "readonly": True}
        spec["linux"]["resources"] = {"memory": {"limit": TWO_GIB}}
        spec["linux"]["cgroupsPath"] = f"/{self.name}"
        spec["mounts"] += [
            {
                "destination": inside,
                "source": str(outside),
                "type": "bind",
                "options": ["bind", "ro"],
            }
            for inside, outside in mounts.items()
        ]
        (bundle / "config.json").write_text(json.dumps(spec))
        self.process = Process(
            [*self._runc, "run", "--bundle", str(bundle), self.name], work / f"{name}.log"
        )
        self.started = time.monotonic()

    def ready(self, seconds: float = 240.0) -> bool:
        """Waits until the service is ready; False where it ends or takes longer."""
        url = f"http://127.0.0.1:{self.port}/v2/health/ready"
        return until(lambda: get(url)[0] == 200, seconds, alive=self.process)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Runs a command inside, as the container's user."""
        return subprocess.run(
            [*self._runc, "exec", "--user", "10001:10001", self.name, *words],
            capture_output=True,
            text=True,
            timeout=60,
        )

    def json(self, path: str) -> Any:
        """Returns the JSON that the service answers at a path."""
        return json.loads(get(f"http://127.0.0.1:{self.port}{path}")[1])

    def pid(self) -> int:
        """Returns the process id of the service, as the machine sees it."""
        return int(json.loads(output(*self._runc, "state", self.name))["pid"])

    def memory(self) -> tuple[int, int]:
        """Returns limit and peak of memory in bytes, from cgroup v2 or v1."""
        for line in Path(f"/proc/{self.pid()}/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "memory":
                at = Path(f"/sys/fs/cgroup/memory{path}")
                return (
                    int((at / "memory.limit_in_bytes").read_text()),
                    int((at / "memory.max_usage_in_bytes").read_text()),
                )
            if controllers == "" and Path(f"/sys/fs/cgroup{path}/memory.max").exists():
                at = Path(f"/sys/fs/cgroup{path}")
                return int((at / "memory.max").read_text()), int((at / "memory.peak").read_text())
        return 0, 0

    def terminate(self) -> bool:
        """Sends SIGTERM; False where the container does not run."""
        try:
            output(*self._runc, "kill", self.name, "TERM")
        except DidNotRun:
            return False
        return True

    def remove(self) -> None:
        """Kills the container where it still runs, and deletes it."""
        with contextlib.suppress(DidNotRun, subprocess.TimeoutExpired):
            if self.process.ended() is None:
                output(*self._runc, "kill", self.name, "KILL")
                self.process.wait(10)
        with contextlib.suppress(DidNotRun):
            output(*self._runc, "delete", "--force", self.name)


# The parts of the runtime specification that docker fills in as well. No capability is listed, so the
# process has none.
SPEC = """{
  "ociVersion": "1.0.2",
  "process": {
    "terminal": false, "user": {"uid": 10001, "gid": 10001}, "noNewPrivileges": true
  },
  "mounts": [
    {"destination": "/proc", "type": "proc", "source": "proc"},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
     "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
    {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
     "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
    {"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", "ro"]},
    {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs",
     "options": ["nosuid", "nodev", "mode=1777", "size=256m"]}
  ],
  "linux": {"namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]}
}"""


@contextlib.contextmanager
def mounted(store: Store) -> Iterator[str]:
    """Mounts the image's files and yields their folder."""
    container = store("from", "--pull-never", IMAGE)
    try:
        yield store("mount", container)
    finally:
        store("umount", container)
        store("rm", container)


def check_default(container: Container, report: Report) -> None:
    """Holds that the image without changes is confined, warmed and healthy."""
    if not report.hold(container.ready(), "it becomes ready with the configuration inside"):
        report.say(container.process.tail(40))
        return
    report.say(f"     ready after {time.monotonic() - container.started:.1f} s")
    status = Path(f"/proc/{container.pid()}/status").read_text()
    uid = next(line.split()[1] for line in status.splitlines() if line.startswith("Uid:"))
    caps = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    report.hold(uid == "10001", "the process is user 10001", f"uid {uid}")
    report.hold(int(caps, 16) == 0, "it has no capabilities", f"CapEff {caps}")
    for path in ("/surprise", "/app/surprise", "/opt/venv/surprise"):
        done = container.run("touch", path)
        report.hold(done.returncode != 0, f"{path} cannot be written", done.stderr.strip())
    done = container.run("sh", "-c", "diff -r /app/compile-cache /tmp/compile-cache | head -3")
    if done.stdout.strip():
        report.hold(False, "start-up compiled nothing that was not warmed", done.stdout.strip())
    else:
        report.hold(True, "start-up compiled nothing that was not warmed")
    done = container.run("python", "/app/healthcheck.py")
    report.hold(done.returncode == 0, "the health check says yes", done.stderr.strip())
    done = container.run("moe-jax", "smoke", f"http://127.0.0.1:{container.port}")
    report.hold(done.returncode == 0, "moe-jax smoke says yes", done.stdout + done.stderr)
    limit, peak = container.memory()
    report.hold(limit == TWO_GIB, "its memory is limited to 2 GiB", f"peak {peak / 2**20:.0f} MiB")


def check_configured(container: Container, report: Report) -> None:
    """Holds that a mounted configuration and variables act, and that a client library is answered."""
    if not report.hold(container.ready(), "it becomes ready with a mounted configuration"):
        report.say(container.process.tail(40))
        return
    settings = container.json("/health")["configuration"]["router_config"]
    report.hold(settings["num_experts"] == 16, "the mounted file is honoured", "num_experts=16")
    report.hold(settings["max_experts"] == 2, "the environment wins over it", "max_experts=2")
    environ = Path(f"/proc/{container.pid()}/environ").read_text().split("\0")
    report.hold("PJRT_NPROC=1" in environ, "threads follow CPU_REQUEST", "PJRT_NPROC=1")
    try:
        from tritonclient import http as triton
    except ModuleNotFoundError:
        report.skip("tritonclient routes through it", "pip install 'tritonclient[http]'")
        return
    client = triton.InferenceServerClient(f"127.0.0.1:{container.port}")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 16, settings["input_dim"]), dtype=np.float32)
    tensor = triton.InferInput("hidden_states", list(x.shape), "FP32")
    tensor.set_data_from_numpy(x)
    answer = client.infer("router", [tensor])
    counts = answer.as_numpy("num_experts_per_token")
    indices = answer.as_numpy("expert_indices")
    client.close()
    claim = "tritonclient routes through it"
    if counts is None or indices is None:
        report.hold(False, claim, "the answer lacks expert_indices or num_experts_per_token")
        return
    right = counts.shape == (2, 16) and bool(((indices >= 0).sum(-1) == counts).all())
    report.hold(right, claim, f"{counts.mean():.2f} experts a token")


def check_drain(container: Container, report: Report) -> None:
    """Holds that SIGTERM ends readiness at once, loses no request, and ends with exit code 0."""
    url = f"http://127.0.0.1:{container.port}"
    answers: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answers.append(get(f"{url}/v2/models/router", timeout=5)[0])
            time.sleep(0.05)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    time.sleep(0.5)
    if not report.hold(container.terminate(), "SIGTERM reaches it"):
        stop.set()
        return
    drained = until(lambda: get(f"{url}/ready")[0] == 503, 3, every=0.05)
    served = get(f"{url}/v2/models/router")[0]
    stop.set()
    asking.join(10)
    report.hold(drained, "SIGTERM turns readiness to 503")
    report.hold(served == 200, "requests are answered while it drains")
    report.hold(set(answers) == {200}, "no request is lost", f"{len(answers)} asked")
    try:
        code: int | None = container.process.wait(60)
    except subprocess.TimeoutExpired:
        code = None
    report.hold(code == 0, "it exits with 0", f"exit code {code}")


def verify(work: Path, report: Report, options: argparse.Namespace) -> None:
    """The image, built and run without a Docker daemon."""
    for stale in [*work.glob("bundle-*"), *work.glob("*.log")]:
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    if os.geteuid() != 0:
        raise DidNotRun("debootstrap, buildah's chroot and runc's limits need root")
    store = Store(work)
    make_base(store, work, report)
    config = build(store, make_context(work, report), report)
    check_config(config, report)
    folder = work / "config"
    folder.mkdir(exist_ok=True)
    changed = json.loads((ROOT / "configs" / "production.json").read_text())
    changed["router_config"]["num_experts"] = 16
    changed["serving"]["buckets"] = "32"
    (folder / "production.json").write_text(json.dumps(changed))
    with mounted(store) as rootfs:
        plain = Container("default", rootfs, config, work, env={}, mounts={})
        try:
            check_default(plain, report)
        finally:
            plain.remove()
        given = {
            "MOE_MAX_EXPERTS": "2",
            "MOE_ENVIRONMENT": "production",
            "MOE_DRAIN_SECONDS": "2",
            "CPU_REQUEST": "1",
        }
        second = Container(
            "configured", rootfs, config, work, env=given, mounts={"/app/config": folder}
        )
        try:
            check_configured(second, report)
            check_drain(second, report)
        finally:
            second.remove()


def main() -> int:
    """Runs the check as a command."""
    return run("verify-image", verify)


if __name__ == "__main__":
    sys.exit(main())
