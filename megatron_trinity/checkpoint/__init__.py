"""Checkpoints: the mapping to and from Hugging Face's AfMoE form."""
