"""A small data set that victims can learn: reddish discs on a bluish ground."""

import io
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage


def discs(count: int, height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, height, width, 3) uint8 and (count, height, width) uint8: number of the disc, 0 for none."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    images = rng.integers(90, 130, (count, height, width, 3))
    numbers = np.zeros((count, height, width), np.uint8)
    for image, number in zip(images, numbers, strict=True):
        for disc in (1, 2):
            row, radius = rng.integers(10, height - 10), rng.integers(5, 8)
            column = rng.integers(8, width // 2 - 8) + (disc - 1) * (width // 2)
            number[(rows - row) ** 2 + (columns - column) ** 2 < radius**2] = disc
        image[..., 0][number > 0] += 60
        image[..., 2][number == 0] += 60
    return images.astype(np.uint8), numbers


def encoded(array: np.ndarray, file_format: str = "PNG") -> dict:
    """A cell of an image column."""
    buffer = io.BytesIO()
    PILImage.fromarray(array).save(buffer, file_format)
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(file: Path, columns: dict[str, list]) -> str:
    """A parquet file with a name column and image columns."""
    features = Features({name: Value("string") if name == "name" else Image() for name in columns})
    Dataset.from_dict(columns, features=features).to_parquet(str(file))
    return str(file)


def write_discs(file: Path, count: int, seed: int, height: int = 44, width: int = 52) -> str:
    """A parquet file of discs with the columns name, image, mask (0 and 1) and instances."""
    images, numbers = discs(count, height, width, seed)
    columns = {
        "name": [f"{index:03d}" for index in range(count)],
        "image": [encoded(image, "JPEG") for image in images],
        "mask": [encoded((number > 0).astype(np.uint8)) for number in numbers],
        "instances": [encoded(number) for number in numbers],
    }
    return write_parquet(file, columns)
