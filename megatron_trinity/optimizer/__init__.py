"""Muon and AdamW for a whole Trinity model: who updates what, and how it is shared among ranks."""
