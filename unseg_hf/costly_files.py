"""Image files that are small and would take gigabytes, or hours, to read: told by their structure, before they are."""

import re
import struct
from typing import NamedTuple

MOST_SCANS = 200  # of a JPEG: each is a pass over all pixels, and programs write about ten
MOST_DIRECTORIES = 8  # of tags that are looked at: four are read
SLACK = 1 << 16  # bytes that tags may hold more of than a file has
TYPE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_WHOLE_NUMBERS = {3: "H", 4: "L", 6: "b", 8: "h", 9: "l", 13: "L", 16: "Q"}  # of these types, as Pillow reads them
_DIRECTORIES = {34665, 34853, 40965}  # Exif, GPS, interoperability: those that are read here
EXIF_PREFIX = b"Exif\x00\x00"
_MARKER = re.compile(b"\xff[^\x00\xd0-\xd7\xff]")  # in a scan, what is none of its own
_BEGINNINGS = re.compile(b"(?:Exif\x00\x00)*")
MOST_BEGINNINGS = 8


class Tags(NamedTuple):
    """Of a TIFF file, or EXIF, which is one: bytes that all tags together say they hold, and whether there is a second
    page (of EXIF, the thumbnail)."""

    bytes: int
    more_pages: bool


def why_costly(data: bytes) -> str | None:
    """What makes a file, by its bytes, costlier than its size says; None for nothing of what is known here.

    Metadata of PNG and WebP is not looked at: `why_tags_are` says it of the EXIF that was found in them.
    """
    if data.startswith(b"\xff\xd8\xff"):
        pieces, scans = _exif_and_scans(data)
        if scans > MOST_SCANS:
            return f"it has {scans} scans, each a pass over all of its pixels"
        return why_tags_are(b"".join(pieces))
    tags = tags_of(data)
    if tags is not None and tags.more_pages:
        return "it has more than one page"
    return _more_than_there_is(tags, len(data))


def why_tags_are(body: bytes) -> str | None:
    """The same of EXIF: tags may all point to the same bytes, and are copied one by one."""
    beginnings = _BEGINNINGS.match(body).end()
    if beginnings > MOST_BEGINNINGS * len(EXIF_PREFIX):  # which are cut off one by one, with a copy of the rest
        return "its EXIF begins again and again"
    body = body[beginnings:]
    return _more_than_there_is(tags_of(body), len(body))


def _more_than_there_is(tags: Tags | None, size: int) -> str | None:
    if tags is None or tags.bytes <= 2 * size + SLACK:
        return None
    return f"its tags say that they hold {tags.bytes / 2**20:.0f} MB, in a file of {size / 2**20:.1f}"


def tags_of(body: bytes) -> Tags | None:
    """None where this is no TIFF file, or cut off in its first directory."""
    order = {b"II": "<", b"MM": ">"}.get(body[:2])
    if order is None or len(body) < 16:
        return None
    version = struct.unpack_from(order + "H", body, 2)[0]
    if version not in (42, 43):
        return None
    # BigTIFF has everything twice as wide.
    number, count, entry = ("L", "H", "HHL4s") if version == 42 else ("Q", "Q", "HHQ8s")
    inline = struct.calcsize(order + number)
    todo, seen, held, following = [struct.unpack_from(order + number, body, inline)[0]], set(), 0, 0
    while todo and len(seen) < MOST_DIRECTORIES:
        start = todo.pop()
        if start in seen or not 0 <= start <= len(body) - inline:
            continue
        seen.add(start)
        first = start + struct.calcsize(order + count)
        size = struct.calcsize(order + entry)
        entries = min(struct.unpack_from(order + count, body, start)[0], (len(body) - first) // size)
        end, inner = first + entries * size, {}
        for tag, kind, values, value in struct.iter_unpack(order + entry, body[first:end]):
            length = values * TYPE_SIZES.get(kind, 0)
            place = struct.unpack(order + number, value)[0]
            if length > inline and place + length <= len(body):
                held += length
            if tag in _DIRECTORIES and kind in _WHOLE_NUMBERS and values == 1:
                at = value if length <= inline else body[place : place + length]
                if len(at) >= length:  # of several the last, as Pillow takes it
                    inner[tag] = struct.unpack_from(order + _WHOLE_NUMBERS[kind], at)[0]
        todo += inner.values()
        if len(seen) == 1 and end + inline <= len(body):
            following = struct.unpack_from(order + number, body, end)[0]
            following = 0 if following == start else following  # which Pillow takes for the end, too
    return Tags(held, following != 0) if seen else None


def _exif_and_scans(data: bytes) -> tuple[list[bytes], int]:
    """The EXIF of a JPEG file, as Pillow finds and joins it, and the number of scans until the picture ends."""
    at, pieces, scans = 2, [], 0
    while at + 4 <= len(data):
        kind = data[at + 1]
        if data[at] != 0xFF or kind == 0xFF:
            at += 1
        elif kind == 0xD9 and scans:
            break
        elif kind < 0xC0 or 0xD0 <= kind <= 0xD9:  # without a length
            at += 2
        else:
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            if kind == 0xE1 and not scans and data.startswith(EXIF_PREFIX, at + 4):
                pieces.append(data[at + 4 + len(EXIF_PREFIX) : end])
            if kind == 0xDA:
                scans += 1
                following = _MARKER.search(data, end)
                end = len(data) if following is None else following.start()
            at = end
    return pieces, scans
