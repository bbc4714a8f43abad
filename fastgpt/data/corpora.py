"""Corpora, named ones and the user's own text files, as sources of documents.

Only `fastgpt prepare` may use the network; `python_stdlib` and `--input` need none. Text files are
read twice, first to count and hash them, then in order to tokenize them. A file that changed in
between is an error. Line ends and blanks stay, so decoding gives the files back.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import hashlib
import io
import itertools
import os
import sys
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from fastgpt.data import download
from fastgpt.data.download import Remote
from fastgpt.data.progress import progress
from fastgpt.errors import UserError, open_regular, reading

BY_INPUT = "your own text works without network: --input=FILE"
_CHUNK = 1 << 20

Part = tuple[str, str | None]  # (split, text), or (split, None) for an end-of-text token


# --- text files -----------------------------------------------------------------------------------


def split_of(name: str, val_fraction: float) -> str:
    """Returns "train" or "val", into which a hash of the document's name puts it."""
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return "val" if word < val_fraction * 2**64 else "train"


class NotText(Exception):
    """Error for a file that is no text, with the reason as its message."""


class TextFiles:
    """A text file, or the text files in a folder and below, in the order of their names.

    A single file is one document without an end-of-text token. Its last `val_fraction` of
    characters is the val split, as in nanoGPT. In a folder, a hash of its path puts each document
    into one split. If that comes out far from `val_fraction` (few or very uneven files), the split
    is by characters over all documents. `skipped` names files that are no text, with the reason.

    sha256    the sum of a file's bytes, or of a folder's `sha256  path` lines
    identity  JSON with a sha256; equal sums mean equal documents
    n_chars   characters of all parts, which are read one by one
    sizes     bytes to download for each part
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
            first = [f"{name}: {why}" for name, why in self.skipped.items()][:1]
            raise UserError("; ".join([f"{root} is {what}", *first]))
        share = seen["val_bytes"] / seen["bytes"]
        even = val_fraction / 2 <= share <= min(2 * val_fraction, 1 - (1 - val_fraction) / 2)
        self.by_document = even and not self.single
        self.n_chars, self.sizes, self.sha256 = seen["chars"], [0], total.hexdigest()
        self.identity: dict[str, Any] = {
            "sha256": self.sha256,
            "bytes": seen["bytes"],
            "files": seen["files"],
            "split": "whole files by hash of their path" if self.by_document else "last characters",
            "val_fraction": val_fraction,
        }

    def documents(self, part: int | None = None) -> Iterator[Part]:
        total = hashlib.sha256()
        split, left = "train", int(self.n_chars * (1 - self.val_fraction))
        for name, text in self._texts(total, Counter(), lambda n: None):
            if self.by_document:
                split = split_of(name, self.val_fraction)
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
            raise UserError(f"{self.root} changed while it was read; run the command again")

    def _texts(self, total: Any, seen: Counter[str], advance: Callable) -> Iterator[Part]:
        """Yields (name, text) in parts and (name, None) after a file. Adds to sum and counts."""
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
                val = size * (split_of(name, self.val_fraction) == "val")
                seen.update(files=1, bytes=size, chars=chars, val_bytes=val)
                yield name, None


def walk(
    folder: Path, suffix: str = "", skip: frozenset[str] = frozenset(), prefix: str = ""
) -> Iterator[tuple[Path, str]]:
    """Yields (path, name below the first folder) of the files ending in `suffix`, by name.

    Links, special files, hidden names, names in `skip`, and names not in Unicode are left out.
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
    """Yields the text of a file in parts, in UTF-8 or the encoding that the file declares.

    Raises NotText for other encodings and for NUL characters, which no text holds.
    """
    with reading(path, "is no text"), open_regular(path) as f:
        try:
            decoded = io.TextIOWrapper(f, _declared_encoding(f, path), newline="")
            while text := decoded.read(_CHUNK):
                text.encode()  # UnicodeError: half a character, which some encodings allow
                if "\0" in text:
                    raise NotText("it holds a NUL character")
                yield text
        except UnicodeDecodeError as e:
            begin = f.tell() - len(e.object)
            raise NotText(f"{e.reason} at offset {begin + e.start:,}") from None
        except (UnicodeError, LookupError) as e:
            raise NotText(str(e)) from None


def _declared_encoding(f: BufferedReader, path: Path) -> str:
    """Returns UTF-16 after its byte order mark, a Python file's encoding by PEP 263, or UTF-8."""
    if f.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16"
    encoding = "utf-8"
    if path.suffix == ".py":
        with contextlib.suppress(SyntaxError):
            encoding, _ = tokenize.detect_encoding(functools.partial(f.readline, 4096))
        f.seek(0)
    return "utf-8" if encoding == "utf-8-sig" else encoding  # the mark is a part of the text


# --- named corpora --------------------------------------------------------------------------------

# Tables, which are no language, and tests, which are as long as the library itself.
_STDLIB_SKIP = frozenset(
    ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings")
    + ("pydoc_data", "ensurepip", "_bundled")
)

SHAKESPEARE_URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

FINEWEB_REPO = "datasets/kjj0/fineweb10B-gpt2"
OPENWEBTEXT_REPO = "datasets/Skylion007/openwebtext"


@dataclass(frozen=True)
class Corpus:
    """A corpus and its defaults.

    text    opens it, given a cache folder and val_fraction, maybe after a download
    shards  lists the files of a corpus that is downloaded as tokens, given their number
    """

    name: str
    tokenizer: str
    val_fraction: float
    network: bool = True
    text: Callable[[Path, float], Source] | None = None
    shards: Callable[[int], list[Remote]] | None = None


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
    """OpenWebText, 9 billion GPT-2 tokens, in parquet files of which one is on disk at a time.

    A hash of file and row puts each document into one split. `n_chars` is an estimate.
    """

    def __init__(self, cache: Path, val_fraction: float):
        try:
            import pyarrow.parquet
        except ImportError:
            need = "openwebtext needs pyarrow: pip install pyarrow (the extra [data])"
            raise UserError(f"{need}; {BY_INPUT}") from None
        self._open, self._val_fraction = pyarrow.parquet.ParquetFile, val_fraction
        self._folder = cache / "openwebtext"
        commit, files = download.hub_files(
            OPENWEBTEXT_REPO, BY_INPUT, "refs/convert/parquet", "plain_text/train"
        )
        self._shards = [files[name] for name in sorted(files) if name.endswith(".parquet")]
        if not self._shards:
            raise UserError(f"{OPENWEBTEXT_REPO} has no parquet files at {commit}; {BY_INPUT}")
        self.sizes = [shard.bytes for shard in self._shards]
        self.n_chars, self.skipped = int(1.65 * sum(self.sizes)), dict[str, str]()
        sums = "".join(f"{shard.sha256}  {shard.file}\n" for shard in self._shards)
        self.identity: dict[str, Any] = {
            "sha256": hashlib.sha256(sums.encode()).hexdigest(),
            "files": len(self._shards),
            "commit": commit,
            "split": "documents by hash of file and row",
            "val_fraction": val_fraction,
        }

    def documents(self, part: int | None = None) -> Iterator[Part]:
        """Yields a part and removes its file, or the first part and keeps it to be read again."""
        shard, rows = self._shards[part or 0], itertools.count()
        path = shard.fetch(self._folder, BY_INPUT)
        with reading(path, "is no parquet file of texts"), self._open(path) as file:
            for batch in file.iter_batches(batch_size=1000, columns=["text"]):
                for text, row in zip(batch.column(0).to_pylist(), rows, strict=False):
                    split = split_of(f"{shard.file}:{row}", self._val_fraction)
                    if text:
                        yield from ((split, text), (split, None))
        if part is not None:
            path.unlink()


Source = TextFiles | OpenWebText


def fineweb_shards(n: int) -> list[Remote]:
    """Lists the val shard and `n` train shards of FineWeb 10B, 100M GPT-2 tokens each."""
    commit, files = download.hub_files(FINEWEB_REPO, BY_INPUT)
    names = [f"fineweb_train_{i:06d}.bin" for i in range(1, n + 1)]
    with reading(f"{FINEWEB_REPO} at {commit}", "is not the expected list of files"):
        return [files[name] for name in ("fineweb_val_000000.bin", *names)]


_NAMED = (
    Corpus("python_stdlib", "byte", 0.05, network=False, text=python_stdlib),
    # These two are as in nanoGPT.
    Corpus("shakespeare_char", "char", 0.1, text=shakespeare),
    Corpus("shakespeare", "gpt2", 0.1, text=shakespeare),
    Corpus("openwebtext", "gpt2", 0.0005, text=OpenWebText),  # 24 GB of download
    Corpus("fineweb10B", "gpt2", 0.0, shards=fineweb_shards),
)
CORPORA = {corpus.name: corpus for corpus in _NAMED}
INPUT = Corpus("input", "byte", 0.1, network=False)  # the text that --input names
