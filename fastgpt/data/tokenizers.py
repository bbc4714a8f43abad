"""Text to token ids and back: bytes, characters, GPT-2's BPE, or a BPE trained on your text.

A tokenizer saves itself as `tokenizer.json`, plus `tokenizer.tiktoken` (one `base64 rank` line per
token) if it has merges, so that a dataset or run folder decodes without network.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from fastgpt.data.vocabulary import (
    GPT2_PATTERN,
    dump_ranks,
    gpt2_ranks,
    parse_ranks,
    read_vocab_file,
    train_ranks,
)
from fastgpt.errors import UserError, read_bytes, read_text
from fastgpt.storage.files import atomic_file, write_text

JSON_NAME = "tokenizer.json"
RANKS_NAME = "tokenizer.tiktoken"
EOT_TEXT = "<|endoftext|>"

MAX_BPE_VOCAB = 1_000_000


class Tokenizer(ABC):
    """Token ids are 0 .. vocab_size - 1; `eot` ends a document (None: this tokenizer has none)."""

    name: str
    vocab_size: int
    eot: int | None = None

    @abstractmethod
    def _encode(self, text: str) -> np.ndarray: ...

    @abstractmethod
    def _decode(self, ids: np.ndarray) -> bytes: ...

    def _spec(self) -> dict[str, Any]:
        """What `tokenizer.json` holds, beyond name, vocab_size and eot."""
        return {}

    @property
    def dtype(self) -> np.dtype:
        """uint16 if every id fits, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def encode(self, text: str) -> np.ndarray:
        """(n,) ids of `dtype`. Text that looks like a special token is encoded as plain text."""
        return self._encode(text).astype(self.dtype, copy=False)

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """`encode` of UTF-8 bytes."""
        return self.encode(data.decode())

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes that `ids` stand for. ValueError for an id outside the vocabulary."""
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.vocab_size):
            raise ValueError(
                f"ids span {array.min()} .. {array.max()}, but {self.name} has ids "
                f"0 .. {self.vocab_size - 1}"
            )
        return self._decode(array.ravel())

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Text of `ids`; bytes that are no UTF-8 (a character cut in two) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex sha256 of all that decides which ids a text gets."""
        return hashlib.sha256(json.dumps(self._json(), sort_keys=True).encode()).hexdigest()

    def _json(self) -> dict[str, Any]:
        own = dict(name=self.name, vocab_size=self.vocab_size, eot=self.eot, **self._spec())
        return {"format": "fastgpt-tokenizer", "version": 1, **own}

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` (and `tokenizer.tiktoken`) into `folder`."""
        write_text(Path(folder) / JSON_NAME, json.dumps(self._json(), indent=1) + "\n")


class ByteTokenizer(Tokenizer):
    """One id per byte of UTF-8. Byte 0, which no text file holds, ends a document."""

    name = "byte"
    vocab_size = 256
    eot = 0

    def _encode(self, text: str) -> np.ndarray:
        return self.encode_bytes(text.encode())

    def encode_bytes(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.uint8).astype(np.uint16)

    def _decode(self, ids: np.ndarray) -> bytes:
        return ids.astype(np.uint8).tobytes()


class CharTokenizer(Tokenizer):
    """One id per character, in code point order, as nanoGPT's shakespeare_char has it."""

    name = "char"

    def __init__(self, chars: Iterable[str]):
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        self._table = np.full(max(map(ord, self.chars), default=0) + 1, -1, np.int32)
        self._table[[ord(c) for c in self.chars]] = np.arange(self.vocab_size)

    def _encode(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = self._table[np.minimum(points, len(self._table) - 1)]
        unknown = (ids < 0) | (points >= len(self._table))
        if unknown.any():
            char = chr(points[unknown.argmax()])
            raise UserError(
                f"character {char!r} (U+{ord(char):04X}) is not among the {self.vocab_size} "
                "characters of this vocabulary; leave it out or prepare the data with "
                "--tokenizer=byte"
            )
        return ids

    def _decode(self, ids: np.ndarray) -> bytes:
        return "".join([self.chars[i] for i in ids]).encode()

    def _spec(self) -> dict[str, Any]:
        return {"chars": "".join(self.chars)}


# What the regular expression engine of tiktoken calls \s (Unicode White_Space).
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONG = 4096
_LONG_RUN = re.compile(f"[{_SPACE}]{{{_LONG},}}")


def _split_long_runs(text: str) -> list[str]:
    """Cut runs of thousands of whitespace characters out of `text`; the tokens stay the same.

    tiktoken's regular expressions overflow their stack on a run of about a million. A run of n
    before other text always splits into n - 1, which is one match, and the last one.
    """
    step = _LONG // 2  # a long run holds a whole stretch between two multiples of this
    if not any(text[i : i + step].isspace() for i in range(0, len(text), step)):
        return [text]
    parts, done = [], 0
    for run in _LONG_RUN.finditer(text):
        end = run.end() - (run.end() < len(text))
        parts += [text[done : run.start()], text[run.start() : end]]
        done = end
    return [part for part in (*parts, text[done:]) if part]


class BPETokenizer(Tokenizer):
    """Byte-pair encoding by tiktoken with GPT-2's pretokenizer; the last id ends a document."""

    def __init__(self, name: str, ranks: dict[bytes, int], pattern: str = GPT2_PATTERN):
        self.name = name
        self.eot: int = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.pattern = pattern
        self.rank_file = dump_ranks(ranks)
        self._ranks = ranks
        self._of_thread = threading.local()

    @property
    def _tiktoken(self) -> tiktoken.Encoding:
        """This thread's own: threads that share one queue for its regular expression's memory."""
        if not hasattr(self._of_thread, "encoding"):
            self._of_thread.encoding = tiktoken.Encoding(
                self.name,
                pat_str=self.pattern,
                mergeable_ranks=self._ranks,
                special_tokens={EOT_TEXT: self.eot},
            )
        return self._of_thread.encoding

    def _encode(self, text: str) -> np.ndarray:
        # To a buffer, not to a list of Python ints: 1.6x faster, and the GIL is free all along.
        encode = self._tiktoken.encode_to_numpy
        parts = [encode(part, disallowed_special=()) for part in _split_long_runs(text)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _decode(self, ids: np.ndarray) -> bytes:
        return self._tiktoken.decode_bytes(ids.tolist())

    def _spec(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.rank_file).hexdigest()
        return dict(pattern=self.pattern, eot_text=EOT_TEXT, ranks=RANKS_NAME, ranks_sha256=digest)

    def save(self, folder: Path) -> None:
        with atomic_file(Path(folder) / RANKS_NAME) as f:
            f.write(self.rank_file)
        super().save(folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `save` wrote into `folder`. UserError if it is missing or damaged."""
    path = Path(folder) / JSON_NAME
    try:
        spec = json.loads(read_text(path))
        name = spec["name"]
        if (spec["format"], spec["version"]) != ("fastgpt-tokenizer", 1):
            raise UserError(f"{path}: written by another version of fastgpt")
        tokenizer: Tokenizer = ByteTokenizer()
        if name == "char":
            tokenizer = CharTokenizer(spec["chars"])
        elif name != "byte":
            ranks = Path(folder) / RANKS_NAME
            tokenizer = BPETokenizer(name, parse_ranks(read_bytes(ranks), ranks), spec["pattern"])
    except FileNotFoundError as e:
        raise UserError(f"{e.filename} is missing: prepare the data again") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is damaged ({e}): prepare the data again") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from None
    if tokenizer._json() != spec:
        raise UserError(f"{path} and the vocabulary beside it do not belong together")
    return tokenizer


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text of ids as they come, holding back bytes until their character is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in ids:
        if text := decoder.decode(tokenizer.decode_bytes([i])):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def parse_spec(spec: str) -> tuple[str, int]:
    """('byte' | 'char' | 'gpt2' | 'bpe', N): N is 0 but for `bpe:N`. UserError for others."""
    if spec in ("byte", "char", "gpt2", "bpe"):
        return spec, 0
    number = spec.removeprefix("bpe:")
    if number == spec or not number.isascii() or not number.isdigit():
        raise UserError(
            f"--tokenizer={spec}: choose byte, char, gpt2, or bpe:N with N the vocabulary's size"
        )
    if not 257 <= int(number) <= MAX_BPE_VOCAB:
        raise UserError(
            f"--tokenizer={spec}: N must be in 257 .. {MAX_BPE_VOCAB} "
            "(256 bytes, the merges, and the end-of-text token)"
        )
    return "bpe", int(number)


def make_tokenizer(
    spec: str,
    *,
    vocab_file: str = "",
    texts: Iterable[str] = (),
    cache: Path | None = None,
    download: bool = False,
) -> Tokenizer:
    """The tokenizer that `spec` names.

    `texts` is read for `char` (its characters) and `bpe:N` (to train; pieces as `pieces.cut` makes
    them give the counts of the whole text). `vocab_file` is a rank file for `gpt2`, or for `bpe`,
    which takes any. Without it, GPT-2's ranks are looked for in `cache`, then in tiktoken's own
    cache, then, with `download`, on the network, to be kept in `cache`.
    """
    kind, size = parse_spec(spec)
    if vocab_file and kind not in ("gpt2", "bpe"):
        raise UserError(f"--vocab_file goes with --tokenizer=gpt2 or bpe, not {spec}")
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        chars: set[str] = set()
        for text in texts:
            chars.update(text)
        return CharTokenizer(sorted(chars))
    if kind == "gpt2":
        return BPETokenizer("gpt2", gpt2_ranks(vocab_file, cache, download))
    if vocab_file:
        path = Path(vocab_file)
        ranks = parse_ranks(read_vocab_file(path), path)
        own = f"bpe:{len(ranks) + 1}"
        if size not in (0, len(ranks) + 1):
            raise UserError(
                f"--tokenizer={spec}: {path} makes a vocabulary of {len(ranks) + 1} with "
                f"end-of-text; say --tokenizer={own}"
            )
        return BPETokenizer(own, ranks)
    if not size:
        raise UserError("--tokenizer=bpe needs a size to train (bpe:N) or a --vocab_file")
    parts = (part for text in texts for part in _split_long_runs(text))
    return BPETokenizer(spec, train_ranks(parts, size))
