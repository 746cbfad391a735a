"""A gateway before expert servers: it asks a routing service, batches by k, and plans placement.

    moe-jax serve --checkpoint runs/topp --port 8000
    pip install 'tritonclient[http]'
    python examples/routing_gateway.py 127.0.0.1:8000

The gateway has hidden states of several requests. It asks the service once, sorts the requests by the
number of experts that they need, cuts them into batches of similar cost, and counts which experts each
batch calls, so that every expert server receives only the tokens of its experts. Here the hidden
states are random; a model sends what reaches the layer that the service serves.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import numpy as np
import tritonclient.http as triton

from moe_jax.parallel.planning import plan_placement


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Requests that run together.

    Attributes:
        requests: i64[R], numbers of the requests.
        rows: number of expert calls: the sum of k over their tokens.
        calls: i64[E], calls of each expert.
    """

    requests: np.ndarray
    rows: int
    calls: np.ndarray


def sizes(client: Any) -> tuple[int, int]:
    """Returns the width of the hidden states and the number of experts of the served router."""
    about = client.get_model_metadata("router")
    shapes = {one["name"]: one["shape"] for one in (*about["inputs"], *about["outputs"])}
    return int(shapes["hidden_states"][-1]), int(shapes["router_logits"][-1])


def ask(client: Any, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the experts i32[B, S, K] (-1 for none) and their number k i32[B, S].

    Args:
        client: of the routing service.
        hidden: f32[B, S, D], B requests of S tokens.
    """
    tensor = triton.InferInput("hidden_states", list(hidden.shape), "FP32")
    tensor.set_data_from_numpy(hidden)
    answer = client.infer("router", [tensor])
    return answer.as_numpy("expert_indices"), answer.as_numpy("num_experts_per_token")


def batches_by_k(
    experts: np.ndarray, counts: np.ndarray, *, num_experts: int, size: int
) -> list[Batch]:
    """Returns batches of ``size`` requests, in the order of the requests' mean k."""
    order = np.argsort(counts.mean(axis=1), kind="stable")
    batches = []
    for start in range(0, len(order), size):
        requests = order[start : start + size]
        used = experts[requests]
        batches.append(
            Batch(
                requests=requests,
                rows=int(counts[requests].sum()),
                calls=np.bincount(used[used >= 0], minlength=num_experts),
            )
        )
    return batches


def main(address: str, *, requests: int = 16, tokens: int = 32, servers: int = 2) -> list[Batch]:
    """Asks the service about random requests and prints the plan of the gateway."""
    client = triton.InferenceServerClient(address)
    width, num_experts = sizes(client)
    hidden = np.random.default_rng(0).standard_normal((requests, tokens, width), np.float32)
    experts, counts = ask(client, hidden)
    batches = batches_by_k(experts, counts, num_experts=num_experts, size=max(1, requests // 4))
    for number, batch in enumerate(batches):
        print(
            f"batch {number}: requests {batch.requests.tolist()}, {batch.rows} expert calls, mean k "
            f"{batch.rows / (len(batch.requests) * tokens):.2f}"
        )
    load = np.sum([batch.calls for batch in batches], axis=0)
    plan = plan_placement(load, servers, replicas=-num_experts % servers)
    print(f"calls of each expert: {load.tolist()}")
    for server, held in enumerate(plan.experts.tolist()):
        print(f"server {server}: experts {held}, {plan.load[server]:.0f} calls")
    return batches


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("address", help="such as 127.0.0.1:8000")
    main(parser.parse_args().address)
