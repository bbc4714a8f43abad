"""Train from a config in Python; the settings are those of `fastgpt train --help`."""

import fastgpt

run = fastgpt.fit("laptop", max_iters=200, eval_interval=100, log_interval=20, sample_tokens=0)
print(f"run in {run}; its loss curve is {run / 'loss.png'}")
