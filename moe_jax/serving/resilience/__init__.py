"""What stands between a sick device and the callers: breaker, bulkhead, one retry. Knows no JAX."""

from moe_jax.serving.resilience.breaker import STATES, BreakerPolicy, CircuitBreaker, Ticket
from moe_jax.serving.resilience.bulkhead import Bulkhead
from moe_jax.serving.resilience.retry import BadOutput, is_transient, retry_once

__all__ = [
    "STATES",
    "BadOutput",
    "BreakerPolicy",
    "Bulkhead",
    "CircuitBreaker",
    "Ticket",
    "is_transient",
    "retry_once",
]
