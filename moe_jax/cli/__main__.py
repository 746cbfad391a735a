"""``python -m moe_jax.cli``."""

from moe_jax.cli import main

main()
