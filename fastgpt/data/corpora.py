"""Text files as documents: looked through once (what is there, is it text), then read in order.

Both passes stream, and the second makes sure that it saw what the first saw. Text is taken byte for
byte: line ends and blanks stay as they are, so that decoding gives the files back.

The corpora by name: where the text of each comes from, and its defaults.

Only `fastgpt prepare` may use the network; `python_stdlib` and `--input` need none.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import stat
import sys
import sysconfig
import time
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastgpt.data import download
from fastgpt.data.progress import progress
from fastgpt.errors import UserError, open_regular, read_text
from fastgpt.storage.atomic import write_text

_CHUNK = 1 << 20
_SMALL = 16 << 20  # files up to this size are read in one go


Part = tuple[str, bytes | None]


class Source(Protocol):
    """Text to tokenize. Equal `identity` (JSON): equal documents. `n_bytes` None: unknown."""

    identity: dict[str, Any]
    n_bytes: int | None

    def documents(self) -> Iterator[Part]:
        """(split, chunk of UTF-8 bytes) of all documents, in a fixed order.

        (split, None) stands for the end-of-text token that follows a document.
        """
        ...


@dataclass(frozen=True)
class Look:
    """What the first pass over text files found."""

    sha256: str
    n_files: int
    n_bytes: int
    n_chars: int
    val_bytes: int


class NotText(ValueError):
    """A file is no UTF-8 text; the message gives the place."""


class TextFiles:
    """A text file, or the text files in a folder and below, in the order of their names.

    A file named alone must be text; it is one document, whose last `val_fraction` of characters
    are the val split and which no end-of-text token follows, all as nanoGPT does it. In a folder,
    links, hidden entries and files that are no UTF-8 text are skipped. There, a hash of its path
    puts a document as a whole into one split; if that comes out far from `val_fraction` (few or
    very uneven files), the split is by characters over all documents.

    `sha256` of a file is that of its bytes; of a folder, that of its `sha256  path` lines.
    """

    def __init__(
        self,
        root: Path,
        val_fraction: float,
        *,
        suffix: str = "",
        skip: frozenset[str] = frozenset(),
        recode: Callable[[bytes], bytes | None] = lambda data: None,
        look: Look | None = None,
    ):
        self.root, self.suffix, self.skip, self.recode = root, suffix, skip, recode
        self.val_fraction = val_fraction
        self.single = not root.is_dir()
        self.look = look or self._look()
        if self.look.n_bytes == 0:
            what = "an empty file" if self.single else "a folder without any text file"
            raise UserError(f"{root} is {what}")
        share = self.look.val_bytes / self.look.n_bytes
        even = val_fraction / 2 <= share <= min(2 * val_fraction, 1 - (1 - val_fraction) / 2)
        self.by_document = not self.single and even
        self.n_bytes: int | None = self.look.n_bytes
        self.identity: dict[str, Any] = {
            "sha256": self.look.sha256,
            "bytes": self.look.n_bytes,
            "files": self.look.n_files,
            "split": "whole files by hash of their path" if self.by_document else "last characters",
            "val_fraction": val_fraction,
        }

    def documents(self) -> Iterator[Part]:
        listing = hashlib.sha256()
        split, left = "train", int(self.look.n_chars * (1 - self.val_fraction))
        for name, chunks in self._texts(listing):
            if self.by_document:
                split = "val" if self._in_val(name) else "train"
            for chunk in chunks:
                if self.by_document or split == "val":
                    yield split, chunk
                    continue
                starts = np.flatnonzero(char_starts(chunk))
                at = int(starts[left]) if left < len(starts) else len(chunk)
                left -= len(starts)
                if at > 0:
                    yield "train", chunk[:at]
                if at < len(chunk):
                    split = "val"
                    yield "val", chunk[at:]
            if not self.single:
                yield split, None
        if listing.hexdigest() != self.look.sha256:
            raise UserError(f"{self.root} changed while it was read: run the command again")

    def _in_val(self, name: str) -> bool:
        word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return word < self.val_fraction * 2**64

    def _look(self) -> Look:
        listing = hashlib.sha256()
        n_files = n_bytes = n_chars = val_bytes = 0
        total = self.root.stat().st_size if self.single else None
        with progress(f"looking through {self.root.name}", total) as advance:
            for name, chunks in self._texts(listing):
                size = 0
                for chunk in chunks:
                    size += len(chunk)
                    n_chars += count_chars(chunk)
                    advance(len(chunk))
                n_files += 1
                n_bytes += size
                val_bytes += size * self._in_val(name)
        return Look(listing.hexdigest(), n_files, n_bytes, n_chars, val_bytes)

    def _texts(self, listing) -> Iterator[tuple[str, Iterator[bytes]]]:
        """(name, chunks) of every text; `listing` is fed the content on the way."""
        if self.single:
            try:
                check_text(_read(self.root))
            except NotText as e:
                fix = "convert it, for instance with iconv -t UTF-8"
                raise UserError(f"{self.root} is no UTF-8 text ({e}): {fix}") from None
            yield self.root.name, _hashed(_read(self.root), listing)
            return
        for path, name in walk(self.root, self.suffix, self.skip):
            if (chunks := self._open(path)) is not None:
                digest = hashlib.sha256()
                yield name, _hashed(chunks, digest)
                listing.update(f"{digest.hexdigest()}  {name}\n".encode())

    def _open(self, path: Path) -> Iterator[bytes] | None:
        """The UTF-8 chunks of a file, or None when it is no text (or empty)."""
        try:
            large = path.stat().st_size > _SMALL
            data = b"" if large else b"".join(_read(path))
            check_text(_read(path) if large else iter([data]))
        except NotText:
            recoded = None if large else self.recode(data)
            return None if recoded is None else iter([recoded])
        except FileNotFoundError:
            raise UserError(f"{path} vanished while it was read: run the command again") from None
        if large:
            return _read(path)
        return iter([data]) if data else None


def walk(
    folder: Path, suffix: str = "", skip: frozenset[str] = frozenset(), prefix: str = ""
) -> Iterator[tuple[Path, str]]:
    """(path, name below the first folder) of the files ending in `suffix`, by name.

    Left out are links, special files, and what is hidden, in `skip`, or has no Unicode name.
    """
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        modes = [entry.stat(follow_symlinks=False).st_mode for entry in entries]
    except OSError as e:
        raise UserError(f"cannot read {e.filename or folder}: {e.strerror}") from None
    for entry, mode in zip(entries, modes, strict=True):
        name = prefix + entry.name
        encodable = name.encode(errors="ignore").decode() == name
        if entry.name in skip or entry.name.startswith(".") or not encodable:
            continue
        if stat.S_ISDIR(mode):
            yield from walk(Path(entry.path), suffix, skip, name + "/")
        elif stat.S_ISREG(mode) and name.endswith(suffix):
            yield Path(entry.path), name


_REMEMBER = 64 << 20


def existing(root: Path) -> None:
    """Raise UserError unless --input names a file or a folder."""
    if not root.exists():
        raise UserError(f"--input={root}: there is no such file or folder")
    if not (root.is_file() or root.is_dir()):
        raise UserError(f"--input={root} is neither a file nor a folder")


def open_input(root: Path, val_fraction: float, memory: Path) -> TextFiles:
    """`TextFiles` of what --input names; what was found in many bytes is remembered in `memory`.

    So that training on 50 GB again need not look through them again. It holds while no file's
    size or time of change differs; making a dataset checks the contents anyway.
    """
    existing(root)
    signature, newest = _signature(root)
    key = f"{root.resolve()} {val_fraction}"
    try:
        known = json.loads(read_text(memory))
        if known[key]["signature"] == signature:
            return TextFiles(root, val_fraction, look=Look(**known[key]["look"]))
    except (OSError, UserError, ValueError, KeyError, TypeError, RecursionError):
        known = {}
    source = TextFiles(root, val_fraction)
    # A file that changed just now may change again within the clock's resolution.
    if source.look.n_bytes >= _REMEMBER and time.time() - newest > 2:
        entry = {"signature": signature, "look": dataclasses.asdict(source.look)}
        with contextlib.suppress(OSError, UserError):  # a read-only folder: look again next time
            write_text(memory, json.dumps({**known, key: entry}, indent=1) + "\n")
    return source


def _signature(root: Path) -> tuple[str, float]:
    """(hash of all names, sizes and times of change, the newest time in seconds)."""
    files = walk(root) if root.is_dir() else iter([(root, root.name)])
    digest, newest = hashlib.sha256(), 0
    for path, name in files:
        status = path.stat()
        newest = max(newest, status.st_mtime_ns)
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest(), newest / 1e9


def char_starts(data: bytes) -> np.ndarray:
    """(len(data),) bool: which bytes begin a character."""
    return (np.frombuffer(data, np.uint8) & 0xC0) != 0x80


def count_chars(data: bytes) -> int:
    """Number of characters that begin in `data`."""
    return int(np.count_nonzero(char_starts(data)))


def check_text(chunks: Iterator[bytes]) -> None:
    """NotText unless the chunks are UTF-8 without NUL bytes, which no text holds."""
    decoder, at = codecs.getincrementaldecoder("utf-8")(), 0
    for chunk in chunks:
        if (nul := chunk.find(0)) >= 0:
            raise NotText(f"a NUL byte at offset {at + nul:,}")
        try:
            decoder.decode(chunk)
        except UnicodeDecodeError as e:
            held = len(e.object) - len(chunk)  # bytes the decoder kept of the chunk before
            raise NotText(f"{e.reason} at offset {at - held + e.start:,}") from None
        at += len(chunk)
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise NotText("it ends within a character") from None


def decode_python(data: bytes) -> bytes | None:
    """UTF-8 of a Python file that declares another encoding (PEP 263), or None."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError):
        return None
    return None if "\0" in text else text.encode()


def _read(path: Path) -> Iterator[bytes]:
    try:
        with open_regular(path) as f:
            while chunk := f.read(_CHUNK):
                yield chunk
    except FileNotFoundError:
        raise
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None


def _hashed(chunks: Iterator[bytes], digest) -> Iterator[bytes]:
    for chunk in chunks:
        digest.update(chunk)
        yield chunk


BY_INPUT = "your own text works without network: --input=FILE"

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
FINEWEB_SHARDS = 103


@dataclass(frozen=True)
class Corpus:
    """`text(cache, val_fraction)` opens a corpus of text, maybe downloading it into `cache`.

    A corpus without it is downloaded as tokens: `shards(n)` lists its files.
    """

    name: str
    tokenizer: str
    val_fraction: float
    network: bool = True
    text: Callable[[Path, float], Source] | None = None
    shards: Callable[[int], list[Shard]] | None = None
    sha256: str = ""  # of its text, if that is one file


@dataclass(frozen=True)
class Shard:
    """A ready-made token file on the network."""

    split: str
    file: str
    url: str
    bytes: int
    sha256: str


def python_stdlib(cache: Path, val_fraction: float) -> Source:
    """The Python sources of this machine's standard library, without tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    try:
        source = TextFiles(
            root, val_fraction, suffix=".py", skip=_STDLIB_SKIP, recode=decode_python
        )
    except UserError:
        raise UserError(
            f"this Python has no readable library sources in {root}: give a text with --input=FILE"
        ) from None
    source.identity["python"] = ".".join(map(str, sys.version_info[:3]))
    return source


def shakespeare(cache: Path, val_fraction: float) -> Source:
    """Tiny shakespeare: 1.1 MB of plays."""
    path = download.fetch(
        SHAKESPEARE_URL, cache / "tinyshakespeare.txt", sha256=SHAKESPEARE_SHA256, hint=BY_INPUT
    )
    return TextFiles(path, val_fraction)


class OpenWebText:
    """8 million web pages by the `datasets` library, split as nanoGPT does (9 billion tokens)."""

    def __init__(self, cache: Path, val_fraction: float):
        try:
            import datasets
        except ImportError:
            raise UserError(
                "openwebtext needs the datasets library: pip install 'datasets>=2.20' (the extra "
                f"[hf]); {BY_INPUT}"
            ) from None
        try:
            whole = datasets.load_dataset("Skylion007/openwebtext", split="train")
        except (OSError, ValueError, RuntimeError) as e:
            line = " ".join(str(e).split())[:200]
            raise UserError(f"cannot download openwebtext ({line}); {BY_INPUT}") from e
        parts = whole.train_test_split(test_size=val_fraction, seed=2357, shuffle=True)
        self._splits = {"train": parts["train"], "val": parts["test"]}
        self.n_bytes: int | None = None
        rows = {name: len(part) for name, part in self._splits.items()}
        self.identity: dict[str, Any] = dict(rows=rows, val_fraction=val_fraction, seed=2357)

    def documents(self) -> Iterator[Part]:
        for name, part in self._splits.items():
            for rows in part.iter(batch_size=1000):
                for text in filter(None, rows["text"]):
                    yield name, text.encode()
                    yield name, None


def fineweb_shards(n: int) -> list[Shard]:
    """The val shard and the first `n` train shards of FineWeb 10B, 100M GPT-2 tokens each."""
    if not 1 <= n <= FINEWEB_SHARDS:
        raise UserError(f"--shards={n}: fineweb10B has 1 .. {FINEWEB_SHARDS} train shards")
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    index_url = f"{hub}/api/datasets/{FINEWEB_REPO}/tree/main"
    names = {"fineweb_val_000000.bin": "val"}
    names |= {f"fineweb_train_{i:06d}.bin": "train" for i in range(1, n + 1)}
    try:
        listed = json.loads(download.get(index_url, BY_INPUT))
        index = {entry["path"]: entry.get("lfs") for entry in listed}
        base = f"{hub}/datasets/{FINEWEB_REPO}/resolve/main"
        return [
            Shard(split, file, f"{base}/{file}", int(index[file]["size"]), index[file]["oid"])
            for file, split in names.items()
        ]
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{index_url} is not the expected list of files ({e!r})") from None


CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus("python_stdlib", "byte", 0.05, network=False, text=python_stdlib),
        # Both as nanoGPT prepares them.
        Corpus("shakespeare_char", "char", 0.1, text=shakespeare, sha256=SHAKESPEARE_SHA256),
        Corpus("shakespeare", "gpt2", 0.1, text=shakespeare, sha256=SHAKESPEARE_SHA256),
        Corpus("openwebtext", "gpt2", 0.0005, text=OpenWebText),  # 54 GB of download
        Corpus("fineweb10B", "gpt2", 0.0, shards=fineweb_shards),
    )
}
INPUT = Corpus("input", "byte", 0.1, network=False)  # the text that --input names
