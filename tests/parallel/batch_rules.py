"""Run by test_batch_rules.py in a process of its own, as JAX must start with 4 host devices.

Prints one JSON object: rule -> how its choices on devices compare. It judges nothing.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np

import moe_jax
from moe_jax.parallel.sharding import P
from moe_jax.routers import expert_similarity, with_similarity

T, D, E, DEVICES = 48, 8, 8, 4
SHARE = T // DEVICES
RULES = {
    "SeqTopK": moe_jax.SeqTopK(num_experts=E, k=2, sequence_length=SHARE, online=False),
    "Sinkhorn": moe_jax.Sinkhorn(num_experts=E, k=2),
    "BalancedAssignment": moe_jax.BalancedAssignment(num_experts=E),
    "Piggyback": moe_jax.Piggyback(num_experts=E, k=3),
    "Reroute": moe_jax.Reroute(num_experts=E, k=3),
    "SharedBudget": moe_jax.SharedBudget(num_experts=E, k=2, max_distinct=3),
}


def state_of(rule):
    state = rule.init_state()
    if isinstance(rule, moe_jax.Reroute):
        weights = jax.random.normal(jax.random.key(5), (E, 4, D))
        state = with_similarity(state, expert_similarity(weights))
    return state


def compared(rule, x, mask, mesh):
    params, state = rule.init(jax.random.key(0), D), state_of(rule)

    def used(x, mask):
        return rule(params, state, x, token_mask=mask).expert_mask

    alone = jax.jit(used)
    one = np.asarray(alone(x, mask))
    split = jax.shard_map(used, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    devices = np.asarray(jax.jit(split)(x, mask))
    shares = [np.asarray(alone(x[i : i + SHARE], mask[i : i + SHARE])) for i in range(0, T, SHARE)]
    return {
        "as each share": bool((devices == np.concatenate(shares)).all()),
        "as one device": bool((devices == one).all()),
        "distinct on one device": int(one.any(axis=0).sum()),
        "distinct on devices": int(devices.any(axis=0).sum()),
        "most distinct of a device": max(int(s.any(axis=0).sum()) for s in shares),
        "load": devices.sum(axis=0).tolist(),
        "plain load": np.asarray(plain_load(rule, params, x, mask)).tolist(),
    }


def plain_load(rule, params, x, mask):
    top = moe_jax.TopK(num_experts=E, k=rule.k)
    return top(params, top.init_state(), x, token_mask=mask).expert_mask.sum(axis=0)


def main():
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(T, D)) + 0.4, jnp.float32)
    mask = jnp.arange(T) % 11 != 3
    print(json.dumps({name: compared(rule, x, mask, mesh) for name, rule in RULES.items()}))


if __name__ == "__main__":
    main()
