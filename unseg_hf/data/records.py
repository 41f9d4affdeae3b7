"""Training data: every source becomes the same record, an image and a list of masks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

MASK_KINDS = ("binary", "regions")


@dataclass(frozen=True)
class Source:
    """Parquet files of images with label images.

    Args:
        path: a parquet file, with an image column and a column of label images of the same size.
        kind: "binary" for one mask an image, the pixels that are not zero; "regions" for one mask a label value.
        image_column: name of the image column.
        mask_column: name of the label image column.
        ignore_label: a label value that belongs to no mask.
    """

    path: str
    kind: str = "binary"
    image_column: str = "image"
    mask_column: str = "mask"
    ignore_label: int | None = None

    def __post_init__(self):
        if self.kind not in MASK_KINDS:
            raise ValueError(f"kind={self.kind!r} of {self.path}: must be one of {', '.join(MASK_KINDS)}")


class InteractiveSegmentation(torch.utils.data.Dataset):
    """Images with one object mask each, jittered in scale, flipped, and padded to a square.

    What comes back depends on the seed, the epoch (`set_epoch`) and the index alone, never on the worker that makes
    it, so that no two workers share a stream and a resumed run sees what an uninterrupted one would.

    Args:
        sources: where the images come from.
        image_size: side of the square, in pixels.
        scale_range: the longer side of an image becomes `image_size` times a factor drawn from here (large-scale
            jitter); what does not fit is cropped at random.
        max_regions: a mask of a "regions" source is the union of 1 to this many regions.
        seed: of all random choices.

    Raises:
        ValueError: a source without the named columns, or no images at all.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        image_size: int,
        scale_range: tuple[float, float] = (0.1, 2.0),
        max_regions: int = 1,
        seed: int = 0,
    ):
        self.image_size, self.scale_range, self.max_regions, self.seed = image_size, scale_range, max_regions, seed
        self.epoch = 0
        self._tables = [(source, _load(source)) for source in sources]
        self._index = [(t, row) for t, (_, table) in enumerate(self._tables) for row in range(len(table))]
        if not self._index:
            raise ValueError(f"no images in {[source.path for source in sources]}")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`image` `(3, image_size, image_size)` float in [0, 1] and `mask` `(image_size, image_size)`, 0 or 1.

        An image whose mask has no pixel left, in the file or at this scale, gives its place to another one.
        """
        rng = np.random.default_rng((self.seed, self.epoch, index))
        for _ in range(100):
            pixels, target = self._draw(index, rng)
            if target.any():
                break
            index = int(rng.integers(len(self)))
        else:
            raise ValueError(f"100 images in a row have an empty mask, row {self._index[index][1]} among them")
        if rng.random() < 0.5:
            pixels, target = pixels[:, ::-1], target[:, ::-1]
        square = np.zeros((self.image_size, self.image_size, 4), np.uint8)
        height, width = target.shape
        square[:height, :width, :3], square[:height, :width, 3] = pixels, target
        square = torch.from_numpy(square).permute(2, 0, 1)
        return {"image": square[:3].float() / 255, "mask": (square[3] > 0).float()}

    def _draw(self, index: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A crop `(height, width, 3)` of an image and its mask `(height, width)`, 0 or 255."""
        table, row = self._index[index]
        source, records = self._tables[table]
        record = records[row]
        image = record[source.image_column].convert("RGB")
        labels = np.asarray(record[source.mask_column])
        if labels.shape != image.size[::-1]:
            raise ValueError(
                f"row {row} of {source.path}: the mask has shape {labels.shape}, the image (height, width) "
                f"{image.size[::-1]}; both must be the same"
            )
        mask = Image.fromarray(self._choose_mask(labels, source, rng))
        scale = rng.uniform(*self.scale_range)
        for _ in range(4):
            pixels, target = self._crop(image, mask, scale, rng)
            if target.any():
                return pixels, target
        # The object keeps falling outside the crop: take the whole image.
        return self._crop(image, mask, min(scale, 1.0), rng)

    def _choose_mask(self, labels: np.ndarray, source: Source, rng: np.random.Generator) -> np.ndarray:
        """A `(height, width)` uint8 mask, 0 or 255."""
        if source.kind == "binary":
            chosen = labels != 0
            if source.ignore_label is not None:
                chosen &= labels != source.ignore_label
        else:
            values = np.unique(labels)
            values = values[values != source.ignore_label] if source.ignore_label is not None else values
            count = min(int(rng.integers(1, self.max_regions + 1)), len(values))
            chosen = np.isin(labels, rng.choice(values, count, replace=False))
        return chosen.astype(np.uint8) * 255

    def _crop(
        self, image: Image.Image, mask: Image.Image, scale: float, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scaled so that the longer side is `scale * image_size`, and cropped to at most `image_size` a side."""
        factor = scale * self.image_size / max(image.size)
        size = [max(1, round(side * factor)) for side in image.size]
        crop = [min(side, self.image_size) for side in size]
        corner = [rng.integers(0, side - part + 1) for side, part in zip(size, crop, strict=True)]
        box = tuple(float(v / factor) for v in (*corner, *(c + p for c, p in zip(corner, crop, strict=True))))
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
        return (
            np.asarray(image.resize(crop, Image.Resampling.BILINEAR, box=box)),
            np.asarray(mask.resize(crop, Image.Resampling.NEAREST, box=box)),
        )


def _load(source: Source):
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    if not Path(source.path).is_file():
        raise FileNotFoundError(f"{source.path}: no such parquet file")
    table = load_dataset("parquet", data_files=source.path, split="train")
    for column in (source.image_column, source.mask_column):
        if column not in table.column_names:
            raise ValueError(f"{source.path} has no column {column!r}; it has {', '.join(table.column_names)}")
        table = table.cast_column(column, ImageFeature())
    return table.select_columns([source.image_column, source.mask_column])
