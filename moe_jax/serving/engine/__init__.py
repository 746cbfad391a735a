"""The engine of the service and its factory."""

from moe_jax.serving.engine.core import RouterEngine
from moe_jax.serving.engine.factory import RouterFactory
from moe_jax.serving.engine.logs import make_logger
from moe_jax.serving.engine.requests import LOCAL, Client, Query, Result
from moe_jax.serving.resilience import Call

__all__ = [
    "LOCAL",
    "Call",
    "Client",
    "Query",
    "Result",
    "RouterEngine",
    "RouterFactory",
    "make_logger",
]
