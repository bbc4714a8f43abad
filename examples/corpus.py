"""A corpus of your own: a folder of text files, a vocabulary of its characters, a small model.

Any folder or file does; here it is made on the spot.
"""

from pathlib import Path

import fastgpt

folder = Path("my_corpus")
folder.mkdir(exist_ok=True)
for n in range(40):
    lines = [f"{i} times {n} is {i * n}." for i in range(100)]
    (folder / f"table_{n}.txt").write_text("\n".join(lines) + "\n")

run = fastgpt.fit(
    "laptop", input=str(folder), tokenizer="char", max_iters=200, eval_interval=100,
    log_interval=20, sample_tokens=0,
)  # fmt: skip
model, tokenizer = fastgpt.load(run)
print("7 times 8 is" + fastgpt.generate(model, tokenizer, "7 times 8 is", max_new_tokens=20))
