"""Measurements: always a ratio to a floor that ran in the same seconds on the same machine.

``moe-jax bench layer|decode|route|batch``; the functions are in the modules of the same names.
"""
