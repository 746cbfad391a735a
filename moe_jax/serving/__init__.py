"""The service around the router: admission, cache, resilience, metrics, engine, and its transports.

``engine`` composes the other rooms, which know nothing of each other nor of JAX; ``http`` is a
transport around the engine. The semantics are in each module's first lines.
"""
