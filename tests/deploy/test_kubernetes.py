"""Kubernetes (Z01–Z12, B05): strict schemas, the guide's names and thresholds, two colours."""

import copy
import functools
import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from moe_jax.config import load_config

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
COLOURS = ROOT / "deploy" / "blue-green"
VERSION = kubernetes_validate.latest_version()
APP = "dynamic-moe-router"

# Kinds of the cluster's own schemas; the other two come with operators and are checked by hand below.
BUILT_IN = [
    "deployment.yaml",
    "autoscaler.yaml",
    "disruption-budget.yaml",
    "network-policy.yaml",
]

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kustomize did not run: there is no kubectl here"
)


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


@functools.cache
def rendered(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def kind(objects: list[dict[str, Any]], name: str) -> dict[str, Any]:
    [one] = [d for d in objects if d["kind"] == name]
    return one


def container() -> dict[str, Any]:
    deployment = kind(documents(KUBERNETES / "deployment.yaml"), "Deployment")
    [one] = deployment["spec"]["template"]["spec"]["containers"]
    return one


def valid(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, VERSION, strict=True)


@pytest.mark.parametrize("name", BUILT_IN)
def test_manifests_hold_to_the_strict_schema_and_a_misspelt_one_does_not(name):
    for document in documents(KUBERNETES / name):
        valid(document)
        broken = copy.deepcopy(document)
        broken["metadata"]["lables"] = broken["metadata"].pop("labels")
        with pytest.raises(kubernetes_validate.ValidationError):
            valid(broken)


@needs_kubectl
@pytest.mark.parametrize(
    "folder", [KUBERNETES, COLOURS / "blue", COLOURS / "green", COLOURS / "shared"]
)
def test_kustomize_renders_what_the_schema_takes(folder):
    for document in rendered(folder):
        valid(document)


def test_the_guides_names_and_ports():
    objects = documents(KUBERNETES / "deployment.yaml")
    service = kind(objects, "Service")
    assert service["metadata"]["name"] == f"{APP}-service"
    [port] = service["spec"]["ports"]
    ports = {p["name"]: p["containerPort"] for p in container()["ports"]}
    assert (port["port"], ports[port["targetPort"]]) == (80, 8000)
    assert service["spec"]["sessionAffinity"] == "ClientIP"
    labels = kind(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert labels["app"] == APP
    assert service["spec"]["selector"].items() <= labels.items()


def test_the_pod_is_confined_and_probed():
    deployment = kind(documents(KUBERNETES / "deployment.yaml"), "Deployment")
    pod, one = deployment["spec"]["template"]["spec"], container()
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["runAsUser"] == 10001  # as in the image
    assert one["securityContext"]["readOnlyRootFilesystem"]
    assert not one["securityContext"]["allowPrivilegeEscalation"]
    assert one["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert one["resources"]["limits"]["memory"] == one["resources"]["requests"]["memory"] == "2Gi"
    assert one["livenessProbe"]["httpGet"]["path"] == "/v2/health/live"
    assert one["livenessProbe"]["periodSeconds"] == 30
    assert one["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert one["startupProbe"]["httpGet"]["path"] == "/v2/health/ready"


def test_there_is_time_to_drain():
    pod = kind(documents(KUBERNETES / "deployment.yaml"), "Deployment")["spec"]["template"]["spec"]
    sleep = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    serving = load_config(ROOT / "configs" / "production.json", env=plain_environment()).serving
    needed = sleep + serving.drain_seconds + serving.request_timeout_seconds
    assert pod["terminationGracePeriodSeconds"] > needed


def plain_environment() -> dict[str, str]:
    return {e["name"]: e["value"] for e in container()["env"] if "value" in e}


def test_every_moe_variable_is_a_setting_and_secrets_come_from_a_secret():
    secrets = {e["name"] for e in container()["env"] if "secretKeyRef" in e.get("valueFrom", {})}
    assert secrets == {"MOE_REDIS_URL", "MOE_API_KEYS", "MOE_ADMIN_KEY"}
    address = {"MOE_REDIS_URL": "redis://redis:6379/0"}
    environment = {**plain_environment(), **dict.fromkeys(secrets, "x" * 32), **address}
    config = load_config(ROOT / "configs" / "production.json", env=environment)
    assert config.environment == "production"


def test_the_config_map_is_the_shipped_configuration():
    data = kind(documents(KUBERNETES / "deployment.yaml"), "ConfigMap")["data"]
    shipped = json.loads((ROOT / "configs" / "production.json").read_text())
    assert json.loads(data["production.json"]) == shipped, "copy configs/production.json into it"


def test_autoscaling_is_the_guides():
    spec = kind(documents(KUBERNETES / "autoscaler.yaml"), "HorizontalPodAutoscaler")["spec"]
    triggers = {}
    for metric in spec["metrics"]:
        if metric["type"] == "Resource":
            resource = metric["resource"]
            triggers[resource["name"]] = resource["target"]["averageUtilization"]
        else:
            pods = metric["pods"]
            triggers[pods["metric"]["name"]] = pods["target"]["averageValue"]
    assert triggers == {
        "cpu": 70,
        "memory": 80,
        "moe_pending_requests": "100",
        "moe_request_duration_seconds_mean": "200m",
    }
    assert spec["minReplicas"] < spec["maxReplicas"]
    adapter = yaml.safe_load((KUBERNETES / "prometheus-adapter.yaml").read_text())
    served = {rule["name"]["as"] for rule in adapter["rules"]["custom"]}
    assert served == set(triggers) - {"cpu", "memory"}
    # The queue can be that long before the service itself refuses.
    assert load_config(ROOT / "configs" / "production.json", env={}).serving.max_queue > 100


def test_idle_instances_do_not_hold_the_autoscaler_up():
    """Its formula, ceil(n * used / target), with the memory of an instance that does nothing."""
    idle = 512  # MiB; `python -m deploy.verify.token_cost` shows less than that even under load
    spec = kind(documents(KUBERNETES / "autoscaler.yaml"), "HorizontalPodAutoscaler")["spec"]
    memory = next(m["resource"] for m in spec["metrics"] if m["resource"]["name"] == "memory")
    requested = container()["resources"]["requests"]["memory"]
    assert requested.endswith("Gi")
    used = 100 * idle / (1024 * int(requested[:-2]))
    for instances in range(spec["minReplicas"] + 1, spec["maxReplicas"] + 1):
        wanted = math.ceil(instances * used / memory["target"]["averageUtilization"])
        assert wanted < instances


def test_kedas_triggers_are_the_same_four():
    [scaled] = documents(KUBERNETES / "keda.yaml")
    assert (scaled["apiVersion"], scaled["kind"]) == ("keda.sh/v1alpha1", "ScaledObject")
    spec = scaled["spec"]
    assert spec["scaleTargetRef"]["name"] == APP
    resources = {t["type"]: t["metadata"]["value"] for t in spec["triggers"][:2]}
    assert resources == {"cpu": "70", "memory": "80"}
    queue, mean = spec["triggers"][2:]
    assert (queue["metricType"], queue["metadata"]["threshold"]) == ("AverageValue", "100")
    assert (mean["metricType"], mean["metadata"]["threshold"]) == ("Value", "0.2")


def test_the_service_monitor_selects_the_service():
    [monitor] = documents(KUBERNETES / "service-monitor.yaml")
    service = kind(documents(KUBERNETES / "deployment.yaml"), "Service")
    wanted = monitor["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= service["metadata"]["labels"].items()
    [endpoint] = monitor["spec"]["endpoints"]
    assert endpoint["port"] in {p["name"] for p in service["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"


@needs_kubectl
@pytest.mark.parametrize("colour", ["blue", "green"])
def test_a_colour_is_whole_apart_and_without_the_service(colour):
    objects = rendered(COLOURS / colour)
    names = {d["kind"]: d["metadata"]["name"] for d in objects}
    assert "Service" not in names
    assert all(name.endswith(f"-{colour}") for name in names.values())
    deployment = kind(objects, "Deployment")["spec"]
    assert deployment["selector"]["matchLabels"] == {"app": APP, "color": colour}
    pod = deployment["template"]["spec"]
    assert pod["volumes"][0]["configMap"]["name"] == names["ConfigMap"]
    assert pod["serviceAccountName"] == names["ServiceAccount"]
    target = kind(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"]
    assert target == names["Deployment"]
    for other in ("PodDisruptionBudget", "NetworkPolicy"):
        spec = kind(objects, other)["spec"]
        selector = spec.get("selector") or spec["podSelector"]
        assert selector["matchLabels"]["color"] == colour


@needs_kubectl
def test_the_shared_service_points_at_one_colour():
    service = kind(rendered(COLOURS / "shared"), "Service")["spec"]
    assert service["selector"] == {"app": APP, "color": "blue"}
    assert (
        service["ports"]
        == kind(documents(KUBERNETES / "deployment.yaml"), "Service")["spec"]["ports"]
    )


# --- switching: a kubectl and a moe-jax that write down what they are asked ------------------


@pytest.fixture
def cluster(tmp_path):
    """A cluster of one text file: the colour that the service points at."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (tmp_path / "colour").write_text("blue")
    (programs / "kubectl").write_text(
        f"""#!/bin/sh
echo "kubectl $*" >> {tmp_path}/log
case "$1" in
  get) cat {tmp_path}/colour ;;
  rollout) exit ${{ROLLOUT:-0}} ;;
  port-forward) exec sleep 30 ;;
  patch) echo "$*" | sed 's/.*"color":"\\([a-z]*\\)".*/\\1/' | tr -d '\\n' > {tmp_path}/colour ;;
esac
"""
    )
    (programs / "moe-jax").write_text(
        f'#!/bin/sh\necho "moe-jax $*" >> {tmp_path}/log\nexit ${{SMOKE:-0}}\n'
    )
    for program in programs.iterdir():
        program.chmod(0o755)

    def switch(*words: str, **environment: str) -> tuple[int, str, list[str]]:
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        done = subprocess.run(
            ["sh", str(COLOURS / "switch.sh"), *words],
            env={"PATH": f"{programs}:{os.environ['PATH']}", "SWITCH_SETTLE": "0", **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )
        calls = log.read_text().splitlines() if log.exists() else []
        return done.returncode, (tmp_path / "colour").read_text(), calls

    return switch


def test_switch_waits_proves_and_then_moves_the_traffic(cluster):
    code, colour, calls = cluster("green")
    assert (code, colour) == (0, "green")
    acts = [call.split()[1] for call in calls if not call.startswith("kubectl port-forward")]
    assert acts == ["get", "rollout", "smoke", "patch"]
    assert "deployment/dynamic-moe-router-green" in " ".join(calls)
    assert cluster("green")[:2] == (0, "green")
    assert cluster("back")[:2] == (0, "blue")


@pytest.mark.parametrize("fault", [{"ROLLOUT": "1"}, {"SMOKE": "1"}])
def test_a_colour_that_does_not_prove_itself_gets_no_traffic(cluster, fault):
    code, colour, calls = cluster("green", **fault)
    assert (code, colour) == (1, "blue")
    assert not any("patch" in call for call in calls)


def test_switch_refuses_other_words(cluster):
    assert cluster("purple")[0] == 2
    assert cluster()[0] == 2
