"""Output of a trained model: text, losses, scores."""
