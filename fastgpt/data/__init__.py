"""Data from text to the batch of step s: corpora, tokenizers, token files, batches."""
