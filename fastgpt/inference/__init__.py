"""What a trained model gives: text, losses, scores."""
