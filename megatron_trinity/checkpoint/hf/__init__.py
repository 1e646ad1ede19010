"""Hugging Face's AfMoE form: the mapping, import, export, and the proof of an export."""
