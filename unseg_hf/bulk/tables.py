"""Rows of parquet files, of data sets on disk and of streamed ones as a source."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..image_files import one_line
from ..mapping import column_and_fields, field_of
from .records import (
    IMAGE_TYPE,
    Record,
    ShardPlan,
    count_images,
    image_bytes,
    image_kind,
    listing_digest,
    refuse_dropped_images,
    short_names,
)

ROWS = 16  # read at once: rows of images are large
_STEM = re.compile(r"\.parquet$", re.IGNORECASE)


class Table:
    """What sources of rows share; see [`unseg_hf.bulk.records.Source`].

    A sub-class sets `shards` and `listing`, adds to `description`, and yields small tables from `_batches`.

    Args:
        stored: schema of the rows, that of `datasets` in its metadata if there is one.
        image_column: its values hold encoded images.
        mask_column: of masks, or lists of them, or of lists of boxes; `objects.bbox` is a field of the column
            `objects`. None where there are none.
        class_column: of lists of the classes of these masks or boxes; None where there are none.
        dropped: columns that are not handed on.

    Raises:
        ValueError: no such column, or the images are dropped.
    """

    shards: list[ShardPlan]

    def __init__(
        self,
        stored: pa.Schema,
        image_column: str,
        mask_column: str | None,
        class_column: str | None = None,
        dropped: Sequence[str] = (),
    ):
        refuse_dropped_images(image_column, dropped)
        for option, column in [("image_column", image_column), *(("drop_columns", c) for c in dropped)]:
            if column not in stored.names:
                raise ValueError(f"no column {column!r}; there is {', '.join(stored.names)}: say which with {option}")
        self._stored, self.image_column = stored, image_column
        # Of masks or boxes, and of classes: the column, and the fields that lead to them.
        self._marks = [None if name is None else _place_of(name, stored) for name in (mask_column, class_column)]
        self._dropped = sorted(set(dropped))
        self._hold_files = [field.name for field in stored if _holds_bytes(field.type)]
        known = (image_column, *dropped, *(place[0] for place in self._marks if place and not place[1]))
        self._may_hold_images = [name for name in self._hold_files if name not in known]
        self.description = {"mask_column": mask_column, "drop_columns": self._dropped}
        self.description |= {"class_column": class_column} if class_column else {}

    def _batches(self, shard: int) -> Iterator[tuple[int, str, pa.Table]]:
        """Number of the first row and name of its file, for each table."""
        raise NotImplementedError

    def read(self, shard: int) -> Iterator[Record]:
        for first, label, table in self._batches(shard):
            yield from self._records(first, label, table)

    def _records(self, first: int, label: str, table: pa.Table) -> Iterator[Record]:
        images = table[self.image_column].to_pylist()
        masks, classes = (
            [field_of(value, place[1]) for value in table[place[0]].to_pylist()] if place else [None] * len(images)
            for place in self._marks
        )
        for index, (image, mask, numbers) in enumerate(zip(images, masks, classes, strict=True)):
            if isinstance(image, str | bytes):
                image = {"bytes": image} if isinstance(image, bytes) else {"path": image}
            data, error = image_bytes(image)
            yield _record(label, first + index, data, mask, error, table.slice(index, 1), classes=numbers)

    def schema(self) -> pa.Schema:
        from datasets import Features, Image

        kept = pa.schema([f for f in self._stored if f.name not in self._dropped], self._stored.metadata)
        try:
            features = Features.from_arrow_schema(kept)
        except ValueError as error:
            raise ValueError(f"{error}; leave its column out with --drop_columns") from error
        features[self.image_column] = Image()
        # A row that cannot be read has nothing but its mark.
        fields = [
            pa.field(name, IMAGE_TYPE) if name == self.image_column else kept.field(name).with_nullable(True)
            for name in features
        ]
        return pa.schema(fields, features.arrow_schema.metadata)

    def row(self, record: Record) -> pa.Table:
        row = record.rest.drop_columns([self.image_column, *self._dropped])
        for index, field in enumerate(row.schema):
            if field.name in self._hold_files:
                value = row[field.name][0].as_py()
                if (embedded := _with_contents(value)) is not value:
                    row = row.set_column(index, field, pa.array([embedded], field.type))
        return row

    def other_images(self, record: Record) -> Mapping[str, int]:
        row = record.rest.select(self._may_hold_images).to_pylist()[0]
        for top, fields in filter(None, self._marks):
            if top in row:
                row[top] = _without(row[top], fields)
        return {column: count for column, value in row.items() if (count := count_images(_with_contents(value)))}

    def files(self, record: Record) -> Mapping[str, bytes]:
        files, plain = {}, {}
        for column, value in self.row(record).to_pylist()[0].items():
            left = _taken_out(value, column, files) if column in self._hold_files else value
            values = value if isinstance(value, list) and value else [value]
            # Of files alone their names say enough.
            if not all(_file(one) is not None for one in values):
                plain[column] = left
        if plain:
            files["json"] = json.dumps(plain, default=str, sort_keys=True).encode()
        return files


def _record(label: str, number: int, *contents: Any, **more: Any) -> Record:
    return Record(f"{label}#{number}", f"{_STEM.sub('', label)}/{number:08d}", *contents, **more)


def _place_of(name: str, stored: pa.Schema) -> tuple[str, list[str]]:
    """The column that masks or boxes are in, and the names of the fields that lead to them there.

    Raises:
        ValueError: no such column or field.
    """
    column, fields = column_and_fields(name, stored.names)
    kind = stored.field(column).type
    for field in fields:
        while not pa.types.is_struct(kind) and pa.types.is_nested(kind):
            kind = kind.field(0).type
        if not pa.types.is_struct(kind) or kind.get_field_index(field) < 0:
            raise ValueError(f"no field {field!r} for {name!r}: the column {column!r} is {stored.field(column).type}")
        kind = kind.field(field).type
    return column, fields


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_nested(kind):
        return any(_holds_bytes(kind.field(index).type) for index in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _without(value: Any, fields: Sequence[str]) -> Any:
    """A value without what [`unseg_hf.mapping.field_of`] finds in it."""
    if isinstance(value, list):
        return [_without(one, fields) for one in value]
    if not isinstance(value, dict):
        return value
    first, *rest = fields
    return {key: _without(one, rest) if key == first else one for key, one in value.items() if key != first or rest}


def _with_contents(value: Any) -> Any:
    """A value with the images that are named in it, at whatever depth: their paths mean nothing elsewhere, and are
    nobody's business. The value itself if there are none."""
    if isinstance(value, dict):
        if value.keys() == {"bytes", "path"} and value["bytes"] is None and value["path"]:
            data, _ = image_bytes(value)
            # A row may name any file that there is: nothing but images goes along.
            return {"bytes": data if data and image_kind(data) else None, "path": os.path.basename(value["path"])}
        new = {key: _with_contents(one) for key, one in value.items()}
        return new if any(new[key] is not value[key] for key in value) else value
    if isinstance(value, list):
        new = [_with_contents(one) for one in value]
        return new if any(one is not old for one, old in zip(new, value, strict=True)) else value
    return value


def _taken_out(value: Any, name: str, files: dict[str, bytes]) -> Any:
    """A value with the names of files in place of those that are in it, at whatever depth; they go to `files`.

    Raises:
        ValueError: two of them would have one name.
    """
    if (part := _file(value)) is not None:
        suffix, data = part
        if (file := f"{name}.{suffix}") in files:
            raise ValueError(f"two images of a row would be called {file}: rename a column, or write parquet")
        files[file] = data
        return file
    if isinstance(value, dict):
        return {key: _taken_out(one, f"{name}.{key}", files) for key, one in value.items()}
    if isinstance(value, list | tuple):  # maps come as pairs
        return [_taken_out(one, f"{name}.{index}", files) for index, one in enumerate(value)]
    return value


def _file(value: Any) -> tuple[str, bytes] | None:
    """Suffix and content of a value that is a file, an image for example."""
    data = value.get("bytes") if isinstance(value, dict) and value.keys() == {"bytes", "path"} else value
    if not isinstance(data, bytes):
        return None
    return image_kind(data) or "bin", data


class ParquetFiles(Table):
    """Parquet files, `shard_size` rows of one file a shard; they are read in passing and never copied.

    Where a row group is damaged, its rows behind the damage are records that cannot be read, and the next one goes on.

    Args:
        files: with the same columns.
        shard_size: rows in a shard.
        columns: as for [`Table`].

    Raises:
        ValueError: a file is damaged, has other columns than the first, or no such column.
    """

    def __init__(self, files: Sequence[Path], shard_size: int, *columns: Any):
        schemas, self._parts, entries, self.shards = [], [], [], []
        for file, label in zip(files, short_names(files), strict=True):
            try:
                metadata = pq.read_metadata(file)
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"{file}: no parquet file, or a damaged one ({error}); write it again") from error
            schemas.append(metadata.schema.to_arrow_schema())
            if not schemas[-1].equals(schemas[0]):
                raise ValueError(f"{file} has other columns than {files[0]}: protect them one by one")
            entries.append((label, metadata.num_rows, file.stat().st_size))
            for start in range(0, metadata.num_rows, shard_size):
                stop = min(start + shard_size, metadata.num_rows)
                self._parts.append((file, label, start, stop))
                self.shards.append(ShardPlan(f"{label}#{start}", stop - start))
        super().__init__(schemas[0], *columns)
        self._nothing = pa.table([pa.nulls(1, kind) for kind in self._stored.types], self._stored)
        self.listing = listing_digest(entries)
        self.description |= {"kind": "parquet", "shard_size": shard_size}

    def read(self, shard: int) -> Iterator[Record]:
        path, label, start, stop = self._parts[shard]
        end, problem = 0, "it has fewer rows than before"
        try:
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
                for group in range(file.num_row_groups):
                    begin, end = end, end + file.metadata.row_group(group).num_rows
                    if begin < stop and end > start:
                        yield from self._read_group(file, label, group, begin, max(begin, start), min(end, stop))
        except (OSError, pa.ArrowException) as error:
            problem = one_line(error).replace(str(path), path.name)  # its folders are nobody's business
        yield from self._lost(label, max(end, start), stop, problem)

    def _read_group(
        self, file: pq.ParquetFile, label: str, group: int, begin: int, start: int, stop: int
    ) -> Iterator[Record]:
        """Rows `start` to `stop` of a row group that begins with the row `begin`; those behind damage as lost."""
        row, problem = begin, "it ends too early"
        try:
            for batch in file.iter_batches(ROWS, row_groups=[group]):
                batch.validate(full=True)  # damage may leave offsets and text that lead nowhere
                low, high = max(start - row, 0), min(stop - row, len(batch))
                if low < high:
                    yield from self._records(row + low, label, pa.Table.from_batches([batch.slice(low, high - low)]))
                row += len(batch)
                if row >= stop:
                    return
        except (OSError, pa.ArrowException) as error:
            problem = one_line(error)
        yield from self._lost(label, max(row, start), stop, f"row group {group} is damaged ({problem})")

    def _lost(self, label: str, start: int, stop: int, problem: str) -> Iterator[Record]:
        for number in range(start, stop):
            yield _record(label, number, None, error=f"{label}: {problem}", rest=self._nothing)


class SavedDataset(Table):
    """A split of what `save_to_disk` wrote, memory-mapped; `columns` as for [`Table`]."""

    def __init__(self, folder: Path, split: str, shard_size: int, *columns: Any):
        from ..data.hf_datasets import open_saved

        rows = open_saved(folder, split)
        super().__init__(rows.features.arrow_schema, *columns)
        self._rows, self._split, self._size, count = rows.with_format("arrow"), split, shard_size, len(rows)
        self.shards = [
            ShardPlan(f"{split}#{start}", min(shard_size, count - start)) for start in range(0, count, shard_size)
        ]
        self.listing = listing_digest([(rows._fingerprint, count)])
        self.description |= {"kind": "saved", "shard_size": shard_size, "split": split}

    def _batches(self, shard: int) -> Iterator[tuple[int, str, pa.Table]]:
        start = shard * self._size
        stop = start + self.shards[shard].records
        for first in range(start, stop, ROWS):
            yield first, self._split, self._rows[first : min(first + ROWS, stop)]


class StreamedDataset(Table):
    """A split of a data set of the Hub, streamed, one of its files a shard.

    Args:
        location: Hub id.
        revision: commit, tag or branch; it is pinned to the commit that it is now.
        columns: as for [`Table`].
        options: `name` (the configuration) and others of `load_dataset`.

    Raises:
        ValueError: no such data set, split or column, or one without known columns.
    """

    def __init__(self, location: str, split: str, revision: str | None, *columns: Any, **options: Any):
        from datasets import load_dataset
        from huggingface_hub import HfApi

        try:
            revision = HfApi().dataset_info(location, revision=revision).sha
            stream = load_dataset(location, split=split, revision=revision, streaming=True, **options)
        except Exception as error:  # of the Hub's client, of `datasets` and of what reads the files
            said = one_line(error)
            raise ValueError(f"{location}: no such file or folder, and as a data set of the Hub: {said}") from error
        if stream.features is None:
            raise ValueError(f"{location} does not say which columns it has: download it and name its files")
        super().__init__(stream.features.arrow_schema, *columns)
        self._stream, self._split = stream.decode(False).with_format("arrow"), split
        self.shards = [ShardPlan(f"{split}-{index:05d}", None) for index in range(stream.num_shards)]
        self.listing = listing_digest([(revision, stream.num_shards)])
        self.description |= {"kind": "hub", "split": split, "revision": revision, **options}

    def _batches(self, shard: int) -> Iterator[tuple[int, str, pa.Table]]:
        count = len(self.shards)
        part, first = self._stream.shard(num_shards=count, index=shard), 0
        for table in part.iter(batch_size=ROWS):
            yield first, self.shards[shard].name, table
            first += len(table)
