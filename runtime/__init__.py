"""What a compiled model runs on: stores, kernels, sessions."""
