"""What the library is proven with: text, a small language model, training, calibration, comparison."""
