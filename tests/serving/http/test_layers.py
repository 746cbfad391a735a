"""The layers of a whole model behind one service: from a budget over a model folder to its answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from typer.testing import CliRunner

from moe_jax.cli import app
from moe_jax.models import fit_budget, load_model, save_budget
from moe_jax.serving.errors import ServingError
from moe_jax.serving.http.client import Refused, Service
from moe_jax.serving.http.grpc_server import GrpcServer
from tests.serving.served import served, small_engine

OLMOE = Path(__file__).parents[2] / "goldens" / "models" / "olmoe"


@pytest.fixture(scope="module")
def fitted():
    """A budget that saves more in the second layer, and the model under it."""
    ids = np.random.default_rng(0).integers(0, 96, (8, 12))
    uniform, other = (fit_budget(OLMOE, ids, rule="MinP", target_mean_k=k) for k in (1.6, 1.4))
    budget = dataclasses.replace(
        uniform,
        states={0: uniform.states[0], 1: other.states[1]},
        target_mean_k={0: 1.6, 1: 1.4},
    )
    model = load_model(OLMOE)
    for layer, block in model.blocks().items():
        model.set_block(layer, budget.block(layer, block))
    return budget, model


@pytest.fixture(scope="module")
def service(fitted, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    save_budget(fitted[0], folder / "budget")
    exported = CliRunner().invoke(
        app, ["export", str(folder / "budget"), "--out", str(folder / "export")]
    )
    assert exported.exit_code == 0, exported.output
    engine = small_engine(
        checkpoint=str(folder / "export" / "checkpoint"), serve_moe="auto", buckets="8,32"
    )
    with served(engine) as started:
        yield started


@pytest.fixture(scope="module")
def states() -> np.ndarray:
    """f32[L, B, S, D]: hidden states of two layers."""
    return np.random.default_rng(1).standard_normal((2, 2, 10, 32)).astype(np.float32)


def routed(model, layer: int, x: np.ndarray):
    """What the model itself decides: experts and weights by slot, -1 and 0 in empty slots."""
    block = model.blocks()[layer]
    tokens = jnp.asarray(x.reshape(-1, x.shape[-1]))
    routing = jax.jit(block.router)(block.params["router"], block.state, tokens)
    used = np.asarray(routing.expert_indices) < routing.num_experts
    shape = (*x.shape[:2], -1)
    indices = np.where(used, routing.expert_indices, -1).reshape(shape)
    return indices, np.asarray(routing.combine_weights).reshape(shape)


def check(answer, model, layer: int, x: np.ndarray) -> None:
    indices, weights = routed(model, layer, x)
    for row in np.ndindex(x.shape[:2]):
        ours = dict(zip(answer["expert_indices"][row], answer["expert_weights"][row], strict=True))
        own = dict(zip(indices[row], weights[row], strict=True))
        assert ours == pytest.approx(own, abs=1e-6)
    counts = (indices >= 0).sum(axis=-1)
    np.testing.assert_array_equal(answer["num_experts_per_token"], counts)


def test_each_layer_answers_as_the_model_routes_under_the_budget(service, fitted, states):
    _, model = fitted
    client = Service(f"http://{service.address}")
    for layer in (0, 1):
        answer, facts = client.infer(f"layer_{layer}", {"hidden_states": states[layer]})
        check(answer, model, layer, states[layer])
        assert not facts["cached"]
    # Equal hidden states for another layer are another request.
    other, facts = client.infer("layer_1", {"hidden_states": states[0]})
    assert not facts["cached"]
    check(other, model, 1, states[0])
    first, _ = client.infer("router", {"hidden_states": states[0]})
    check(first, model, 0, states[0])


def test_one_request_returns_the_experts_of_all_layers(service, fitted, states):
    _, model = fitted
    client = Service(f"http://{service.address}")
    outputs = ("expert_indices", "expert_weights", "num_experts_per_token", "router_logits")
    answer, _ = client.infer("layers", {"hidden_states": states}, outputs)
    assert answer["router_logits"].shape == (2, 2, 10, 8)
    for layer in (0, 1):
        check({n: a[layer] for n, a in answer.items()}, model, layer, states[layer])
    again, _ = client.infer("layers", {"hidden_states": states})
    np.testing.assert_array_equal(again["expert_indices"], answer["expert_indices"])
    mask = np.ones((2, 10), bool)
    mask[0, 3:] = False
    masked, _ = client.infer("layers", {"hidden_states": states, "token_mask": mask})
    assert (masked["expert_indices"][:, ~mask] == -1).all()
    assert (masked["num_experts_per_token"][:, mask] >= 1).all()


def test_what_is_no_layer_is_refused_by_name(service, states):
    client = Service(f"http://{service.address}")
    with pytest.raises(Refused, match=r"layer_0, layer_1, layers, got 'layer_7'") as refusal:
        client.infer("layer_7", {"hidden_states": states[0]})
    assert refusal.value.status == 404
    for wrong in (states[:1], states[0]):
        with pytest.raises(Refused) as refusal:
            client.infer("layers", {"hidden_states": wrong})
        assert refusal.value.status == 400
    engine = service.engine
    with pytest.raises(
        ServingError, match=r"\[2, batch, sequence, 32\], .* got shape \[1, 2, 10, 32\]"
    ):
        engine.infer("layers", states[:1])
    with pytest.raises(ServingError, match="layer: expected one of layer_0, layer_1, got 'layers'"):
        engine.route(states[0], layer="layers")
    assert engine.lookup("layers", "0" * 32) is None


def test_layers_have_their_own_versions_digests_and_counts(service, fitted, states):
    budget, _ = fitted
    engine = service.engine
    before = engine.get_metrics()["requests"]["answered"]
    parts = [
        engine.infer(f"layer_{n}", states[n], client=engine.identify(peer="p")) for n in (0, 1)
    ]
    versions = [part.info["model_version"] for part in parts]
    assert len(set(versions)) == 2
    digests = [engine.infer(f"layer_{n}", states[n]).info["digest"] for n in (0, 1)]
    assert engine.lookup("layer_0", digests[0]) is not None
    assert engine.lookup("layer_1", digests[0]) is None, "another layer's answer"
    _, metadata = service.json("GET", "/v2/models/layer_1")
    assert versions[1] in metadata["versions"]
    _, metadata = service.json("GET", "/v2/models/layers")
    assert metadata["inputs"][0]["shape"] == [2, -1, -1, 32]
    _, health = service.json("GET", "/health")
    router = health["components"]["router"]
    assert {"layer_0", "layer_1", "layers"} <= set(router["models"])
    assert [layer["version"] for layer in router["served_layers"].values()] == versions
    means = [layer["target_mean_k"] for layer in router["served_layers"].values()]
    assert means == pytest.approx([budget.target_mean_k[n] for n in (0, 1)], abs=1e-5)
    assert means[0] != means[1]

    def value(name: str) -> float:
        lines = engine.metrics_text().decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(name))

    first, second = (value(f'moe_layer_tokens_total{{layer="layer_{n}"}}') for n in (0, 1))
    engine.infer("layers", states, use_cache=False)
    engine.infer("layer_1", states[1], use_cache=False)
    assert value('moe_layer_tokens_total{layer="layer_0"}') == first + 20
    assert value('moe_layer_tokens_total{layer="layer_1"}') == second + 40
    assert engine.get_metrics()["requests"]["answered"] > before
    used = [value(f'moe_layer_assignments_total{{layer="layer_{n}"}}') for n in (0, 1)]
    tokens = [value(f'moe_layer_tokens_total{{layer="layer_{n}"}}') for n in (0, 1)]
    drift = [value(f'moe_layer_budget_drift_ratio{{layer="layer_{n}"}}') for n in (0, 1)]
    assert drift == pytest.approx([u / t / m for u, t, m in zip(used, tokens, means, strict=True)])
    whole = sum(used) / sum(t * m for t, m in zip(tokens, means, strict=True))
    assert value("moe_budget_drift_ratio") == pytest.approx(whole)


def test_the_guides_route_takes_a_layer(service, fitted, states):
    _, model = fitted
    result = service.engine.route(states[1], layer="layer_1")
    check(result, model, 1, states[1])
    assert result["routing_info"]["flop_baseline"] == "top_max=2"


def test_grpc_serves_the_layers_too(service, fitted, states):
    _, model = fitted
    server = GrpcServer(service.server.transport, "127.0.0.1", 0)
    server.start()
    try:
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            hidden = triton_grpc.InferInput("hidden_states", list(states.shape), "FP32")
            hidden.set_data_from_numpy(states)
            result = client.infer("layers", [hidden])
            assert result is not None
            answer = {
                n: np.asarray(result.as_numpy(n))
                for n in ("expert_indices", "expert_weights", "num_experts_per_token")
            }
        for layer in (0, 1):
            check({n: a[layer] for n, a in answer.items()}, model, layer, states[layer])
    finally:
        server.stop(0.0).wait(10)
