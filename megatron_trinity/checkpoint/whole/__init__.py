"""Whether a checkpoint is whole, and which of a run's checkpoints is loaded and kept."""
