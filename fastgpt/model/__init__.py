"""What computes: GPT-2, the op table, and the machine it runs on."""
