"""Load a model and generate: the newest run, or a folder given on the command line."""

import sys

import fastgpt

model, tokenizer = fastgpt.load(sys.argv[1] if len(sys.argv) > 1 else "")
print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.name} tokenizer")
for seed in (1, 2):
    text = fastgpt.generate(model, tokenizer, "def ", max_new_tokens=60, seed=seed)
    print(f"--- seed {seed}\ndef {text}")
