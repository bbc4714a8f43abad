import os
import pickle
import struct

import pytest

from fastgpt.data.meta_pkl import MAX_BYTES, read_meta
from fastgpt.errors import UserError

CHARS = sorted(set("\n !?abcABCé世"))
META = {
    "vocab_size": len(CHARS),
    "itos": dict(enumerate(CHARS)),
    "stoi": {c: i for i, c in enumerate(CHARS)},
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nanogpts_meta_is_read(tmp_path, protocol):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(META, protocol))
    size, tok = read_meta(path)
    assert size == tok.vocab_size == len(CHARS) and tok.chars == CHARS
    assert tok.decode(tok.encode("Abc 世")) == "Abc 世"


def test_all_of_unicode_is_read(tmp_path):
    chars = [chr(i) for i in range(1 << 16) if not 0xD800 <= i < 0xE000]
    meta = {"vocab_size": len(chars), "itos": dict(enumerate(chars))}
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(meta))
    assert read_meta(path)[0] == len(chars)


@pytest.mark.parametrize(
    "extra",
    [
        {"itos": None},
        {"itos": {0: "a"}},
        {"itos": {i: "ab" for i in range(len(CHARS))}},
        {"itos": dict.fromkeys(range(len(CHARS)), "a")},
        {"itos": {i: i for i in range(len(CHARS))}},
    ],
)
def test_without_characters_there_is_a_size_only(tmp_path, extra):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps({**META, **extra, "more": [1.5, None, True, 2**70]}))
    assert read_meta(path) == (len(CHARS), None)


class Reduce:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def system(marker):
    return Reduce(os.system, (f"touch {marker}",))


def hostile(marker) -> dict[str, bytes]:
    class Persistent(pickle.Pickler):
        def persistent_id(self, obj):
            return "evil" if isinstance(obj, Reduce) else None

    import io

    buffer = io.BytesIO()
    Persistent(buffer).dump({**META, "x": system(marker)})
    dumps = pickle.dumps
    push = b"\x80\x04"
    return {
        "system": dumps(system(marker)),
        "system, protocol 0": dumps(system(marker), 0),
        "nested": dumps({**META, "itos": {0: [{"deep": system(marker)}]}}),
        "as a key": dumps({system(marker): 1}),
        "eval": dumps(Reduce(eval, (f"open({str(marker)!r}, 'w')",))),
        "class": dumps({**META, "x": Reduce}),
        "builtin": dumps({**META, "x": getattr}),
        "a tuple": dumps({**META, "x": (1, 2)}),
        "a set": dumps({**META, "x": {1}}),
        "bytes": dumps({**META, "x": b"12"}),
        "persistent": buffer.getvalue(),
        "persistent, protocol 0": b"Pevil\n.",
        "inst": b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'touch " + str(marker).encode() + b"'\no.",
        "extension": push + b"\x82\x01.",
        "huge memo": push + b"}r\xff\xff\xff\x7f.",
        "huge memo, protocol 0": b"}p2000000000\n.",
        "huge bytearray": push + b"\x96" + struct.pack("<Q", 1 << 40) + b"x.",
        "huge string": push + b"\x8d" + struct.pack("<Q", 1 << 40) + b"x.",
        "huge number": b"I" + b"9" * 100_000 + b"\n.",
        "huge long": push + b"\x8b" + struct.pack("<i", 1 << 30) + b"x.",
        "deep": b"]" * 1_000_000 + b"a" * 999_999 + b".",
        "truncated": dumps(META)[:50],
        "empty": b"",
        "no stop": push + b"}",
        "stack underflow": push + b"s.",
        "append to a dict": push + b"}K\x01a.",
        "unhashable key": push + b"}]K\x01s.",
        "memo not there": push + b"h\x05.",
        "bad utf-8": push + b"\x8c\x02\xff\xff.",
        "text": b"not a pickle at all",
        "zeros": bytes(100),
        "no dict": dumps([1, 2, 3]),
        "no size": dumps({"itos": {}}),
        "size 0": dumps({"vocab_size": 0}),
        "size negative": dumps({"vocab_size": -5}),
        "size of 2 bytes exceeded": dumps({"vocab_size": 65537}),
        "size a string": dumps({"vocab_size": "65"}),
        "size a bool": dumps({"vocab_size": True}),
    }


@pytest.mark.parametrize("kind", hostile("x"))
def test_anything_else_is_refused_and_nothing_runs(tmp_path, kind):
    marker, path = tmp_path / "ran", tmp_path / "meta.pkl"
    path.write_bytes(hostile(marker)[kind])
    with pytest.raises(UserError, match=r"meta\.pkl") as e:
        read_meta(path)
    assert not marker.exists() and "\n" not in str(e.value) and len(str(e.value)) < 400


def test_the_hostile_ones_do_run_elsewhere(tmp_path):
    """So the test above would notice."""
    marker = tmp_path / "ran"
    pickle.loads(hostile(marker)["system"])
    assert marker.exists()


def test_large_files_are_not_even_read(tmp_path):
    path = tmp_path / "meta.pkl"
    with open(path, "wb") as f:
        f.truncate(MAX_BYTES + 1)
    with pytest.raises(UserError, match="no vocabulary"):
        read_meta(path)
