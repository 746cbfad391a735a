"""The engine: one object that routes, watches itself and protects itself, and its factory."""

from moe_jax.serving.engine.core import RouterEngine
from moe_jax.serving.engine.factory import RouterFactory
from moe_jax.serving.engine.logs import make_logger
from moe_jax.serving.engine.requests import LOCAL, Client, Result

__all__ = ["LOCAL", "Client", "Result", "RouterEngine", "RouterFactory", "make_logger"]
