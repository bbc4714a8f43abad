"""Storage: run folders, checkpoints, files that are whole or absent."""
