"""Folders of images as a source: the files and masks that `unseg protect` would take."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..image_files import READ_SUFFIXES
from ..image_tasks import is_json, plan
from .records import Record, ShardPlan, listing_digest


class ImageFolder:
    """Image files, in the order of their paths; see [`unseg_hf.bulk.records.Source`].

    Args:
        inputs: folders that are searched, or files.
        shard_size: images in a shard.
        masks: a mask file for one image, or a folder of masks matched by name, as on the command line.
        output: below which nothing is taken for an input.

    Raises:
        ValueError: no images, or masks that do not fit.
        OSError: a folder cannot be read.
    """

    image_column = "image"

    def __init__(self, inputs: Sequence[Path], shard_size: int, masks: Path | None, output: Path):
        if is_json(masks):
            raise ValueError(f"--masks {masks}: this takes mask files; `unseg protect --masks` takes COCO's json")
        if output.suffix.lower() in READ_SUFFIXES and not output.is_dir():
            raise ValueError(f"--output {output}: name a folder")
        unreadable: list[str] = []
        self._tasks = plan(inputs, output, "png", masks, unreadable)
        if unreadable:
            raise OSError(unreadable[0])
        self._names = [task.target.relative_to(output).with_suffix("").as_posix() for task in self._tasks]
        folders = [path for path in inputs if path.is_dir()]
        self._keys = [_below(task.source, folders) for task in self._tasks]
        self._size = shard_size
        files = [(_size_and_time(task.source), task.mask and _size_and_time(task.mask)) for task in self._tasks]
        # Not in the listing: `unseg verify` takes a copy of the originals, whose times are its own.
        self.description = {
            "kind": "images",
            "shard_size": shard_size,
            "masks": masks is not None,
            "sizes_and_times": listing_digest(files),
        }
        self.listing = listing_digest([(key,) for key in self._keys])
        count = len(self._tasks)
        self.shards = [
            ShardPlan(f"{start // shard_size:05d}", min(shard_size, count - start))
            for start in range(0, count, shard_size)
        ]

    def read(self, shard: int) -> Iterator[Record]:
        start = shard * self._size
        for index in range(start, start + self.shards[shard].records):
            task = self._tasks[index]
            data, error = _read(task.source, "the image")
            mask, mask_error = (None, "") if task.mask is None else _read(task.mask, "the mask")
            yield Record(self._keys[index], self._names[index], data, mask, error or mask_error)

    def schema(self) -> pa.Schema:
        from datasets import Features, Image, Value

        return Features({"image": Image(), "file_name": Value("string")}).arrow_schema

    def row(self, record: Record) -> pa.Table:
        return pa.table({"file_name": [record.key]})

    def files(self, record: Record) -> Mapping[str, Any]:
        return {}

    def other_images(self, record: Record) -> Mapping[str, int]:
        return {}


def _read(path: Path, what: str) -> tuple[bytes | None, str]:
    """The bytes of a file, or why there are none; without its folders, which are nobody's business."""
    try:
        return path.read_bytes(), ""
    except OSError as error:
        return None, f"{what} {path.name} cannot be read ({error.strerror or error})"


def _size_and_time(path: Path) -> tuple[int, int] | None:
    """Size in bytes and time of the last change in ns; None for a file that is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _below(path: Path, folders: Sequence[Path]) -> str:
    """The path below the folder that it was found in, and its name where it was an input itself."""
    for folder in folders:
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return path.name
