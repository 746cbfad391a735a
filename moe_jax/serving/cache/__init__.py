"""The cache of results of whole requests. Uses numpy, not JAX."""

from moe_jax.serving.cache.entry import Entry, from_bytes, to_bytes
from moe_jax.serving.cache.gain import Gain
from moe_jax.serving.cache.keys import Keyer
from moe_jax.serving.cache.memory import ResultCache
from moe_jax.serving.cache.prefetch import HotInputs, Prefetcher, Successors
from moe_jax.serving.cache.redis_store import SharedCache

__all__ = [
    "Entry",
    "Gain",
    "HotInputs",
    "Keyer",
    "Prefetcher",
    "ResultCache",
    "SharedCache",
    "Successors",
    "from_bytes",
    "to_bytes",
]
