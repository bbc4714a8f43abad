"""Corpora: the named ones and where their text comes from, and text files of the user's own.

Only `fastgpt prepare` may use the network; `python_stdlib` and `--input` need none. Text files are
looked through once (what is there, is it text) and then read in order; the second pass makes sure
that it saw what the first saw. Line ends and blanks stay as they are: decoding gives the files
back.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import json
import os
import sys
import sysconfig
import tokenize
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Protocol

from fastgpt.data import download
from fastgpt.data.progress import progress
from fastgpt.errors import UserError, open_regular, reading

BY_INPUT = "your own text works without network: --input=FILE"
_CHUNK = 1 << 20

Part = tuple[str, str | None]


class Source(Protocol):
    """Text to tokenize. Equal `identity` (JSON): equal documents. `n_chars` may be an estimate."""

    identity: dict[str, Any]
    n_chars: int

    def documents(self) -> Iterator[Part]:
        """Yields (split, text) in a fixed order, and (split, None) for an end-of-text token."""
        ...


# --- text files -----------------------------------------------------------------------------------


class NotText(ValueError):
    """Error for a file that is no text; the message is the reason."""


class TextFiles:
    """A text file, or the text files in a folder and below, in the order of their names.

    A file named alone must be text; it is one document, whose last `val_fraction` of characters
    are the val split and which no end-of-text token follows, all as nanoGPT does it. In a folder,
    links, hidden entries and files that are no text are skipped (`skipped` says why). There, a hash
    of its path puts a document as a whole into one split; if that comes out far from `val_fraction`
    (few or very uneven files), the split is by characters over all documents.

    `sha256` of a file is that of its bytes; of a folder, that of its `sha256  path` lines.
    """

    def __init__(
        self, root: Path, val_fraction: float, suffix: str = "", skip: frozenset[str] = frozenset()
    ):
        self.root, self.val_fraction, self.single = root, val_fraction, not root.is_dir()
        self._suffix, self._skip = suffix, skip
        self.skipped: dict[str, str] = {}
        total, seen = hashlib.sha256(), Counter[str]()
        expected = root.stat().st_size if self.single else None
        with progress(f"looking through {root.name}", expected) as advance:
            for _ in self._texts(total, seen, advance):
                pass
        if not seen["bytes"]:
            what = "an empty file" if self.single else "a folder without any text file"
            raise UserError(f"{root} is {what}")
        share = seen["val_bytes"] / seen["bytes"]
        even = val_fraction / 2 <= share <= min(2 * val_fraction, 1 - (1 - val_fraction) / 2)
        self.by_document = even and not self.single
        self.n_chars, self.sha256 = seen["chars"], total.hexdigest()
        self.identity: dict[str, Any] = {
            "sha256": self.sha256,
            "bytes": seen["bytes"],
            "files": seen["files"],
            "split": "whole files by hash of their path" if self.by_document else "last characters",
            "val_fraction": val_fraction,
        }

    def documents(self) -> Iterator[Part]:
        total = hashlib.sha256()
        split, left = "train", int(self.n_chars * (1 - self.val_fraction))
        for name, text in self._texts(total, Counter(), lambda n: None):
            if self.by_document:
                split = "val" if self._in_val(name) else "train"
            elif text and split == "train":
                head, text = text[:left], text[left:]
                left -= len(head)
                if head:
                    yield split, head
                if not text:
                    continue
                split = "val"
            if text or not self.single:
                yield split, text
        if total.hexdigest() != self.sha256:
            raise UserError(f"{self.root} changed while it was read: run the command again")

    def _texts(self, total: Any, seen: Counter[str], advance: Callable) -> Iterator[Part]:
        """Yields (name, text) in parts, (name, None) after a file; adds to the sum and counts."""
        single = [(self.root, self.root.name)]
        for path, name in single if self.single else walk(self.root, self._suffix, self._skip):
            if name in self.skipped:
                continue
            own, size, chars = total if self.single else hashlib.sha256(), 0, 0
            try:
                for text in text_of_file(path):
                    own.update(data := text.encode())
                    size, chars = size + len(data), chars + len(text)
                    advance(len(data))
                    yield name, text
            except NotText as e:
                if self.single:
                    fix = "convert it, for instance with iconv -t UTF-8"
                    raise UserError(f"{path} is no UTF-8 text ({e}): {fix}") from None
                self.skipped[name] = str(e)
                continue
            if size:
                if not self.single:
                    total.update(f"{own.hexdigest()}  {name}\n".encode())
                val = size * self._in_val(name)
                seen.update(files=1, bytes=size, chars=chars, val_bytes=val)
                yield name, None

    def _in_val(self, name: str) -> bool:
        word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return word < self.val_fraction * 2**64


def walk(
    folder: Path, suffix: str = "", skip: frozenset[str] = frozenset(), prefix: str = ""
) -> Iterator[tuple[Path, str]]:
    """Yields (path, name below the first folder) of the files ending in `suffix`, by name.

    Left out are links, special files, and what is hidden, in `skip`, or has no Unicode name.
    """
    with reading(folder, "cannot be read"):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        name = prefix + entry.name
        encodable = name.encode(errors="ignore").decode() == name
        if entry.name in skip or entry.name.startswith(".") or not encodable:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path), suffix, skip, name + "/")
        elif entry.is_file(follow_symlinks=False) and name.endswith(suffix):
            yield Path(entry.path), name


def text_of_file(path: Path) -> Iterator[str]:
    """Yields the text of a file in parts: UTF-8, or what a mark or a Python file declares.

    Raises NotText for other encodings, and for NUL characters, which no text holds.
    """
    at, chunk = 0, b""
    try:
        with open_regular(path) as f:
            encoding = _declared_encoding(f, path)
            "".encode(encoding)  # LookupError: an encoding, but not of text
            decoder = codecs.getincrementaldecoder(encoding)()
            while True:
                at, chunk = at + len(chunk), f.read(_CHUNK)
                text = decoder.decode(chunk, final=not chunk)
                if encoding not in ("utf-8", "utf-16"):
                    text.encode()  # UnicodeError: half a character
                if "\0" in text:
                    raise NotText("it holds a NUL character")
                yield text
                if not chunk:
                    return
    except UnicodeDecodeError as e:
        begin = at + len(chunk) - len(e.object)  # the decoder may have kept bytes of the last chunk
        raise NotText(f"{e.reason} at offset {begin + e.start:,}") from None
    except (UnicodeError, LookupError) as e:
        raise NotText(str(e)) from None
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


def _declared_encoding(f: BufferedReader, path: Path) -> str:
    """Returns UTF-16 if the file has its byte order mark, what PEP 263 says of Python, or UTF-8."""
    if f.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    encoding = "utf-8"
    if path.suffix == ".py":
        with contextlib.suppress(SyntaxError):
            encoding, _ = tokenize.detect_encoding(functools.partial(f.readline, 4096))
        f.seek(0)
    return "utf-8" if encoding == "utf-8-sig" else encoding  # the mark is a part of the text


# --- named corpora --------------------------------------------------------------------------------

# Not language but tables, and tests, which are as much text again as the library itself.
_STDLIB_SKIP = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings")
    + ("pydoc_data", "ensurepip", "_bundled")
)

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

FINEWEB_REPO = "kjj0/fineweb10B-gpt2"


# A ready-made token file on the network.
Shard = namedtuple("Shard", "split file url bytes sha256")


@dataclass(frozen=True)
class Corpus:
    """A corpus and its defaults: `text(cache, val_fraction)` opens it, maybe after a download.

    A corpus without `text` is downloaded as tokens: `shards(n)` lists its files.
    """

    name: str
    tokenizer: str
    val_fraction: float
    network: bool = True
    text: Callable[[Path, float], Source] | None = None
    shards: Callable[[int], list[Shard]] | None = None
    sha256: str = ""  # of its text, if that is one file


def python_stdlib(cache: Path, val_fraction: float) -> Source:
    """Opens the Python sources of this machine's standard library, without tests and tables."""
    source = TextFiles(Path(sysconfig.get_path("stdlib")), val_fraction, ".py", _STDLIB_SKIP)
    source.identity["python"] = ".".join(map(str, sys.version_info[:3]))
    return source


def shakespeare(cache: Path, val_fraction: float) -> Source:
    """Opens tiny shakespeare, 1.1 MB of plays."""
    path = download.fetch(
        SHAKESPEARE_URL, cache / "tinyshakespeare.txt", sha256=SHAKESPEARE_SHA256, hint=BY_INPUT
    )
    return TextFiles(path, val_fraction)


class OpenWebText:
    """OpenWebText by the `datasets` library, split as nanoGPT does (9 billion tokens)."""

    def __init__(self, cache: Path, val_fraction: float):
        try:
            import datasets

            whole = datasets.load_dataset("Skylion007/openwebtext", split="train")
        except ImportError:
            need = "openwebtext needs the extra [hf]: pip install 'datasets>=2.20'"
            raise UserError(f"{need}; {BY_INPUT}") from None
        except (OSError, ValueError, RuntimeError) as e:
            line = " ".join(str(e).split())[:200]
            raise UserError(f"cannot download openwebtext ({line}); {BY_INPUT}") from e
        parts = whole.train_test_split(test_size=val_fraction, seed=2357, shuffle=True)
        self._splits, self.n_chars = {"train": parts["train"], "val": parts["test"]}, 39_000_000_000
        rows = {name: len(part) for name, part in self._splits.items()}
        self.identity: dict[str, Any] = dict(rows=rows, val_fraction=val_fraction, seed=2357)

    def documents(self) -> Iterator[Part]:
        for name, part in self._splits.items():
            for rows in part.iter(batch_size=1000):
                for text in filter(None, rows["text"]):
                    yield from ((name, text), (name, None))


def fineweb_shards(n: int) -> list[Shard]:
    """Lists the val shard and `n` train shards of FineWeb 10B, 100M GPT-2 tokens each."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    index_url = f"{hub}/api/datasets/{FINEWEB_REPO}/tree/main"
    names = {"fineweb_val_000000.bin": "val"}
    names |= {f"fineweb_train_{i:06d}.bin": "train" for i in range(1, n + 1)}
    listed = download.get(index_url, BY_INPUT)
    with reading(index_url, "is not the expected list of files"):
        index = {entry["path"]: entry.get("lfs") for entry in json.loads(listed)}
        base = f"{hub}/datasets/{FINEWEB_REPO}/resolve/main"
        return [
            Shard(split, file, f"{base}/{file}", int(index[file]["size"]), str(index[file]["oid"]))
            for file, split in names.items()
        ]


_NAMED = (
    Corpus("python_stdlib", "byte", 0.05, network=False, text=python_stdlib),
    # Both as nanoGPT prepares them.
    Corpus("shakespeare_char", "char", 0.1, text=shakespeare, sha256=SHAKESPEARE_SHA256),
    Corpus("shakespeare", "gpt2", 0.1, text=shakespeare, sha256=SHAKESPEARE_SHA256),
    Corpus("openwebtext", "gpt2", 0.0005, text=OpenWebText),  # 54 GB of download
    Corpus("fineweb10B", "gpt2", 0.0, shards=fineweb_shards),
)
CORPORA = {corpus.name: corpus for corpus in _NAMED}
INPUT = Corpus("input", "byte", 0.1, network=False)  # the text that --input names
