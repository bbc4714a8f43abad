"""Tokenizers of Hugging Face's GPT-2 folders, read and written.

There a token is text, and each byte stands for one printable character (GPT-2's own table). The
merges list which two tokens make each further one, in the order of their ids. A rank file
(tiktoken) has the tokens only, and the merges follow from the ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgpt.data.tokenizer import (
    EOT_TEXT,
    GPT2_SHA256,
    GPT2_VOCAB,
    JSON_NAME,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    dump_ranks,
    load_tokenizer,
    parse_ranks,
)
from fastgpt.errors import read_text, reading
from fastgpt.storage.atomic import write_text

OWN = "fastgpt"  # a folder of its own, since both formats call a file tokenizer.json
WANTED = (
    "fastgpt/tokenizer.json, vocab.json with merges.txt, or tokenizer.json, of bytes, of ASCII "
    "characters, or of byte-level BPE that ends with end-of-text, as GPT-2's does"
)
_DAMAGED = "is damaged, or not GPT-2's kind"


def byte_characters() -> list[str]:
    """Returns a character for each byte, itself if it is printable, else one from U+0100 on."""
    shown = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in shown]
    return [chr(b) if b in shown else chr(256 + others.index(b)) for b in range(256)]


def split_token(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Returns the tokens that a token is merged from last, by byte-pair encoding of lower ranks."""
    limit, parts = ranks[token], [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, limit) for a, b in zip(parts, parts[1:], strict=False)]
        if (lowest := min(pairs)) >= limit:
            break
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def vocabulary(tokenizer: Tokenizer) -> tuple[dict[str, int], list[str]] | None:
    """Returns (vocab.json, the merges) of a tokenizer, or None if it is no byte-level BPE.

    Bytes, and characters of one byte each, are a BPE without merges. Byte 0, which ends documents
    and is in no text, is spelled as end-of-text.
    """
    characters, merges = byte_characters(), []

    def spell(token: bytes) -> str:
        return "".join(characters[b] for b in token)

    if isinstance(tokenizer, ByteTokenizer):
        return {characters[b]: b for b in range(1, 256)} | {EOT_TEXT: 0}, []
    if isinstance(tokenizer, CharTokenizer) and all(c.isascii() for c in tokenizer.chars):
        return {spell(c.encode()): i for i, c in enumerate(tokenizer.chars)}, []
    if not isinstance(tokenizer, BPETokenizer):
        return None
    ranks = parse_ranks(tokenizer.rank_file, "tokenizer")
    for token in sorted((t for t in ranks if len(t) > 1), key=ranks.__getitem__):
        parts = split_token(token, ranks)
        if len(parts) != 2:
            return None  # not made by merging
        merges.append(" ".join(map(spell, parts)))
    vocab = {spell(token): rank for token, rank in ranks.items()}
    return vocab | {EOT_TEXT: tokenizer.eot}, merges


def write(folder: Path, tokenizer: Tokenizer, max_length: int | None = None) -> list[str]:
    """Writes the tokenizer into `folder`, in fastgpt's form and, if it has one, Hugging Face's.

    Returns the names of the files for Hugging Face. `max_length` is the model's block_size.
    """
    (folder / OWN).mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / OWN)
    if (found := vocabulary(tokenizer)) is None:
        return []
    vocab, merges = found
    config: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    special = EOT_TEXT if EOT_TEXT in vocab else None
    config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), special)
    if max_length is not None:
        config["model_max_length"] = max_length
    files = {
        "vocab.json": json.dumps(vocab, ensure_ascii=False),
        "merges.txt": "".join(f"{line}\n" for line in ("#version: 0.2", *merges)),
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    for name, content in files.items():
        write_text(folder / name, content)
    return list(files)


def read(folder: Path) -> Tokenizer | None:
    """Returns the tokenizer of a folder: fastgpt's own, else that of Hugging Face's files.

    transformers 5 writes tokenizer.json alone. Returns None without any of these files, or if they
    are no byte-level BPE that ends with end-of-text, no bytes and no ASCII characters. Raises
    UserError for damaged files.
    """
    path, merges_file = folder / "vocab.json", folder / "merges.txt"
    if (folder / OWN / JSON_NAME).is_file():
        return load_tokenizer(folder / OWN)
    if path.is_file() and merges_file.is_file():
        with reading(path, _DAMAGED):
            vocab, lines = json.loads(read_text(path)), read_text(merges_file).split("\n")
            merges = [line for line in lines if line and not line.startswith("#version")]
    elif (path := folder / JSON_NAME).is_file():
        with reading(path, _DAMAGED):
            data = json.loads(read_text(path))
            model, split = data["model"], data["pre_tokenizer"] or {}
            added = {token["content"]: token["id"] for token in data["added_tokens"]}
            kind: list[Any] = [model.get("type", "BPE"), model.get("end_of_word_suffix") or ""]
            kind += [split.get("type"), split.get("add_prefix_space"), split.get("use_regex", True)]
            others = added.keys() - {EOT_TEXT} or data.get("normalizer")
            if others or kind != ["BPE", "", "ByteLevel", False, True]:
                return None
            vocab, merges = model["vocab"] | added, model["merges"]
    else:
        return None
    byte_of = {character: b for b, character in enumerate(byte_characters())}
    with reading(path, _DAMAGED):
        in_order = sorted(vocab.keys() - {EOT_TEXT}, key=vocab.__getitem__)
        ranks = {bytes(byte_of[c] for c in text): vocab[text] for text in in_order}
        # A merge is "a b", or ["a", "b"] since version 0.20 of tokenizers.
        merged = ["".join(m.split(" ") if isinstance(m, str) else m) for m in merges]
    eot, chars = vocab.get(EOT_TEXT), [chr(token[0]) for token in ranks if len(token) == 1]
    for tokenizer in (ByteTokenizer(), CharTokenizer(chars)):
        if (vocab, merged) == vocabulary(tokenizer) != ({}, []):
            return tokenizer
    if eot != len(ranks) or not ranks or in_order[256:] != merged:
        return None
    with reading(path, _DAMAGED):
        parse_ranks(data := dump_ranks(ranks), path)
    gpt2 = len(ranks) + 1 == GPT2_VOCAB and hashlib.sha256(data).hexdigest() == GPT2_SHA256
    return BPETokenizer("gpt2" if gpt2 else f"bpe:{len(ranks) + 1}", ranks)
