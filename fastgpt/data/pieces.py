"""Cutting a text into pieces whose tokens, one after the other, are the tokens of the whole.

GPT-2's pretokenizer is the pattern
    '(?:[sdmt]|ll|ve|re) | ?\\p{L}+ | ?\\p{N}+ | ?[^\\s\\p{L}\\p{N}]+ | \\s+(?!\\S) | \\s+
applied left to right; merges happen only inside its matches. Take a place between a character that
is not whitespace and one that is. No alternative matches across it: those that hold
non-whitespace have whitespace only as their first character, the others hold nothing else. So a
match ends there, whatever stands around. To the left, the only look-ahead, (?!\\S), is asked at the
end of a run of whitespace, and the left part ends in none. To the right, matching starts afresh:
the pattern never looks back. Hence tokens(text) = tokens(left) + tokens(right) at every such
place, which `tests/data/test_pieces.py` checks against whole texts.

Byte and character tokenizers may be cut anywhere between two characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

PIECE = 1 << 20
# A text of which this many bytes in a row hold no such place (say, 32 MiB of one word) is cut
# between two characters, so that memory stays bounded. Only there may BPE tokens differ.
FORCED = 32 << 20

# Not ASCII whitespace (nor \x1c-\x1f, which only some call whitespace), then whitespace.
_CANDIDATE = re.compile(rb"[^\t-\r\x1c- ][\t-\r ]")
_WINDOW = 1 << 12


def last_cut(text: bytes) -> int:
    """The last offset > 0 of UTF-8 `text` at which it may be cut, or 0 when there is none."""
    high = len(text)
    while high > 1:
        low = max(0, high - _WINDOW)
        for match in reversed(list(_CANDIDATE.finditer(text, low, high))):
            at = match.end() - 1
            if not text[_char_boundary(text, at) : at].decode().isspace():
                return at
        high = low + 1 if low else 0  # one byte of overlap: a candidate is two bytes long
    return 0


def _char_boundary(text: bytes, i: int) -> int:
    """Where the last character of `text` begins whose first byte is before offset `i`."""
    i -= 1
    while i > 0 and text[i] & 0xC0 == 0x80:
        i -= 1
    return i


def cut(chunks: Iterable[bytes], size: int = PIECE, forced: int = FORCED) -> Iterator[bytes]:
    """Re-cut consecutive chunks of one UTF-8 document into pieces of about `size` bytes.

    Chunks may end anywhere, also inside a character. Holds at most `forced` + `size` bytes.
    """
    buffer = bytearray()
    wanted = size
    slices = (chunk[i : i + size] for chunk in chunks for i in range(0, len(chunk), size))
    for part in slices:
        buffer += part
        if len(buffer) < wanted:
            continue
        text = bytes(buffer)
        at = last_cut(text)
        if at == 0 and len(text) >= forced:
            at = _char_boundary(text, len(text))
        # Without a cut, look again only when the buffer has doubled: linear time on odd texts.
        wanted = max(size, size + len(text) - at if at else min(2 * len(text), forced))
        if at:
            yield text[:at]
            del buffer[:at]
    if buffer:
        yield bytes(buffer)
