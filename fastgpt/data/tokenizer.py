"""Tokenizers of bytes, characters, GPT-2's BPE, or a BPE trained on the user's text.

A tokenizer saves itself as `tokenizer.json`, and its merges as `tokenizer.tiktoken` (a line
`base64 rank` per token). nanoGPT's `meta.pkl` is read as a character tokenizer.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import pickle
import pickletools
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import tiktoken

from fastgpt.data.download import fetch
from fastgpt.data.progress import progress
from fastgpt.errors import UserError, read_bytes, read_text, reading
from fastgpt.storage.atomic import atomic_file, write_text

JSON_NAME = "tokenizer.json"
RANKS_NAME = "tokenizer.tiktoken"
EOT_TEXT = "<|endoftext|>"

# GPT-2's pretokenizer. The possessive quantifiers change no match, only save backtracking.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# sha256 of GPT-2's ranks as a rank file: OpenAI's r50k_base.tiktoken.
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
GPT2_VOCAB = 50_257
GPT2_URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"
GPT2_NAME = "gpt2.tiktoken"


class Tokenizer(ABC):
    """Map of text to ids in 0 .. vocab_size - 1. The id `eot`, or None, ends a document."""

    name: str
    vocab_size: int
    eot: int | None = None

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Returns (n,) ids of `dtype`. Special tokens in the text are encoded as plain text."""

    @abstractmethod
    def _decode(self, ids: np.ndarray) -> bytes: ...

    @property
    def dtype(self) -> np.dtype:
        """Returns uint16 if every id fits, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """Returns the bytes of `ids`. Raises ValueError for an id outside the vocabulary."""
        array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)
        wrong = array[(array < 0) | (array >= self.vocab_size)]
        if wrong.size:
            raise ValueError(f"id {wrong[0]}, but {self.name} has 0 .. {self.vocab_size - 1}")
        return self._decode(array)

    def decode(self, ids: Iterable[int] | np.ndarray) -> str:
        """Returns the text of `ids`. Bytes that are no UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @functools.cached_property
    def fingerprint(self) -> str:
        """Returns the hex sha256 of everything that determines the ids of a text."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Returns the content of `tokenizer.json`."""
        own = dict(name=self.name, vocab_size=self.vocab_size, eot=self.eot)
        return {"format": "fastgpt-tokenizer", "version": 1, **own}

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` (and `tokenizer.tiktoken`) into `folder`."""
        write_text(Path(folder) / JSON_NAME, json.dumps(self.to_json(), indent=1) + "\n")


class ByteTokenizer(Tokenizer):
    """Ids of the bytes of UTF-8. Byte 0, which no text file holds, ends a document."""

    name = "byte"
    vocab_size = 256
    eot = 0

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(self.dtype)

    def _decode(self, ids: np.ndarray) -> bytes:
        return ids.astype(np.uint8).tobytes()


class CharTokenizer(Tokenizer):
    """Ids of characters in code point order, as in nanoGPT's shakespeare_char."""

    name = "char"

    def __init__(self, chars: Iterable[str]):
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        self._table = np.full(max(map(ord, self.chars), default=0) + 1, -1, np.int32)
        self._table[[ord(c) for c in self.chars]] = np.arange(self.vocab_size)

    def encode(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = self._table[np.minimum(points, len(self._table) - 1)]
        unknown = (ids < 0) | (points >= len(self._table))
        if unknown.any():
            char = chr(points[unknown.argmax()])
            wrong = f"character {char!r} (U+{ord(char):04X}) is not among the {self.vocab_size}"
            raise UserError(f"{wrong} of this vocabulary; leave it out or use --tokenizer=byte")
        return ids.astype(self.dtype)

    def _decode(self, ids: np.ndarray) -> bytes:
        return "".join([self.chars[i] for i in ids]).encode()

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "chars": "".join(self.chars)}


# Characters that tiktoken's regular expressions call \s (Unicode White_Space).
_SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_LONG = 4096
_LONG_RUN = re.compile(f"[{_SPACE}]{{{_LONG},}}")


def _split_long_runs(text: str) -> list[str]:
    """Splits off runs of thousands of whitespace characters, which leaves the tokens the same.

    tiktoken's regular expressions overflow their stack on a run of about a million. A run of n
    before other text always splits into n - 1, which is one match, and the last one.
    """
    step = _LONG // 2  # a long run holds a whole stretch between two multiples of this
    if not any(text[i : i + step].isspace() for i in range(0, len(text), step)):
        return [text]
    cuts = [0]
    for run in _LONG_RUN.finditer(text):
        cuts += [run.start(), run.end() - (run.end() < len(text))]
    return [text[a:b] for a, b in itertools.pairwise([*cuts, len(text)]) if a < b]


class BPETokenizer(Tokenizer):
    """Byte-pair encoding by tiktoken with GPT-2's pretokenizer; the last id ends a document."""

    def __init__(self, name: str, ranks: dict[bytes, int], pattern: str = GPT2_PATTERN):
        self.name, self.pattern = name, pattern
        self.eot: int = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.rank_file = dump_ranks(ranks)
        self._ranks = ranks
        self._of_thread = threading.local()

    @property
    def _tiktoken(self) -> tiktoken.Encoding:
        """Returns this thread's own encoding, since threads that share one wait for its regex."""
        if not hasattr(self._of_thread, "encoding"):
            self._of_thread.encoding = tiktoken.Encoding(
                self.name,
                pat_str=self.pattern,
                mergeable_ranks=self._ranks,
                special_tokens={EOT_TEXT: self.eot},
            )
        return self._of_thread.encoding

    def encode(self, text: str) -> np.ndarray:
        # Encoding to a buffer is 1.6 times faster than to Python ints, and does not hold the GIL.
        encode = self._tiktoken.encode_to_numpy
        parts = [encode(part, disallowed_special=()) for part in _split_long_runs(text)]
        return np.concatenate(parts).astype(self.dtype)

    def _decode(self, ids: np.ndarray) -> bytes:
        return self._tiktoken.decode_bytes(ids.tolist())

    def to_json(self) -> dict[str, Any]:
        digest = hashlib.sha256(self.rank_file).hexdigest()
        own = dict(pattern=self.pattern, eot_text=EOT_TEXT, ranks=RANKS_NAME, ranks_sha256=digest)
        return super().to_json() | own

    def save(self, folder: Path) -> None:
        with atomic_file(Path(folder) / RANKS_NAME) as f:
            f.write(self.rank_file)
        super().save(folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer that `save` wrote into `folder`. Raises UserError if damaged."""
    path, ranks = Path(folder) / JSON_NAME, Path(folder) / RANKS_NAME
    with reading(path, "is damaged: prepare the data again"):
        spec = json.loads(read_text(path))
        if (spec["format"], spec["version"]) != ("fastgpt-tokenizer", 1):
            raise UserError(f"{path}: written by another version of fastgpt")
        tokenizer: Tokenizer = ByteTokenizer()
        if spec["name"] == "char":
            tokenizer = CharTokenizer(spec["chars"])
        elif spec["name"] != "byte":
            tokenizer = BPETokenizer(spec["name"], read_ranks(ranks), spec["pattern"])
    if tokenizer.to_json() != spec:
        raise UserError(f"{path} and the vocabulary beside it do not belong together")
    return tokenizer


def parse_spec(spec: str) -> tuple[str, int]:
    """Returns ('byte' | 'char' | 'gpt2' | 'bpe', N), where N is 0 but for `bpe:N`."""
    if (match := re.fullmatch(r"byte|char|gpt2|bpe(?::([0-9]{1,9}))?", spec)) is None:
        known = "byte, char, gpt2, or bpe:N with N the vocabulary's size"
        raise UserError(f"--tokenizer={spec}: choose {known}")
    if match[1] and not 257 <= int(match[1]) <= 1_000_000:
        what = "256 bytes, the merges, and the end-of-text token"
        raise UserError(f"--tokenizer={spec}: N must be in 257 .. 1000000 ({what})")
    return spec.partition(":")[0], int(match[1] or 0)


def make_tokenizer(
    spec: str,
    vocab_file: str = "",
    texts: Iterable[str] = (),
    cache: Path | None = None,
    download: bool = False,
) -> Tokenizer:
    """Returns the tokenizer that `spec` names.

    `char` and `bpe:N` are made from `texts`, which may be pieces of `prepare.cut`. `vocab_file` is
    a rank file for `gpt2`, or any for `bpe`. Without it, GPT-2's ranks come from `cache`, or, with
    `download`, from the network.
    """
    kind, size = parse_spec(spec)
    if vocab_file and kind not in ("gpt2", "bpe"):
        raise UserError(f"--vocab_file goes with --tokenizer=gpt2 or bpe, not {spec}")
    if kind == "byte":
        return ByteTokenizer()
    if kind == "char":
        return CharTokenizer(sorted({char for text in texts for char in set(text)}))
    if kind == "gpt2":
        return BPETokenizer("gpt2", _gpt2_ranks(vocab_file, cache, download))
    if vocab_file:
        ranks = read_ranks(vocab_file)
        own = f"bpe:{len(ranks) + 1}"
        if size not in (0, len(ranks) + 1):
            raise UserError(f"--tokenizer={spec}: {vocab_file} makes --tokenizer={own}")
        return BPETokenizer(own, ranks)
    if not size:
        raise UserError("--tokenizer=bpe needs a size to train (bpe:N) or a --vocab_file")
    parts = (part for text in texts for part in _split_long_runs(text))
    return BPETokenizer(spec, train_ranks(parts, size))


# --- ranks of a BPE vocabulary --------------------------------------------------------------------


def _gpt2_ranks(vocab_file: str, cache: Path | None, download: bool) -> dict[bytes, int]:
    """Returns GPT-2's 50,256 ranks, verified, from the places that `make_tokenizer` names."""
    path = Path(vocab_file or (cache or Path()) / GPT2_NAME)
    if vocab_file or path.is_file():
        ranks = read_ranks(path)
    elif cache and download:
        hint = f"download it elsewhere and pass --vocab_file={GPT2_NAME}"
        ranks = read_ranks(fetch(GPT2_URL, path, sha256=GPT2_SHA256, hint=hint))
    else:
        raise UserError(
            "GPT-2's vocabulary is not on this machine: run `fastgpt prepare` once, or pass "
            f"--vocab_file=FILE with the rank file {GPT2_URL}, or take --tokenizer=byte"
        )
    if hashlib.sha256(dump_ranks(ranks)).hexdigest() != GPT2_SHA256:
        hint = "a vocabulary of your own goes with --tokenizer=bpe"
        raise UserError(f"{path} is not GPT-2's vocabulary, by its sha256; {hint}")
    return ranks


def train_ranks(texts: Iterable[str], size: int) -> dict[bytes, int]:
    """Trains size - 257 merges on `texts` and leaves the last id for end-of-text.

    The smaller of two equally frequent pairs of ids is merged first, so the result depends on the
    texts alone. Raises UserError when rustbpe is not installed or the texts hold too few pairs.
    """
    try:
        import rustbpe
    except ImportError:
        need = "needs rustbpe: pip install 'rustbpe>=0.1' (the extra [bpe])"
        raise UserError(f"--tokenizer=bpe:{size} {need}") from None
    trainer = rustbpe.Tokenizer()
    # Two merges may spell the same token, of which tiktoken knows the first. So train some more.
    # A small buffer keeps counting, which takes the longest, in step with the progress of reading.
    buffer = 4 * (os.cpu_count() or 4)
    with _merges_shown():
        trainer.train_from_iterator(iter(texts), size + 255, buffer, pattern=GPT2_PATTERN)
    tokens = dict.fromkeys(bytes(token) for token, _ in trainer.get_mergeable_ranks())
    if (most := len(tokens) + 1) < size:
        wrong = f"--tokenizer=bpe:{size}: this text has pairs for a vocabulary of {most} only"
        raise UserError(f"{wrong}; say --tokenizer=bpe:{most} or less")
    return {token: rank for rank, token in enumerate(itertools.islice(tokens, size - 1))}


@contextlib.contextmanager
def _merges_shown() -> Iterator[None]:
    """Shows the progress of merging, which rustbpe logs at each per cent."""
    logger, done, advance = logging.getLogger("rustbpe"), 0, None

    def show(record: logging.LogRecord) -> bool:
        nonlocal done, advance
        if match := re.search(r"\((\d+)/(\d+) merges\)", record.getMessage()):
            count, total = map(int, match.groups())
            advance = advance or stack.enter_context(progress("merging", total, unit="merges"))
            advance(count - done)
            done = count
        return record.levelno > logging.INFO

    logger.setLevel(logging.INFO)
    logger.addFilter(show)
    with contextlib.ExitStack() as stack:
        stack.callback(logger.removeFilter, show)
        yield


def dump_ranks(ranks: dict[bytes, int]) -> bytes:
    """Returns a tiktoken rank file: `base64(token) rank` lines by rank."""
    by_rank = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)


def parse_ranks(data: bytes, where: Path | str) -> dict[bytes, int]:
    """Returns a rank file's ranks. Raises UserError unless they are 0 .. n-1 with all bytes."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{where}: line {number} is not 'base64 rank'") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{where}: ranks are not 0 .. {len(ranks) - 1} once each: damaged")
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise UserError(f"{where}: no token for byte {missing[0]}: damaged")
    return ranks


def read_ranks(path: Path | str) -> dict[bytes, int]:
    """Returns the ranks of a rank file."""
    with reading(path, "is damaged"):
        return parse_ranks(read_bytes(path, limit=1 << 28), path)


# --- nanoGPT's meta.pkl ---------------------------------------------------------------------------
# A pickle is a program. Before it runs, each of its instructions is checked, and only those that
# make dicts, lists, strings and plain numbers pass. Globals, calls, persistent ids and memo slots
# that could cost much memory do not. The unpickler refuses globals, too.

_META_BYTES = 16 << 20  # a vocabulary of all Unicode characters takes 11 MB
_PLAIN = frozenset(
    ("PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS")
    + ("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "SHORT_BINUNICODE", "BINUNICODE")
    + ("BINUNICODE8", "UNICODE", "BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1")
    + ("BINFLOAT", "FLOAT", "NONE", "NEWTRUE", "NEWFALSE", "MEMOIZE", "BINPUT", "LONG_BINPUT")
    + ("PUT", "BINGET", "LONG_BINGET", "GET")
)


class _NoGlobals(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"global {module}.{name}")


def read_meta_pkl(path: Path) -> tuple[int, Tokenizer | None]:
    """Returns (vocab_size, tokenizer or None). Raises UserError unless the pickle is plain."""
    with reading(path, "cannot be read"):
        data = read_bytes(path, limit=_META_BYTES)
    try:
        for n, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if opcode.name not in _PLAIN:
                what = f" {argument!r}"[:60] if argument is not None else ""
                raise pickle.UnpicklingError(f"it asks for {opcode.name}{what}")
            if opcode.name in ("BINPUT", "LONG_BINPUT", "PUT") and int(argument or 0) > n:
                raise pickle.UnpicklingError(f"it asks for memo slot {argument}")
        meta = _NoGlobals(io.BytesIO(data)).load()
        vocab_size, itos = meta["vocab_size"], meta.get("itos")
        if type(vocab_size) is not int or not 1 <= vocab_size <= 1 << 16:
            raise ValueError("its vocab_size is not in 1 .. 65536")
    except Exception as e:  # a damaged pickle raises nearly anything
        raise UserError(
            f"{path} is refused, nothing in it was run: {repr(e)[:200]}; only a plain vocab_size "
            "and its characters are read. Remove it (GPT-2's vocabulary is assumed then) or "
            "prepare again"
        ) from None
    if isinstance(itos, dict) and list(itos) == list(range(vocab_size)):
        chars = list(itos.values())
        if all(isinstance(c, str) and len(c) == 1 for c in chars) and len(set(chars)) == vocab_size:
            return vocab_size, CharTokenizer(chars)
    return vocab_size, None
