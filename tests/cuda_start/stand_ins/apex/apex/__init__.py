"""NVIDIA's Apex, to be found."""
