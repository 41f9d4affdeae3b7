"""WebDataset tars as a source: samples are neighbours that share a name up to the first dot of the file name."""

import contextlib
import functools
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa

from ..data.sa1b_tars import WholeTarInfo
from ..image_files import READ_SUFFIXES, ImageFileError, one_line, size_of
from .records import (
    IMAGE_TYPE,
    Record,
    ShardPlan,
    SourceError,
    count_images,
    listing_digest,
    refuse_dropped_images,
    short_names,
)

LARGEST_MEMBER = 2**30  # bytes: it is held in memory
_TEXT = ("json", "txt", "cls", "caption")


class TarFiles:
    """Local tars, each of them a shard; see [`unseg_hf.bulk.records.Source`].

    Args:
        files: the tars, compressed or not.
        image_suffix: of the members that are protected; None is the only image of each sample, its mask aside.
        mask_suffix: of the members that are masks; `json` reads SA-1B's annotations; None where there are none.
        dropped: suffixes of members that are not handed on.

    Raises:
        OSError: a tar is not there.
        ValueError: two tars differ in their suffix alone, or the images are dropped.
    """

    image_column = "image"

    def __init__(
        self, files: Sequence[Path], image_suffix: str | None, mask_suffix: str | None, dropped: Sequence[str] = ()
    ):
        refuse_dropped_images(image_suffix, dropped)
        self._files, self._image, self._mask, self._dropped = list(files), image_suffix, mask_suffix, set(dropped)
        labels = short_names(files)
        if twice := [name for name, count in Counter(map(folder_of, labels)).items() if count > 1]:
            raise ValueError(f"several tars are called {twice[0]}: their outputs would be one file; rename one")
        self.shards = [ShardPlan(label, None) for label in labels]
        self.listing = listing_digest([(label, f.stat().st_size) for label, f in zip(labels, files, strict=True)])
        self.description = {"kind": "tars", "image_suffix": image_suffix, "mask_column": mask_suffix}
        self.description |= {"drop_columns": sorted(self._dropped)}
        if mask_suffix == "json":
            from ..data.sa1b import run_length_coder

            run_length_coder()

    def read(self, shard: int) -> Iterator[Record]:
        label = self.shards[shard].name
        for key, members, error in _samples(self._files[shard]):
            image, mask = None, None
            suffix = self._image or self._only_image(members)
            if not error and (suffix is None or suffix not in members):
                wanted = self._image or "one image"
                error = f"the sample {key} has {', '.join(members)}: {wanted} was wanted; keep its files side by side"
            if not error:
                image = members.pop(suffix)
            try:
                mask = self._read_mask(key, members, image)
            except ImageFileError as problem:
                error = error or one_line(problem)
            except (
                OSError,
                ArithmeticError,
                ValueError,
                KeyError,
                TypeError,
                AttributeError,
                RecursionError,
            ) as problem:
                error = error or f"the masks in {key}.json cannot be read ({problem!r})"
            # Where it is not known which image is the one, none of them may pass as what lies beside it.
            rest = {} if image is None else {name: members[name] for name in members if name not in self._dropped}
            yield Record(f"{label}/{key}", f"{folder_of(label)}/{key}", image, mask, error, rest)

    def _only_image(self, members: Mapping[str, bytes]) -> str | None:
        found = [
            suffix
            for suffix in members
            if suffix not in (self._mask, *self._dropped) and f".{suffix.rpartition('.')[2].lower()}" in READ_SUFFIXES
        ]
        return found[0] if len(found) == 1 else None

    def _read_mask(self, key: str, members: Mapping[str, bytes], image: bytes | None) -> Any:
        if self._mask is None or self._mask not in members:
            return None
        if self._mask != "json":
            return members[self._mask]
        from ..data.sa1b import RleMasks

        found = [mask for mask in json.loads(members["json"])["annotations"] if mask["area"]]
        # Before they are decoded: a few bytes may say that they are a mask of any size.
        sizes = {tuple(mask["segmentation"]["size"]) for mask in found}
        size = size_of(image) if image else None
        if size and sizes - {size, size[::-1]}:  # turned by its EXIF
            raise ValueError(f"masks of (height, width) {sorted(sizes)} for an image of {size}")
        return list(RleMasks(f"{key}.json", [m["segmentation"] for m in found], [m["area"] for m in found]))

    def schema(self) -> pa.Schema:
        return self._schema

    @functools.cached_property
    def _schema(self) -> pa.Schema:
        from datasets import Features, Image, Value

        first = next(self._whole_samples(), None)
        features = {"__key__": Value("string"), "image": Image()}
        for suffix in first.rest if first else ():
            kind = suffix.rpartition(".")[2].lower()
            plain = Value("string" if kind in _TEXT else "binary")
            features[suffix] = Image() if f".{kind}" in READ_SUFFIXES else plain
        return Features(features).arrow_schema

    def _whole_samples(self) -> Iterator[Record]:
        """Records with image and mask of all tars, as far as these can be read: the same in every process."""
        for shard in range(len(self.shards)):
            with contextlib.suppress(SourceError):
                for record in self.read(shard):
                    if record.image is not None and (self._mask is None or record.mask is not None):
                        yield record

    def row(self, record: Record) -> pa.Table:
        if unknown := sorted(set(record.rest) - set(self._schema.names)):
            raise ValueError(
                f"{record.key} has a .{unknown[0]}, which the first whole sample has not: write tars, "
                "whose samples may differ"
            )
        values: dict[str, Any] = {"__key__": record.key}
        for suffix, data in record.rest.items():
            kind = self._schema.field(suffix).type
            values[suffix] = {"bytes": data, "path": None} if kind == IMAGE_TYPE else data
            if pa.types.is_string(kind):
                values[suffix] = data.decode()
        others = [field for field in self._schema if field.name != self.image_column]
        return pa.Table.from_pylist([values], pa.schema(others))

    def files(self, record: Record) -> Mapping[str, bytes]:
        return record.rest

    def other_images(self, record: Record) -> Mapping[str, int]:
        return {name: 1 for name, data in record.rest.items() if name != self._mask and count_images(data)}


def folder_of(label: str) -> str:
    """Name of a tar as a folder: without .tar, .tar.gz or the like."""
    return re.sub(r"\.(tar|tar\.gz|tgz)$", "", label, flags=re.IGNORECASE)


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes], str]]:
    """Key, members by suffix, and what is wrong with one of them, of each sample."""
    key, members, problem, last, held = "", {}, "", "its beginning", 0
    try:
        with tarfile.open(path, "r:*", tarinfo=WholeTarInfo) as tar:
            for info in tar:
                last = info.name
                tar.members = []  # else it grows with the tar
                name = PurePosixPath(info.name)
                is_link = info.issym() or info.islnk()
                if not (info.isfile() or is_link) or name.name.startswith("."):
                    continue
                stem, _, suffix = name.name.partition(".")
                own = (name.parent / stem).as_posix()
                if own != key and members:
                    yield key, members, problem
                    members, problem, held = {}, "", 0
                key = own
                # All of a sample's are in memory together.
                held += info.size
                large = info.issparse() or held > LARGEST_MEMBER
                if large:
                    problem = (
                        f"{info.name} is sparse, or above {LARGEST_MEMBER // 2**20} MB, alone or with what lies "
                        "beside it; leave it out of the tar"
                    )
                if suffix in members:
                    problem = f"{info.name} is there twice, side by side; rename one"
                if is_link:
                    problem = f"{info.name} is a link; write the tar with --dereference --hard-dereference"
                members[suffix] = b"" if is_link or large else tar.extractfile(info).read()
        if members:
            yield key, members, problem
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        # The last sample may lack its mask or its annotations: it is not given out.
        raise SourceError(f"{path.name}: it is damaged, or no tar, at {last} ({error})") from error
