"""Pretraining of Trinity (AfMoE) models on Megatron-Core."""

__version__ = "0.1.0"
