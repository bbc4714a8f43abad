"""Where plans lie: one JSON file a key, whole or absent.

In $FASTGPT_PLANS if that is set, else in fastgpt/plans under the user's cache folder
($XDG_CACHE_HOME or ~/.cache). Everything works without such a folder and with one that cannot be
written: nothing is kept then. A file that is cut off, of another format or of another key counts as
absent. Writers take turns, so that what two processes find out is kept of both.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows: the last of two writers counts there
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
SHIPPED = Path(__file__).parent
# What a plan that came with the package need not share with the device at hand.
NOT_SHIPPED = ("driver",)

Key = Mapping[str, Any]
Entry = dict[str, Any]


def folder() -> Path | None:
    """Where plans of this user lie; None if there is neither a variable nor a home."""
    if given := os.environ.get("FASTGPT_PLANS"):
        return Path(given).expanduser()
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache, "fastgpt", "plans")
    try:
        return Path.home() / ".cache" / "fastgpt" / "plans"
    except RuntimeError:  # no home
        return None


def canonical(key: Key) -> str:
    """The same text for the same key."""
    return json.dumps(key, sort_keys=True)


class Store:
    """`load(key)` what was found out, `update(key, ...)` it.

    problem  why nothing can be kept; empty if it can, as far as is known
    """

    def __init__(self, place: Path | None = None, shipped: Path = SHIPPED):
        self.folder = place or folder()
        self.shipped = shipped
        self.problem = "" if self.folder else "there is no home folder; FASTGPT_PLANS names one"

    def path(self, key: Key) -> Path | None:
        name = hashlib.sha256(canonical(key).encode()).hexdigest()[:24]
        return self.folder / f"{name}.json" if self.folder else None

    def load(self, key: Key) -> Entry | None:
        """The user's own entry for a key, else the package's; None if there is neither."""
        path = self.path(key)
        own = _read(path, key) if path else None
        return own if own is not None else self._shipped(key)

    def _shipped(self, key: Key) -> Entry | None:
        """From `sm_90.json` and the like: {"format": 1, "plans": [{"key", "entry"}, ...]}."""
        path = self.shipped / f"{key.get('arch', '')}.json"
        try:
            document = json.loads(path.read_text())
            wanted = canonical(_general(key))
            for plan in document["plans"] if document["format"] == FORMAT else ():
                if canonical(_general(plan["key"])) == wanted:
                    return dict(plan["entry"])
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            pass
        return None

    def update(self, key: Key, change: Callable[[Entry | None], Entry]) -> Entry:
        """Replace a key's entry by what `change` makes of it, nobody else writing meanwhile.

        Returns the new entry, whether or not it could be kept.
        """
        path = self.path(key)
        if path is None:
            return change(self._shipped(key))
        with self._locked(path):
            entry = change(self.load(key))
            try:
                _write(path, {"format": FORMAT, "key": dict(key), "entry": entry})
            except OSError as e:
                self.problem = f"{self.folder}: {e.strerror or e}; FASTGPT_PLANS names another"
        return entry

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            if fcntl:
                with contextlib.suppress(OSError):  # no folder, no locks: then without
                    path.parent.mkdir(parents=True, exist_ok=True)
                    file = stack.enter_context(open(path.with_suffix(".lock"), "a"))
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextlib.contextmanager
    def measuring(self, device: str) -> Iterator[bool]:
        """Whether nobody else measures on the device meanwhile: two would slow each other down."""
        with contextlib.ExitStack() as stack:
            alone = True
            if fcntl and self.folder:
                with contextlib.suppress(OSError):
                    self.folder.mkdir(parents=True, exist_ok=True)
                    name = hashlib.sha256(device.encode()).hexdigest()[:12]
                    file = stack.enter_context(open(self.folder / f"{name}.measuring", "a"))
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        alone = False
            yield alone


def _general(key: Key) -> Key:
    return {name: value for name, value in key.items() if name not in NOT_SHIPPED}


def _read(path: Path, key: Key) -> Entry | None:
    try:
        document = json.loads(path.read_bytes())
        if document["format"] != FORMAT or canonical(document["key"]) != canonical(key):
            return None
        return dict(document["entry"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _write(path: Path, document: Any) -> None:
    """Whole or not at all: a file beside it takes its name. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(fd, "w") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
