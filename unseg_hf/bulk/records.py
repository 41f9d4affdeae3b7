"""What a data set is made of on its way through a run: shards of records, whatever kind of files they come from."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from ..image_files import READ_SUFFIXES, one_line
from ..mapping import stored_image, without_folders


class ShardPlan(NamedTuple):
    """A part of a source that becomes one part of the output: its name there, and its number of records if known."""

    name: str
    records: int | None


@dataclass(eq=False)
class Record:
    """One image, not decoded.

    Args:
        key: names it in its source, and nothing else there.
        name: of its files in a folder or tar, without a suffix; `/` separates folders.
        image: the bytes of its file; None with an `error`.
        mask: as [`unseg_hf.ProtectImages`] takes one.
        error: one line on why it cannot be read.
        rest: what else belongs to it, in whatever form its source holds it.
        classes: of its masks or boxes, as [`unseg_hf.ProtectImages`] takes them.
    """

    key: str
    name: str
    image: bytes | None
    mask: Any = None
    error: str = ""
    rest: Any = field(default=None, repr=False)
    classes: Any = None


class Source(Protocol):
    """Where records come from; shards are known before anything is decoded, and the same in every process.

    Attributes:
        description: of what decides shards and records, for the settings that lie beside the output.
        listing: sha256 over what the source holds, as far as it is known without reading it all.
        shards: the parts.
        image_column: of the rows that `row` makes.
    """

    description: dict[str, Any]
    listing: str
    shards: Sequence[ShardPlan]
    image_column: str

    def read(self, shard: int) -> Iterator[Record]:
        """The records of a shard, in stored order.

        Raises:
            SourceError: the shard is damaged; what came before was whole.
        """

    def schema(self) -> pa.Schema:
        """Of parquet files made of this source; the image column holds `{"bytes", "path"}`."""

    def row(self, record: Record) -> pa.Table:
        """One row with the columns of the schema, the image column aside."""

    def files(self, record: Record) -> Mapping[str, bytes]:
        """What lies beside the image in a folder or tar: contents by suffix (`"json"`, `"mask.png"`)."""

    def other_images(self, record: Record) -> Mapping[str, int]:
        """How many images, masks aside, `row` and `files` hand on as they are, by column or suffix of the source."""


class SourceError(ValueError):
    """A file of a source that holds many records is damaged; names it and what is wrong."""


def listing_digest(entries: Sequence[tuple]) -> str:
    """sha256, in hex, of a list of names and sizes."""
    return hashlib.sha256(repr([tuple(entry) for entry in entries]).encode()).hexdigest()


def image_bytes(value: Any) -> tuple[bytes | None, str]:
    """The bytes of an image in a column, or None and one line on why there are none."""
    try:
        source = stored_image(value, "the image")
        if isinstance(source, bytes):
            return source, ""
        if isinstance(source, str):
            with open(source, "rb") as file:
                return file.read(), ""
        return None, f"the image is {type(source).__name__}, not an encoded image"
    except MemoryError:
        raise
    except Exception as error:  # of any of the file systems that a path may lead to
        return None, without_folders(one_line(error), value)


# Their suffixes, and how their files begin.
_IMAGE_KINDS = (
    ("png", rb"\x89PNG"),
    ("jpg", rb"\xff\xd8\xff"),
    ("gif", rb"GIF8"),
    ("tiff", rb"II[*+]\0|MM\0[*+]"),
    ("webp", rb"RIFF.{4}WEBP"),
    ("bmp", rb"BM.{4}\0{4}"),
    ("avif", rb".{4}ftypavi[fs]"),
    ("heic", rb".{4}ftyp(he[ivs][cxms]|mif1|msf1)"),
    ("jp2", rb"\0{3}\x0cjP  |\xff\x4f\xff\x51"),
    ("jxl", rb"\0{3}\x0cJXL |\xff\x0a"),
    ("ppm", rb"P[56]\s+[#\d]"),
)


def image_kind(data: bytes) -> str | None:
    """The suffix that an encoded image ought to have, judged by how it begins; None for anything else."""
    return next((suffix for suffix, start in _IMAGE_KINDS if re.match(start, data, re.DOTALL)), None)


def count_images(value: Any) -> int:
    """Number of encoded images in a value of a column, or of references to their files; in lists and structs too."""
    if isinstance(value, bytes):
        return int(image_kind(value) is not None)
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"} and value["bytes"] is None:
            return int((value["path"] or "").lower().endswith(READ_SUFFIXES))
        return sum(map(count_images, value.values()))
    return sum(map(count_images, value)) if isinstance(value, list | tuple) else 0  # maps come as pairs


def refuse_dropped_images(image_column: str | None, dropped: Sequence[str]) -> None:
    if image_column in dropped:
        raise ValueError(f"--drop_columns {image_column}: these are the images that are protected; name others")


def short_names(files: Sequence[Path]) -> list[str]:
    """Names of files, with as many of their folders as it takes to tell them apart."""
    # Without `..` and without the root: these names become files of the output. Links to files keep their own names.
    places = [(file.parent.resolve() / file.name).parts[1:] for file in files]
    depth = 1
    while len({parts[-depth:] for parts in places}) < len(set(places)):
        depth += 1
    return ["/".join(parts[-depth:]) for parts in places]


IMAGE_TYPE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
