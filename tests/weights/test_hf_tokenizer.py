"""Tokenizers of Hugging Face's GPT-2 folders, which have the same ids in both directions."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from fastgpt.data.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    make_tokenizer,
    train_ranks,
)
from fastgpt.errors import UserError
from fastgpt.weights.hf_tokenizer import byte_characters, read, write
from tests.data.conftest import TEXT

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    pytest.importorskip("rustbpe")
    return BPETokenizer("bpe:400", train_ranks([TEXT * 3], 400))


# Capitals, digits, joined and combining characters.
LANGUAGES = """\
English: It's 12,345 o'clock, isn't it? We'll see; they've gone.
Français : L’été à Orléans, où l’on mange des œufs ; ça va ?
Türkçe: İstanbul'da ığdır. Tiếng Việt: Đường phố Hà Nội, những ngày mưa.
Русский: Съешь же ещё этих мягких булок. Ελληνικά: Ξεσκεπάζω την ψυχοφθόρα.
العربية: نصٌّ عربيٌّ بتشكيلٍ كامل، ١٢٣. עברית: דג סקרן שט בים.
हिन्दी: नमस्ते, क्षत्रिय १२३। ไทย: เป็นมนุษย์สุดประเสริฐเลิศคุณค่า
中文：世界，你好！日本語：こんにちは、世界。ｶﾅ。한국어: 안녕하세요!
🙂👩‍👩‍👧‍👦 e\u0301 \u00a0\t  tabs\r\n\n  end  """


def tokenizer_of(kind: str, bpe: BPETokenizer) -> Tokenizer:
    if kind == "bpe":
        return bpe
    if kind == "char":
        return CharTokenizer(sorted(set("It's 12,345 o'clock.\n")))
    if kind == "gpt2":
        try:
            return make_tokenizer("gpt2")
        except UserError:
            pytest.skip("GPT-2's vocabulary is not on this machine")
    return ByteTokenizer()


@pytest.mark.parametrize("kind", ["byte", "char", "bpe", "gpt2"])
def test_many_languages_have_the_same_ids_there(kind: str, bpe: BPETokenizer, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_of(kind, bpe)
    assert "vocab.json" in write(tmp_path, tokenizer, max_length=77)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(reference) == tokenizer.vocab_size and reference.model_max_length == 77
    assert reference.eos_token_id == reference.bos_token_id == tokenizer.eot
    odd = [LANGUAGES, TEXT, "  two  blanks", "a<|b"]
    lines = ["It's 12,345 o'clock.\n"] if kind == "char" else [*LANGUAGES.split("\n"), *odd]
    for line in lines:
        ids = reference(line)["input_ids"]
        assert ids == tokenizer.encode(line).tolist() and reference.decode(ids) == line, line
    # Read back by fastgpt: from its own files, as downloads have them, as transformers 5 saves it.
    reference.save_pretrained(saved := tmp_path / "saved")
    assert not (saved / "vocab.json").exists() or transformers.__version__ < "5"
    for folder, removed in ((tmp_path, None), (tmp_path, tmp_path / "fastgpt"), (saved, None)):
        if removed:
            shutil.rmtree(removed)
        back = read(folder)
        assert back is not None and back.fingerprint == tokenizer.fingerprint
        assert (back.name, back.eot) == (tokenizer.name, tokenizer.eot)


def edited(folder: Path, change: dict) -> None:
    """Writes a tokenizer.json like GPT-2's on the hub, with other values in its sections."""
    merges = ["Ġ t", "h e"]
    vocab = [*byte_characters(), "Ġt", "he", "<|endoftext|>"]
    model = {"vocab": {token: i for i, token in enumerate(vocab)}, "merges": merges}
    data: dict = {"model": model, "normalizer": None, "added_tokens": []}
    data |= {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    for section, values in change.items():
        data[section] = (data[section] or {}) | values if isinstance(values, dict) else values
    (folder / "tokenizer.json").write_text(json.dumps(data))


def test_both_spellings_of_merges(tmp_path: Path):
    for merges in (["Ġ t", "h e"], [["Ġ", "t"], ["h", "e"]]):
        edited(tmp_path, {"model": {"merges": merges}})
        tokenizer = read(tmp_path)
        assert (tokenizer.name, tokenizer.encode("the t").tolist()) == ("bpe:259", [116, 257, 256])


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "Unigram"}},
        {"model": {"end_of_word_suffix": "</w>"}},
        {"model": {"merges": []}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"add_prefix_space": True}},
        {"pre_tokenizer": {"use_regex": False}},
        {"normalizer": {"type": "NFC"}},
        {"added_tokens": [{"content": "<pad>", "id": 259}]},
    ],
)
def test_other_kinds_are_not_read(change, tmp_path: Path):
    edited(tmp_path, change)
    assert read(tmp_path) is None


@pytest.mark.parametrize(
    "change", [{"model": {"merges": 5}}, {"model": {"vocab": {"東": 0}}}, {"added_tokens": [5]}]
)
def test_damaged_files_are_named(change, tmp_path: Path):
    edited(tmp_path, change)
    with pytest.raises(UserError, match="tokenizer.json: is damaged, or not GPT-2's kind"):
        read(tmp_path)


def test_a_vocabulary_of_another_kind_is_none(bpe: BPETokenizer, tmp_path: Path):
    assert read(tmp_path) is None
    assert write(tmp_path, CharTokenizer("aß")) == [], "characters of several bytes have no form"
    assert {p.name for p in tmp_path.iterdir()} == {"fastgpt"}
    write(tmp_path, bpe)
    shutil.rmtree(tmp_path / "fastgpt")
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join([*merges[:5], *reversed(merges[5:])]))
    assert read(tmp_path) is None
    for vocab in ("no json", "[1]"):
        (tmp_path / "vocab.json").write_text(vocab)
        with pytest.raises(UserError, match="vocab.json: is damaged, or not GPT-2's kind"):
            read(tmp_path)
