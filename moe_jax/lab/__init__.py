"""Experiments that prove the library: text, a small language model, training, calibration."""
