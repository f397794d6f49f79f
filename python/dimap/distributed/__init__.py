"""Several processes: torch's groups, torchrun, sharded tensors."""
