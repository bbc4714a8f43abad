"""What comes out: text, losses, scores."""
