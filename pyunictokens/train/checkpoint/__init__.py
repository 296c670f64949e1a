"""A run's state on disk: checkpoints, tensors, shards, and who writes them when."""
