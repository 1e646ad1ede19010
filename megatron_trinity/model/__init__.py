"""The Trinity (AfMoE) model on megatron-core's modules."""
