"""What stays: run folders, checkpoints, files that are whole or absent."""
