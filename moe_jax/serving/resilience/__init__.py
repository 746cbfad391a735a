"""Protection against a failing or overloaded device: breaker, bulkhead, one retry. Knows no JAX."""

from moe_jax.serving.resilience.breaker import STATES, BreakerPolicy, CircuitBreaker, Ticket
from moe_jax.serving.resilience.bulkhead import Bulkhead
from moe_jax.serving.resilience.fair_queue import FairQueue
from moe_jax.serving.resilience.job import Call
from moe_jax.serving.resilience.retry import BadOutput, is_transient, retry_once

__all__ = [
    "STATES",
    "BadOutput",
    "BreakerPolicy",
    "Bulkhead",
    "Call",
    "CircuitBreaker",
    "FairQueue",
    "Ticket",
    "is_transient",
    "retry_once",
]
