"""Write images and their masks as SA-1B is published, for `unseg_hf.data.sa1b` and whatever else reads SA-1B."""

import io
import itertools
import json
import os
import tarfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..image_files import ImageFileError, as_rgb8
from .records import Record
from .sa1b import run_length_coder

_SMOOTH = Image.Resampling.BOX


def write_sa1b(
    records: Iterable[Record],
    folder: str | os.PathLike,
    images_per_shard: int = 1000,
    quality: int = 95,
    longest_side: int | None = None,
    report: Callable[[str], None] = print,
) -> int:
    """Write `folder/sa_000000.tar`, `sa_000001.tar`, ..., each of which has its name once it is whole.

    Masks are kept exactly, images are encoded as JPEG, in RGB; those that are larger than they may be are made
    smaller first, with their masks. Images are numbered from 1 over all tars; a record's
    own name is the json's `image.source_name`. Every mask gets a predicted IoU and a stability of 1. Empty masks are
    left out, and so are, with a warning, records whose image cannot be decoded or is too large for JPEG, or
    that have a mask of another size.

    Args:
        records: images and masks of their size.
        folder: made if need be.
        images_per_shard: at least 1; the last tar may hold fewer.
        quality: of JPEG, 1 to 100.
        longest_side: of an image, in pixels, at least 1; None: as long as it is.
        report: called with a line for each tar.

    Returns:
        Number of images written.

    Raises:
        FileExistsError: the folder holds such tars already.
        ValueError: an argument is out of its range.
        ImportError: pycocotools is not installed.
    """
    if images_per_shard < 1 or not 1 <= quality <= 100:
        raise ValueError(f"images_per_shard={images_per_shard} must be at least 1, quality={quality} in [1, 100]")
    if longest_side is not None and longest_side < 1:
        raise ValueError(f"longest_side={longest_side} must be at least 1")
    folder = Path(folder)
    present = sorted(folder.glob("sa_*.tar"))
    if present:
        # Whoever reads the folder's tars would read those of two runs.
        raise FileExistsError(f"{present[0]} exists: choose another folder, or remove the sa_*.tar in this one")
    folder.mkdir(parents=True, exist_ok=True)
    samples, written = _samples(records, quality, longest_side), 0
    for number in itertools.count():
        target, before = folder / f"sa_{number:06d}.tar", written
        partial = target.with_name(f"{target.name}.partial")
        with tarfile.open(partial, "w") as tar:
            for sample in itertools.islice(samples, images_per_shard):
                for name, data in sample.items():
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                written += 1
        if written == before:
            partial.unlink()
            return written
        partial.rename(target)
        report(f"{target}: {written - before} images")


def _samples(records: Iterable[Record], quality: int, longest_side: int | None) -> Iterator[dict[str, bytes]]:
    """An image's two members, names and contents."""
    image_id, annotation_ids = 1, itertools.count(1)
    for record in records:
        encoded = io.BytesIO()
        try:
            image = as_rgb8(record.image)
            size, longest = image.size, max(image.size)
            if longest_side and longest > longest_side:
                image = image.resize([max(1, round(side * longest_side / longest)) for side in size], _SMOOTH)
            image.save(encoded, "JPEG", quality=quality)
            masks = list(record.masks)
            if odd := [mask.shape for mask in masks if mask.shape != size[::-1]]:
                raise OSError(f"a mask has shape {odd[0]} and the image, upright, (height, width) {size[::-1]}")
        except (OSError, ImageFileError) as error:
            warnings.warn(f"left out {record.name}: {error}", stacklevel=2)
            continue
        stem, annotations = f"sa_{image_id}", []
        for mask in masks:
            if image.size != size:
                # Half covered is covered: nearest neighbours would leave thin objects in pieces.
                mask = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(image.size, _SMOOTH)) > 127
            if mask.any():
                annotations.append({"id": next(annotation_ids), **_annotation(mask)})
        described = {
            "image_id": image_id,
            "width": image.width,
            "height": image.height,
            "file_name": f"{stem}.jpg",
            "source_name": record.name,
        }
        content = json.dumps({"image": described, "annotations": annotations}).encode()
        yield {f"{stem}.jpg": encoded.getvalue(), f"{stem}.json": content}
        image_id += 1


def _annotation(mask: np.ndarray) -> dict[str, Any]:
    coder = run_length_coder()
    code = coder.encode(np.asfortranarray(mask, np.uint8))
    rows, columns = np.nonzero(mask)
    middle = len(rows) // 2
    return {
        "segmentation": {"size": list(mask.shape), "counts": code["counts"].decode("ascii")},
        "bbox": coder.toBbox(code).tolist(),
        "area": len(rows),
        "predicted_iou": 1.0,
        "stability_score": 1.0,
        "point_coords": [[float(columns[middle]), float(rows[middle])]],
        "crop_box": [0.0, 0.0, float(mask.shape[1]), float(mask.shape[0])],
    }
