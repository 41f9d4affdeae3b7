"""Any Hugging Face data set with a column of images and one of masks, as a source of training records."""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..image_files import formats_of_data, labels_of
from ..inputs import LabelMasks
from ..mapping import stored_image
from .records import Record, decoding

MASK_KINDS = ("binary", "regions", "instances", "classes")


@dataclass(eq=False)
class DatasetSource:
    """A parquet file, a local folder or a data set of the Hub. See `unseg_hf.data.records.Source` for the methods.

    Masks are label images of one channel and the size of their image; palette images count by their indices. In
    "binary" columns JPEG masks are cut at 128, since JPEG leaves no 0 a 0. Where each row of the column holds a list
    of mask images, each of them is a binary mask.

    Args:
        location: a parquet file; a folder of parquet files, of images with a `metadata.csv` or `metadata.jsonl` whose
            column `mask_file_name` becomes the column `mask`, or one that `save_to_disk` wrote; or a Hub id,
            `user/name`.
        split: of the data set, slices such as `train[:90%]` included where `load_dataset` reads it.
        config: of the data set, where it has several.
        image_column: name of the image column.
        mask_column: name of the mask column.
        masks: what a label image holds: "binary" one mask, everything that is not 0; "regions" a mask for each value,
            0 too; "instances" a mask for each value but 0; "classes" a mask for each value, 0 too, which is its class.
        ignore: values that belong to no mask, such as those of background and void.
        weight: share in a mixture; None draws every record once an epoch.

    Raises:
        FileNotFoundError: there is nothing at the location.
        ValueError: no such split, column or kind of masks, or columns that hold no images.
    """

    location: str
    split: str = "train"
    config: str | None = None
    image_column: str = "image"
    mask_column: str = "mask"
    masks: str = "binary"
    ignore: tuple[int, ...] = ()
    weight: float | None = None

    def __post_init__(self):
        from datasets import Image as ImageFeature
        from datasets import LargeList, List

        self.location = str(self.location)
        if self.masks not in MASK_KINDS:
            raise ValueError(f"masks={self.masks!r} of {self.location}: must be one of {', '.join(MASK_KINDS)}")
        rows = _open(self.location, self.config, self.split).with_format(None)
        for column in (self.image_column, self.mask_column):
            if column not in rows.column_names:
                raise ValueError(
                    f"{self.location} has no column {column!r}: name one of {', '.join(rows.column_names)}"
                )
        others = set(rows.column_names) - {self.image_column, self.mask_column}
        self._name_column = next((name for name in ("name", "file_name") if name in others), None)
        rows = rows.select_columns([c for c in (self._name_column, self.image_column, self.mask_column) if c])
        encoded = ImageFeature(decode=False)
        mask_feature = rows.features[self.mask_column]
        listed = isinstance(mask_feature, List | LargeList) and _holds_images(mask_feature.feature)
        if listed and self.masks != "binary":
            raise ValueError(
                f"masks={self.masks!r} of {self.location}: column {self.mask_column!r} holds lists of masks, each of "
                "them a mask of its own; say masks=binary"
            )
        for column in (self.image_column, self.mask_column):
            if not (_holds_images(rows.features[column]) or (listed and column == self.mask_column)):
                raise ValueError(f"column {column!r} of {self.location} holds no images but {rows.features[column]}")
        rows = rows.cast_column(self.image_column, encoded)
        self._rows = rows.cast_column(self.mask_column, List(encoded) if listed else encoded)
        self.size = len(self._rows)
        self.name = self.location if self.split == "train" else f"{self.location} ({self.split})"

    def order(self, random: np.random.Generator, rank: int, world: int) -> Iterator[int]:
        yield from random.permutation(self.size)[rank::world].tolist()

    def load(self, handle: int) -> Record:
        row = self._rows[handle]
        name = str((self._name_column and row[self._name_column]) or f"row {handle}")
        image = self._decoded(row[self.image_column], self.image_column, name)
        values = row[self.mask_column]
        if values is None:
            return Record(name, image, [])
        if isinstance(values, list):
            values = [value for value in values if value is not None]
            return Record(name, image, _LazyMasks(values, lambda value: self._binary(value, name)))
        if self.masks == "binary":
            return Record(name, image, [self._binary(values, name)])
        ignored = (0, *self.ignore) if self.masks == "instances" else self.ignore
        masks = LabelMasks(self._labels(self._decoded(values, self.mask_column, name), name), ignored)
        return Record(name, image, masks, masks.values if self.masks == "classes" else None)

    def _binary(self, value: dict, name: str) -> np.ndarray:
        image = self._decoded(value, self.mask_column, name)
        labels = self._labels(image, name)
        if image.format == "JPEG":
            return labels >= 128
        return (labels != 0) & ~np.isin(labels, self.ignore)

    def _labels(self, image: Image.Image, name: str) -> np.ndarray:
        """The values `(height, width)` of a mask image."""
        where = f"{self.name}: {name} of column {self.mask_column!r}"
        if image.format == "JPEG" and self.masks != "binary":
            raise ValueError(
                f"{where} is a JPEG, which changes label numbers; save label images as PNG (masks={self.masks})"
            )
        labels = labels_of(image, "", where)
        return labels.astype(np.uint8) if labels.dtype == bool else labels

    def _decoded(self, value: dict | None, column: str, name: str) -> Image.Image:
        from datasets import Image as ImageFeature

        if value is None:
            raise OSError(f"{name}: column {column!r} is empty")
        with decoding(f"{name}: column {column!r}"):
            data = stored_image(value, "the image")
            # Pillow has readers that start other programs, which `datasets` does not keep it from.
            with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=formats_of_data()):
                pass
            return ImageFeature().decode_example({"bytes": data, "path": None} if isinstance(data, bytes) else value)


class _LazyMasks(Sequence):
    """Of a list of masks only those are decoded that a sample is made of."""

    def __init__(self, values: list[dict], decode: Callable[[dict], np.ndarray]):
        self.values, self.decode = values, decode

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.decode(self.values[index])


def _holds_images(feature: Any) -> bool:
    """Whether a feature is what `datasets` can read as images: such, or their paths, bytes, or both."""
    from datasets import Image as ImageFeature
    from datasets import Value

    if isinstance(feature, Value):
        return feature.dtype in ("string", "large_string", "binary", "large_binary")
    return isinstance(feature, ImageFeature) or (isinstance(feature, dict) and {"bytes", "path"} >= feature.keys())


def _open(location: str, config: str | None, split: str):
    """A `datasets.Dataset`, its images not decoded."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = Path(location)
    try:
        if path.is_file():
            if path.suffix != ".parquet":
                raise ValueError("not a parquet file; give one, a folder, or a Hub id")
            return load_dataset("parquet", data_files=str(path), split=split)
        if any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return open_saved(path, split)
        if path.is_dir():
            return load_dataset(str(path.resolve()), config, split=split)
        return _open_from_hub(location, config, split)
    except OSError:
        raise
    except (ValueError, DatasetsError) as error:
        raise ValueError(f"{location}: {error.__cause__ or error}") from error


def open_saved(folder: Path, split: str):
    from datasets import Dataset, load_from_disk

    saved = load_from_disk(folder)
    if isinstance(saved, Dataset):
        saved = {str(saved.split or "train"): saved}
    if split not in saved:
        raise ValueError(f"no split {split!r}; there is {', '.join(saved)}")
    return saved[split]


def _open_from_hub(location: str, config: str | None, split: str):
    from datasets import load_dataset
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(location)
    except HFValidationError:
        raise FileNotFoundError(
            f"{location}: no such parquet file or folder, and not a Hub id either, which looks like user/name"
        ) from None
    if location.endswith(".parquet"):
        raise FileNotFoundError(f"{location}: no such parquet file; for a data set of the Hub give its id, user/name")
    try:
        return load_dataset(location, config, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(f"{location}: no such parquet file or folder, and as a Hub id: {error}") from error
