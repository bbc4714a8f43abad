"""Vocabularies as Hugging Face's GPT-2 tokenizer has them: the same ids for any text, both ways."""

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
from fastgpt.weights.hf_tokenizer import read, write
from tests.data.conftest import TEXT

os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    pytest.importorskip("rustbpe")
    return BPETokenizer("bpe:400", train_ranks([TEXT * 3], 400))


# A line each in twenty languages, with capitals, digits, joined and combining characters.
LANGUAGES = """\
English: It's 12,345 o'clock, isn't it? We'll see; they've gone.
Deutsch: Größe, Übermut, Straße – „naïve“ Füße.
Français : L’été à Orléans, où l’on mange des œufs ; ça va ?
Español: ¿Qué pasó, niño? ¡Mañana será otro día!
Português: Não há razão; a ação começou às 10h.
Italiano: Perché no? È già l'una, città più bella.
Polski: Zażółć gęślą jaźń, 3,5 zł.
Čeština: Příliš žluťoučký kůň úpěl ďábelské ódy.
Magyar: Árvíztűrő tükörfúrógép, őszinte űr.
Latviešu: Āda, ēna, Ķīna, Žurka; šķēres un ģīmis.
Türkçe: İstanbul'da ığdır, şöyle böyle çağ.
Tiếng Việt: Đường phố Hà Nội, những ngày mưa.
Ελληνικά: Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.
Русский: Съешь же ещё этих мягких булок, да выпей чаю.
العربية: نصٌّ عربيٌّ بتشكيلٍ كامل، ١٢٣.
עברית: דג סקרן שט בים מאוכזב ולפתע מצא חברה.
हिन्दी: नमस्ते, आप कैसे हैं? क्षत्रिय १२३।
ไทย: เป็นมนุษย์สุดประเสริฐเลิศคุณค่า
中文：世界，你好！今天是2024年。
日本語：こんにちは、世界。カタカナと漢字、ｶﾅ。
한국어: 안녕하세요, 세계! ㅋㅋㅋ
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
def test_twenty_languages_have_the_same_ids_there(kind: str, bpe: BPETokenizer, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    tokenizer = tokenizer_of(kind, bpe)
    assert "vocab.json" in write(tmp_path, tokenizer, max_length=77)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size and theirs.model_max_length == 77
    assert theirs.eos_token_id == theirs.bos_token_id == tokenizer.eot
    odd = [LANGUAGES, TEXT, "  two  blanks", "a<|b"]
    lines = ["It's 12,345 o'clock.\n"] if kind == "char" else [*LANGUAGES.split("\n"), *odd]
    for line in lines:
        ids = theirs(line)["input_ids"]
        assert ids == tokenizer.encode(line).tolist() and theirs.decode(ids) == line, line
    # Read back by fastgpt: from its own files, and as a download has them.
    for own in (True, False)[: 1 if kind == "char" else 2]:
        if not own:
            shutil.rmtree(tmp_path / "fastgpt")
        back = read(tmp_path)
        assert back is not None and back.fingerprint == tokenizer.fingerprint
        assert (back.name, back.eot) == (tokenizer.name, tokenizer.eot)


def test_a_vocabulary_of_another_kind_is_none(bpe: BPETokenizer, tmp_path: Path):
    assert read(tmp_path) is None
    assert write(tmp_path, CharTokenizer("aß")) == [], "characters of several bytes have no form"
    assert {p.name for p in tmp_path.iterdir()} == {"fastgpt"}
    write(tmp_path, bpe)
    shutil.rmtree(tmp_path / "fastgpt")
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join([*merges[:5], *reversed(merges[5:])]))
    assert read(tmp_path) is None


@pytest.mark.parametrize("vocab", ["no json", "[1]", '{"\\u6771": 0}'])
def test_damaged_files_are_named(bpe: BPETokenizer, tmp_path: Path, vocab: str):
    (tmp_path / "vocab.json").write_text(vocab)
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="vocab.json: is damaged, or not GPT-2's kind"):
        read(tmp_path)
