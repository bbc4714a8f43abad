"""`python -m fastgpt` and `torchrun ... -m fastgpt`."""

from fastgpt.cli import main

if __name__ == "__main__":
    main()
