"""Where the merges of a BPE vocabulary come from: GPT-2's rank file, or training with rustbpe."""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import tiktoken

from fastgpt.data.download import fetch
from fastgpt.errors import UserError, read_bytes

# GPT-2's pretokenizer. The possessive quantifiers change no match, only save backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# sha256 of GPT-2's ranks as a rank file: OpenAI's r50k_base.tiktoken.
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_VOCAB = 50_257
GPT2_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
GPT2_NAME = "gpt2.tiktoken"
# What tiktoken.get_encoding("gpt2") keeps: the same vocabulary in GPT-2's first file format.
_GPT2_FIRST = (
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json",
)


def gpt2_ranks(vocab_file: str, cache: Path | None, download: bool) -> dict[bytes, int]:
    """GPT-2's 50,256 ranks, verified; `make_tokenizer` says where they are looked for."""
    own = cache / GPT2_NAME if cache else None
    if vocab_file:
        return _read_gpt2(Path(vocab_file))
    for path in (own, _tiktoken_cache(GPT2_URL)):
        if path and path.is_file():
            return _read_gpt2(path)
    if all(_tiktoken_cache(url).is_file() for url in _GPT2_FIRST):
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
        return _verified(ranks, _tiktoken_cache(_GPT2_FIRST[0]))
    if own and download:
        hint = f"download it elsewhere and pass --vocab_file={GPT2_NAME}"
        return _read_gpt2(fetch(GPT2_URL, own, sha256=GPT2_SHA256, hint=hint))
    raise UserError(
        "GPT-2's vocabulary is not on this machine: run `fastgpt prepare` with the same options "
        f"where there is network, or pass --vocab_file=FILE with the rank file {GPT2_URL}, or take "
        "--tokenizer=byte"
    )


def _tiktoken_cache(url: str) -> Path:
    folder = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR", folder))
    return Path(folder) / hashlib.sha1(url.encode()).hexdigest()


def _read_gpt2(path: Path) -> dict[bytes, int]:
    return _verified(parse_ranks(read_vocab_file(path), path), path)


def _verified(ranks: dict[bytes, int], path: Path) -> dict[bytes, int]:
    if hashlib.sha256(dump_ranks(ranks)).hexdigest() != GPT2_SHA256:
        raise UserError(
            f"{path} is not GPT-2's vocabulary: {len(ranks)} tokens whose sha256 is not "
            f"{GPT2_SHA256[:16]}...; a vocabulary of your own goes with --tokenizer=bpe"
        )
    return ranks


def train_ranks(texts: Iterable[str], size: int) -> dict[bytes, int]:
    """Train size - 257 merges on `texts`; the last id is left for end-of-text.

    Ties between equally frequent pairs go to the smaller pair of ids, so the result depends on
    the texts alone. UserError when rustbpe is not installed or the texts hold too few pairs.
    """
    try:
        import rustbpe
    except ImportError:
        raise UserError(
            f"--tokenizer=bpe:{size} needs rustbpe: pip install 'rustbpe>=0.1' (the extra [bpe])"
        ) from None
    trainer = rustbpe.Tokenizer()
    # Two merges may spell the same token; tiktoken knows the first only. So train some to spare.
    trainer.train_from_iterator(iter(texts), size - 1 + 256, pattern=GPT2_PATTERN)
    tokens = dict.fromkeys(bytes(token) for token, _ in trainer.get_mergeable_ranks())
    if (most := len(tokens) + 1) < size:
        raise UserError(
            f"--tokenizer=bpe:{size}: this text has pairs for a vocabulary of {most} only; "
            f"say --tokenizer=bpe:{most} or less"
        )
    return {token: rank for rank, token in enumerate(itertools.islice(tokens, size - 1))}


def dump_ranks(ranks: dict[bytes, int]) -> bytes:
    """A tiktoken rank file: `base64(token) rank` lines by rank."""
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)


def parse_ranks(data: bytes, where: Path | str) -> dict[bytes, int]:
    """Ranks in a rank file's bytes. UserError unless they are 0 .. n-1 and have all 256 bytes."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            what = f"line {number} is not 'base64 rank': no tiktoken rank file"
            raise UserError(f"{where}: {what}") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        top = len(ranks) - 1
        raise UserError(f"{where}: ranks are not 0 .. {top} once each: damaged rank file")
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise UserError(f"{where}: no token for byte {missing[0]}: damaged rank file")
    return ranks


def read_vocab_file(path: Path) -> bytes:
    """Bytes of a file the user named with --vocab_file."""
    try:
        return read_bytes(path, limit=1 << 28)
    except OSError as e:
        raise UserError(f"--vocab_file={path}: {e.strerror}") from None
