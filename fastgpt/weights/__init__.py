"""What comes from elsewhere and goes there: Hugging Face, nanoGPT, the hub."""
