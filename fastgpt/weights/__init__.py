"""Models read from elsewhere and written for elsewhere: Hugging Face, nanoGPT, the hub."""
