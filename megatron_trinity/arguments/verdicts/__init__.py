"""What becomes of each of Megatron's flags."""
