"""An exported folder as others use it: ctranslate2's converter and its own greedy decoding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.inference.generate import BatchGenerator, Sampling
from fastgpt.model.gpt import GPT, ModelShape
from fastgpt.weights import hf_tokenizer, hugging_face
from tests.weights.test_hf_tokenizer import LANGUAGES, bpe, tokenizer_of  # noqa: F401

os.environ["HF_HUB_OFFLINE"] = "1"
POSITIONS = 48


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["byte", "bpe", "gpt2"])
def test_ctranslate2_goes_on_with_the_same_tokens(kind: str, bpe, tmp_path: Path):  # noqa: F811
    """Beginnings in twenty languages, each continued greedily to the end of the model's window."""
    ctranslate2 = pytest.importorskip("ctranslate2", reason="needs pip install ctranslate2")
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_of(kind, bpe)
    shape = ModelShape(2, 2, 32, POSITIONS, tokenizer.vocab_size, True, "tanh")
    model = GPT(shape)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.2, generator=generator)
    exported, converted = tmp_path / "exported", tmp_path / "converted"
    hf_tokenizer.write(exported, tokenizer, POSITIONS)
    hugging_face.write(exported, shape, model.state_dict(), tokenizer.eot)
    converter = [sys.executable, "-m", "ctranslate2.converters.transformers"]
    folders = [f"--model={exported}", f"--output_dir={converted}"]
    done = subprocess.run([*converter, *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    theirs = ctranslate2.Generator(str(converted), compute_type="float32")
    words = transformers.AutoTokenizer.from_pretrained(exported)
    ours = BatchGenerator(model.eval(), 1, POSITIONS, Sampling(temperature=0))
    for line in filter(None, LANGUAGES.splitlines()):
        ids = words(line)["input_ids"][: POSITIONS // 2]
        new = POSITIONS - len(ids)
        want = [row[0] for row in ours.stream([ids], new, seeds=[0])]
        tokens = words.convert_ids_to_tokens(ids)
        options = {"max_length": new, "include_prompt_in_result": False, "end_token": []}
        got = theirs.generate_batch([tokens], **options)[0].sequences_ids[0]
        assert got == want, line
