"""What happens: a training run from its first line to its last."""
