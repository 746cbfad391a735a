"""Measurements: always a ratio to a floor that ran in the same seconds on the same machine.

``moe-jax bench layer|decode|route|batch``; each function is in a module of its own.
"""
