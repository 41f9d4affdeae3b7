"""Shards of protected images on their way to disk: written elsewhere first, then put in place by renaming.

The bytes depend on the records alone: no times, users or random names are in them.
"""

import contextlib
import hashlib
import io
import os
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..image_tasks import stays_inside
from .records import IMAGE_TYPE, Record, Source
from .tars import folder_of

KINDS = ("parquet", "folder", "tars")
Place = tuple[str, int | str | None]  # a file of the output, and the row or the member in it
ROW_GROUP = 100
ROW_GROUP_BYTES = 64 << 20
LONGEST_NAME = 255  # bytes, on most file systems


class ShardWriter:
    """Writes the shard number `index` of `source` below `partial`, a folder that is this writer's alone.

    Args:
        source: whose records come.
        index: of the shard.
        partial: on the file system of the output.
        mark: whether records that failed leave a mark, where there is a place for one.
    """

    def __init__(self, source: Source, index: int, partial: Path, mark: bool):
        self.source, self.index, self.partial, self.mark = source, index, partial, mark
        self.names: list[str] = []  # of the finished files, relative to `partial` and to the output
        self._taken: set[str] = set()

    def add(self, record: Record, png: bytes) -> Place:
        """Add a protected image; returns where it is in the output. ValueError if this record cannot be written."""
        raise NotImplementedError

    def add_failed(self, record: Record, error: str) -> bool:
        """Leave the mark of a record without an image; returns whether what belongs to the image is in the output."""
        return False

    def close(self) -> None:
        """Finish the files."""

    def _open(self, name: str) -> Path:
        _check_name(name)
        path = self.partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self.names.append(name)
        return path

    def _once(self, name: str) -> None:
        _check_name(name)
        if name in self._taken:
            raise ValueError(f"{name} is there a second time; rename one")
        self._taken.add(name)


class ParquetShard(ShardWriter):
    """`data/train-00000-of-00002.parquet`: the source's columns, the image as PNG, `protection_error` if marked."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        schema = self.source.schema()
        if self.mark:
            schema = _with_error_column(schema)
        path = self._open(f"data/train-{self.index:05d}-of-{len(self.source.shards):05d}.parquet")
        self._writer = pq.ParquetWriter(path, schema, use_dictionary=False)
        self._rows: list[pa.Table] = []
        self._bytes = self._count = 0

    def add(self, record: Record, png: bytes) -> Place:
        self._add(record, {"bytes": png, "path": None}, "")
        return self.names[0], self._count - 1

    def add_failed(self, record: Record, error: str) -> bool:
        return self.mark and self._add(record, None, error)

    def _add(self, record: Record, image: dict | None, error: str) -> bool:
        try:
            row = self.source.row(record)
        except ValueError:
            if not error:
                raise
            row = pa.table({})
        columns: dict[str, Any] = {name: row[name] for name in row.column_names}
        columns[self.source.image_column] = pa.array([image], IMAGE_TYPE)
        if self.mark:
            # Names of files need not be UTF-8.
            columns["protection_error"] = pa.array([error.encode(errors="backslashreplace").decode()])
        columns = [columns.get(f.name, pa.nulls(1, f.type)) for f in self._writer.schema]
        self._rows.append(pa.table(columns, schema=self._writer.schema))
        self._bytes += self._rows[-1].nbytes
        self._count += 1
        if len(self._rows) == ROW_GROUP or self._bytes >= ROW_GROUP_BYTES:
            self._flush()
        return bool(row.column_names)

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.concat_tables(self._rows), row_group_size=ROW_GROUP)
            self._rows, self._bytes = [], 0

    def close(self) -> None:
        self._flush()
        self._writer.close()


class TarShard(ShardWriter):
    """A tar of samples: the image as PNG, and beside it what lay beside it; records that failed are not in it."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        is_tar = self.source.description["kind"] == "tars"
        stem = folder_of(self.source.shards[self.index].name) if is_tar else f"{self.index:05d}"
        self._prefix = f"{stem}/" if is_tar else ""
        path = self._open(f"data/{stem}.tar")
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115

    def add(self, record: Record, png: bytes) -> Place:
        folder, _, name = record.name.removeprefix(self._prefix).rpartition("/")
        # The first dot of a file name ends the name of the sample.
        key = f"{folder}/{name.replace('.', '%2E')}".lstrip("/")
        self._once(key)
        files = self.source.files(record)
        image = f"{key}.{image_suffix(files)}"
        for suffix in files:
            _check_name(f"{key}.{suffix}")
        self._member(image, png)
        for suffix, data in files.items():
            self._member(f"{key}.{suffix}", data)
        return self.names[0], image

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)  # whose time and owner are 0
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        self._tar.close()
        if not self._taken:  # `load_dataset` fails where its first tar is empty
            (self.partial / self.names.pop()).unlink()


class FolderShard(ShardWriter):
    """Images below `data/`, and below `beside/` what lay beside them; nothing of a record that failed.

    Whoever loads all images below `data/` gets protected ones only.
    """

    def add(self, record: Record, png: bytes) -> Place:
        self._once(record.name)
        image = f"data/{record.name}.png"
        beside = {f"beside/{record.name}.{suffix}": data for suffix, data in self.source.files(record).items()}
        files = {image: png} | beside
        for name in files:
            _check_name(name)
        # All names before any file: of a record that cannot be written nothing is.
        for part in {part for name in files for part in PurePosixPath(name).parts}:
            if len(os.fsencode(part)) > LONGEST_NAME:
                raise ValueError(f"{part} is longer than the {LONGEST_NAME} bytes of a file's name; shorten it")
        for name, data in files.items():
            try:
                self._open(name).write_bytes(data)
            except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
                raise ValueError(f"{name}: a folder of another image has its name, or a file; rename one") from error
        return image, None


WRITERS = {"parquet": ParquetShard, "folder": FolderShard, "tars": TarShard}


def _check_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        # Such a file stands in the way of all others: who loads the output reads its names as UTF-8.
        raise ValueError(f"{name!a} is no name in UTF-8; rename it") from None
    if not stays_inside(name):
        raise ValueError(f"{name} leads out of the output; rename it")


def image_suffix(files: Any) -> str:
    """`png`, unless something else beside the image has that suffix."""
    return "image.png" if "png" in files else "png"


def put_shard_in_place(partial: Path, output: Path, names: list[str]) -> dict[str, str]:
    """Rename finished files from `partial` into the output; returns their sha256, in hex, by name."""
    digests = {}
    for name in names:
        with open(partial / name, "rb+") as file:
            os.fsync(file.fileno())
            digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        (output / name).parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        os.replace(partial / name, output / name)
    return digests


def published_images(output: Path, places: Iterable[Place], image_column: str) -> Iterator[bytes]:
    """The images at places of one shard, in the order in which they were written.

    Raises:
        OSError, ValueError, KeyError, pyarrow.ArrowException, tarfile.TarError: a file is not there, or damaged.
    """
    rows: Iterator[tuple[int, bytes]] | None = None
    with contextlib.ExitStack() as opened:
        tar: tarfile.TarFile | None = None
        for name, at in places:
            if at is None:
                yield (output / name).read_bytes()
            elif isinstance(at, int):
                rows = rows or _rows(output / name, image_column)
                yield next((data for number, data in rows if number == at), b"")
            else:
                tar = tar or opened.enter_context(tarfile.open(output / name))
                yield tar.extractfile(at).read()


def _rows(path: Path, column: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(16, columns=[column]):
            for image in batch[column].to_pylist():
                yield number, (image and image["bytes"]) or b""
                number += 1


def _with_error_column(schema: pa.Schema) -> pa.Schema:
    from datasets import Features, Value

    if "protection_error" in schema.names:
        raise ValueError("the source has a column protection_error already: rename it, or choose --on_error drop")
    features = Features.from_arrow_schema(schema) | {"protection_error": Value("string")}
    fields = [*schema, pa.field("protection_error", pa.string())]
    return pa.schema(fields, Features(features).arrow_schema.metadata)
