"""The training entry point and what Megatron's loop calls back."""
