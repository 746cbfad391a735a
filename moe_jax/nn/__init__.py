"""Flax modules. They hold arrays and call the pure functions; they contain no maths.

``moe_jax.nn.nnx`` and ``moe_jax.nn.linen`` have the same three modules, ``Router``, ``MoE`` and
``DynamicMoE``, with the same parameter tree as ``init_moe_layer`` and bit-equal outputs. Import the
one that your model is written in.
"""
