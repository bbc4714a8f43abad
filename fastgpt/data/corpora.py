"""The corpora by name: where the text of each comes from, and its defaults.

Only `fastgpt prepare` may use the network; `python_stdlib` and `--input` need none.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastgpt.data import download
from fastgpt.data.sources import Part, Source, TextFiles, decode_python
from fastgpt.errors import UserError

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
