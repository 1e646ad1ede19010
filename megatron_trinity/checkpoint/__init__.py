"""Checkpoints: written, judged, rewritten, and exchanged with Hugging Face."""
