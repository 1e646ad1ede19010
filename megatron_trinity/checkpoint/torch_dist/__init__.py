"""Megatron's `torch_dist` format, which any layout loads, without a model."""
