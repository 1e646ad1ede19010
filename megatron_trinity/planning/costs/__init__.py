"""What a step would cost a GPU, counted while it runs on a CPU."""
