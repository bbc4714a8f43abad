"""Folder with one small run and two folders of weights, for both commands."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt.data.tokenizer import ByteTokenizer
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.weights import hf_tokenizer, hugging_face
from tests import runs
from tests.models import random_model
from tests.process import fastgpt


def shape(bias: bool = True, gelu: str = "tanh", n_head: int = 2) -> ModelShape:
    return ModelShape(2, n_head, 32, 24, 50, bias, gelu)


@pytest.fixture(scope="package")
def home(tmp_path_factory) -> Path:
    """Makes out/, a run on characters, weights/, untrained, and lively/ with control characters."""
    folder = tmp_path_factory.mktemp("home")
    path = runs.write_text(folder)
    fastgpt(folder, "train", *runs.TINY, f"--input={path}", "--tokenizer=char", "--out_dir=out")
    untrained = GPT(ModelShape(1, 2, 16, 64, 256, True)).init_weights(0)
    talking = random_model(ModelShape(2, 2, 32, 48, 128, bias=True))
    for name, model in {"weights": untrained, "lively": talking}.items():
        hugging_face.write(folder / name, model.shape, model.state_dict())
        hf_tokenizer.write(folder / name, ByteTokenizer())
    return folder
