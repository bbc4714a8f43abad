"""Train GPT-2-class models as fast as one CUDA GPU allows."""

__version__ = "0.1.0"
