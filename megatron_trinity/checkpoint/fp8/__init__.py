"""Matrices in FP8, as an export can write them."""
