"""Rows of parquet files, of data sets on disk and of streamed ones as a source."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .records import IMAGE_TYPE, Record, ShardPlan, SourceError, image_bytes, listing_digest, short_names

ROWS = 16  # read at once: rows of images are large


class Table:
    """What sources of rows share; see [`unseg_hf.bulk.records.Source`].

    A sub-class sets `shards`, `listing` and `description`, and yields small tables from `_batches`.

    Args:
        stored: schema of the rows, that of `datasets` in its metadata if there is one.
        image_column: its values hold encoded images.
        mask_column: of masks, or lists of them; None where there are none.

    Raises:
        ValueError: no such column.
    """

    shards: list[ShardPlan]

    def __init__(self, stored: pa.Schema, image_column: str, mask_column: str | None):
        for option, column in (("image_column", image_column), ("mask_column", mask_column)):
            if column is not None and column not in stored.names:
                raise ValueError(f"no column {column!r}; there is {', '.join(stored.names)}: say which with {option}")
        self._stored, self.image_column, self._mask_column = stored, image_column, mask_column

    def _batches(self, shard: int) -> Iterator[tuple[int, str, pa.Table]]:
        """Number of the first row and name of its file, for each table."""
        raise NotImplementedError

    def read(self, shard: int) -> Iterator[Record]:
        for first, label, table in self._batches(shard):
            images = table[self.image_column].to_pylist()
            masks = table[self._mask_column].to_pylist() if self._mask_column else [None] * len(images)
            for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
                if isinstance(image, str | bytes):
                    image = {"bytes": image} if isinstance(image, bytes) else {"path": image}
                data, error = image_bytes(image)
                name = f"{label.removesuffix('.parquet')}/{first + index:08d}"
                rest = table.slice(index, 1)
                yield Record(f"{label}#{first + index}", name, data, mask, error, rest)

    def schema(self) -> pa.Schema:
        from datasets import Features, Image

        features = Features.from_arrow_schema(self._stored)
        features[self.image_column] = Image()
        fields = [
            pa.field(self.image_column, IMAGE_TYPE) if field.name == self.image_column else field
            for field in self._stored
        ]
        return pa.schema(fields, features.arrow_schema.metadata)

    def row(self, record: Record) -> pa.Table:
        return record.rest.drop_columns([self.image_column])

    def files(self, record: Record) -> Mapping[str, bytes]:
        files, plain = {}, {}
        for column, value in self.row(record).to_pylist()[0].items():
            values = value if isinstance(value, list) and value else [value]
            parts = [_file(one) for one in values]
            if all(part is not None for part in parts):
                for index, (suffix, data) in enumerate(parts):
                    files[f"{column}{f'.{index}' if isinstance(value, list) else ''}.{suffix}"] = data
            else:
                plain[column] = value
        if plain:
            files["json"] = json.dumps(plain, default=str, sort_keys=True).encode()
        return files


def _file(value: Any) -> tuple[str, bytes] | None:
    """Suffix and content of a value that is a file, an image for example."""
    data = value.get("bytes") if isinstance(value, dict) and value.keys() == {"bytes", "path"} else value
    if not isinstance(data, bytes):
        return None
    kinds = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"GIF8": "gif", b"II*\0": "tiff", b"MM\0*": "tiff"}
    return next((suffix for start, suffix in kinds.items() if data.startswith(start)), "bin"), data


class ParquetFiles(Table):
    """Parquet files, `shard_size` rows of one file a shard; they are read in passing and never copied.

    Raises:
        ValueError: a file is damaged, has other columns than the first, or no such column.
    """

    def __init__(self, files: Sequence[Path], shard_size: int, image_column: str, mask_column: str | None):
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
        super().__init__(schemas[0], image_column, mask_column)
        self.listing = listing_digest(entries)
        self.description = {"kind": "parquet", "shard_size": shard_size, "mask_column": mask_column}

    def _batches(self, shard: int) -> Iterator[tuple[int, str, pa.Table]]:
        path, label, start, stop = self._parts[shard]
        try:
            with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
                first, groups, row = None, [], 0
                for group in range(file.num_row_groups):
                    end = row + file.metadata.row_group(group).num_rows
                    if row < stop and end > start:
                        first = row if first is None else first
                        groups.append(group)
                    row = end
                row = first
                for batch in file.iter_batches(ROWS, row_groups=groups):
                    low, high = max(start - row, 0), min(stop - row, len(batch))
                    if low < high:
                        yield row + low, label, pa.Table.from_batches([batch.slice(low, high - low)])
                    row += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{path.name}: it is damaged ({' '.join(str(error).split())})") from error


class SavedDataset(Table):
    """A split of what `save_to_disk` wrote, memory-mapped."""

    def __init__(self, folder: Path, split: str, shard_size: int, image_column: str, mask_column: str | None):
        from ..data.hf_datasets import open_saved

        rows = open_saved(folder, split)
        super().__init__(rows.features.arrow_schema, image_column, mask_column)
        self._rows, self._split, self._size, count = rows.with_format("arrow"), split, shard_size, len(rows)
        self.shards = [
            ShardPlan(f"{split}#{start}", min(shard_size, count - start)) for start in range(0, count, shard_size)
        ]
        self.listing = listing_digest([(rows._fingerprint, count)])
        self.description = {"kind": "saved", "shard_size": shard_size, "mask_column": mask_column, "split": split}

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
        options: `name` (the configuration) and others of `load_dataset`.

    Raises:
        ValueError: no such data set, split or column, or one without known columns.
    """

    def __init__(
        self,
        location: str,
        split: str,
        revision: str | None,
        image_column: str,
        mask_column: str | None,
        **options: Any,
    ):
        from datasets import load_dataset
        from huggingface_hub import HfApi

        try:
            revision = HfApi().dataset_info(location, revision=revision).sha
            stream = load_dataset(location, split=split, revision=revision, streaming=True, **options)
        except Exception as error:  # of the Hub's client, of `datasets` and of what reads the files
            said = " ".join(str(error).split())
            raise ValueError(f"{location}: no such file or folder, and as a data set of the Hub: {said}") from error
        if stream.features is None:
            raise ValueError(f"{location} does not say which columns it has: download it and name its files")
        super().__init__(stream.features.arrow_schema, image_column, mask_column)
        self._stream, self._split = stream.decode(False).with_format("arrow"), split
        self.shards = [ShardPlan(f"{split}-{index:05d}", None) for index in range(stream.num_shards)]
        self.listing = listing_digest([(revision, stream.num_shards)])
        self.description = {"kind": "hub", "mask_column": mask_column, "split": split, "revision": revision, **options}

    def _batches(self, shard: int) -> Iterator[tuple[int, str, pa.Table]]:
        count = len(self.shards)
        part, first = self._stream.shard(num_shards=count, index=shard), 0
        for table in part.iter(batch_size=ROWS):
            yield first, self.shards[shard].name, table
            first += len(table)
