"""Images as they are published: a data set's training images, protected or with a control noise, as PNG files."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image, ImageOps

import unseg_hf
from unseg_hf.evaluation.controls import CONTROLS, UNWEIGHTED, control_noise
from unseg_hf.evaluation.post_processing import POST_PROCESSINGS

NOISES = ("clean", "generator", *CONTROLS)
"""What may be done to the training images: nothing, the generator's noise, or a control noise."""

COLUMNS = ("name", "image", "mask")
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Record:
    """One image: its name, the RGB image, and its mask, shape `(height, width)`, bool, True = foreground."""

    name: str
    image: Image.Image
    mask: np.ndarray


class ParquetRecords(Sequence):
    """The rows of a Parquet file with the columns `name`, `image` and `mask`, decoded one by one.

    Args:
        path: file in the Hugging Face image layout. A mask is an image of the same size as its image, with 0 =
            background and one other value = foreground; names are different and fit for file names.
        limit: number of rows to take from the start; None = all.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column is missing, there is no row, a name is repeated or is no file name; or, when a row is
            read, its mask is not a binary mask of the size of the image.
    """

    def __init__(self, path: str | Path, limit: int | None = None) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} is no file; give a Parquet file with the columns {', '.join(COLUMNS)}")
        missing = [column for column in COLUMNS if column not in pq.read_schema(path).names]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}; rename its columns to {', '.join(COLUMNS)}")
        if limit is not None and limit < 1:
            raise ValueError(f"the limit of {limit} images leaves none of {path}; take at least 1, or None for all")
        rows = pq.read_table(path, columns=list(COLUMNS)).slice(0, limit).to_pydict()
        self.path = path
        self.names = [str(name) for name in rows["name"]]
        self.images = _encoded_images(path, "image", rows["image"])
        self.masks = _encoded_images(path, "mask", rows["mask"])
        if not self.names:
            raise ValueError(f"{path} has no rows; give a data set with at least one image")
        for name in self.names:
            if not name or Path(name).name != name or "\\" in name:
                raise ValueError(f"{path}: the name {name!r} is no file name; rename it, without folders")
        if len(set(self.names)) < len(self.names):
            repeated = next(name for name in self.names if self.names.count(name) > 1)
            raise ValueError(f"{path}: the name {repeated!r} stands in several rows; make names unique")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Record:
        name = self.names[index]
        # Upright, as `datasets` decodes it, and without metadata, which could turn or recolour the published file.
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(self.images[index]))).convert("RGB")
        image = Image.fromarray(np.asarray(image))
        mask = np.asarray(Image.open(io.BytesIO(self.masks[index])))
        if mask.shape != (image.height, image.width):
            raise ValueError(
                f"{self.path}: the mask of {name!r} has shape {mask.shape}, its image {(image.height, image.width)}; "
                "give one-channel masks of the size of the image"
            )
        foreground = np.unique(mask[mask != 0])
        if len(foreground) > 1:
            raise ValueError(
                f"{self.path}: the mask of {name!r} has several foreground values, {foreground[:5].tolist()}; "
                "this evaluation is for binary masks: keep 0 and one other value"
            )
        return Record(name, image, mask != 0)

    def fingerprint(self) -> str:
        """SHA-256 of the names, images and masks: the same data have the same one, wherever the file lies."""
        digest = hashlib.sha256()
        for row in zip(self.names, self.images, self.masks, strict=True):
            for part in (row[0].encode(), *row[1:]):
                digest.update(hashlib.sha256(part).digest())
        return digest.hexdigest()


def _encoded_images(path: str | Path, column: str, cells: list) -> list[bytes]:
    if not all(isinstance(cell, dict) and cell.get("bytes") for cell in cells):
        raise ValueError(
            f"{path}: the column {column!r} has rows without image bytes; write it with the Image() feature of "
            "datasets and the files embedded"
        )
    return [cell["bytes"] for cell in cells]


@dataclass
class Measured:
    """What a noise did to the published files, compared with the originals.

    `max_inside` and `max_outside` are the largest absolute differences in the mask and outside it, in grey levels of
    255; `mean_psnr` is the mean of the images' PSNR in dB, None if no image was changed; `unchanged` counts the
    images without any difference, which `mean_psnr` leaves out.
    """

    images: int = 0
    max_inside: int = 0
    max_outside: int = 0
    mean_psnr: float | None = None
    unchanged: int = 0

    def add(self, original: np.ndarray, published: np.ndarray, region: np.ndarray) -> None:
        """Count one image: two arrays of shape `(height, width, 3)`, uint8, and its mask `(height, width)`, bool."""
        difference = np.abs(original.astype(np.int16) - published)
        self.max_inside = max(self.max_inside, int(difference[region].max(initial=0)))
        self.max_outside = max(self.max_outside, int(difference[~region].max(initial=0)))
        changed = self.images - self.unchanged
        self.images += 1
        if not difference.any():
            self.unchanged += 1
            return
        psnr = 10 * float(np.log10(255**2 / np.mean(np.square(difference, dtype=np.float64))))
        self.mean_psnr = psnr if self.mean_psnr is None else (self.mean_psnr * changed + psnr) / (changed + 1)


def noise_budget(noise: str, epsilon: float, epsilon_background: float) -> tuple[float, float]:
    """Bounds of a noise in the mask and outside it, in [0, 1]; arguments as for [`publish`].

    `clean` spends nothing, and the controls of [`UNWEIGHTED`] spend `epsilon` outside the mask too.
    """
    if noise == "clean":
        return 0.0, 0.0
    return epsilon, epsilon if noise in UNWEIGHTED else epsilon_background


def noise_settings(
    records: ParquetRecords, noise: str, epsilon: float, epsilon_background: float, model: str | None
) -> dict[str, str | float]:
    """Everything that decides the pixels of published files, as a dict for JSON; arguments as for [`publish`].

    `epsilon` and `epsilon_background` are the bounds that the noise is applied with, see [`noise_budget`].
    """
    settings = {"noise": noise, "images": records.fingerprint(), "unseg_hf": unseg_hf.__version__}
    if noise != "clean":
        bounds = noise_budget(noise, epsilon, epsilon_background)
        settings |= zip(("epsilon", "epsilon_background"), bounds, strict=True)
    if noise == "generator":
        settings["model"] = _model_fingerprint(model)
    return settings


def publish(
    records: ParquetRecords,
    noise: str,
    folder: Path,
    *,
    epsilon: float,
    epsilon_background: float,
    model: str | None = None,
) -> Measured:
    """Write every image with its noise as `<folder>/<name>.png`, and measure those files against the originals.

    Does nothing if the folder's manifest says that it is complete with the same settings. Otherwise the files are
    written to a temporary folder, which then takes the place of the folder: a folder is complete or not there.

    Args:
        records: the images, and the masks that weight the noise.
        noise: one of [`NOISES`].
        folder: where the files go.
        epsilon: bound in the mask, in [0, 1] (8/255: eight grey levels).
        epsilon_background: bound outside the mask, in [0, 1]; for `whole` it is `epsilon`, whatever is given here.
        model: checkpoint for `generator`: a folder, a Hub id, or None for the embedded one.

    Raises:
        FileExistsError: the folder is there and is not one of ours.
        ValueError: a file on disk is further from its original than the budget allows.
    """
    settings = noise_settings(records, noise, epsilon, epsilon_background, model)
    manifest = json.loads((folder / MANIFEST).read_text()) if (folder / MANIFEST).is_file() else None
    files = {name: f"{name}.png" for name in records.names}
    if manifest is None and folder.exists():
        raise FileExistsError(f"{folder} exists and has no {MANIFEST}; choose another output folder or remove it")
    if manifest and manifest["settings"] == settings and all((folder / file).is_file() for file in files.values()):
        return Measured(**manifest["measured"])

    bounds = noise_budget(noise, epsilon, epsilon_background)
    protect = _protection(noise, *bounds, model)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    measured = Measured()
    for record in records:
        file = partial / files[record.name]
        protect(record).save(file)
        with Image.open(file) as published:
            measured.add(np.asarray(record.image), np.asarray(published), record.mask)
    largest_changes = (measured.max_inside, measured.max_outside)
    for where, largest, bound in zip(("in", "outside"), largest_changes, bounds, strict=True):
        if largest > bound * 255 + 1e-6:
            raise ValueError(
                f"{noise}: files in {partial} differ by {largest} grey levels {where} the mask, over the budget of "
                f"{bound * 255:g}; noises are comparable only within one budget, so mend the noise"
            )
    (partial / MANIFEST).write_text(json.dumps({"settings": settings, "measured": asdict(measured)}, indent=2))
    if manifest is not None:
        shutil.rmtree(folder)
    partial.rename(folder)
    return measured


def _protection(
    noise: str, epsilon: float, epsilon_background: float, model: str | None
) -> Callable[[Record], Image.Image]:
    if noise == "clean":
        return lambda record: record.image
    if noise == "generator":
        from unseg_hf import Protector

        protector = Protector.from_pretrained(model)
        return lambda record: (
            protector.protect(
                record.image, mask=record.mask, epsilon=epsilon, epsilon_background=epsilon_background
            ).image
        )

    from unseg_hf.protection import apply_noise

    def protect(record: Record) -> Image.Image:
        # The seed comes from the name, so that a file does not depend on which other images are published.
        seed = int.from_bytes(hashlib.sha256(record.name.encode()).digest()[:8])
        pixels = np.asarray(record.image)
        control = control_noise(noise, record.mask, seed)
        return Image.fromarray(apply_noise(pixels, control, record.mask, epsilon, epsilon_background))

    return protect


def _model_fingerprint(model: str | None) -> str:
    from unseg_hf.protection import default_checkpoint

    folder = default_checkpoint() if model is None else Path(model)
    if not folder.is_dir():
        return f"Hub: {model}"
    digest = hashlib.sha256()
    # What decides the noise, and not the card, which quotes the figures of this evaluation.
    for file in sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")):
        digest.update(file.relative_to(folder).as_posix().encode() + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def victim_arrays(
    records: ParquetRecords, size: int, folder: Path | None = None, post_processing: str = "none"
) -> tuple[np.ndarray, np.ndarray]:
    """Load images as a victim sees them: post-processed, then resized to a square.

    A post-processing may leave an image smaller than it was, even smaller than the square: masks are resized from
    their own size, and both cover the whole picture, so that they stay aligned.

    Args:
        records: the images and their masks.
        size: side of the square in pixels.
        folder: published files to read in place of the records' own images; None = the clean images.
        post_processing: one of [`POST_PROCESSINGS`].

    Returns:
        Images, shape `(count, 3, size, size)`, uint8 in [0, 255], resized with antialiased bilinear interpolation;
        and masks, shape `(count, size, size)`, int64, 1 = foreground, nearest neighbour.
    """
    images = np.empty((len(records), 3, size, size), np.uint8)
    masks = np.empty((len(records), size, size), np.int64)
    for index, record in enumerate(records):
        image = record.image if folder is None else Image.open(folder / f"{record.name}.png")
        image = POST_PROCESSINGS[post_processing](image).resize((size, size), Image.Resampling.BILINEAR)
        images[index] = np.asarray(image).transpose(2, 0, 1)
        masks[index] = np.asarray(Image.fromarray(record.mask).resize((size, size), Image.Resampling.NEAREST))
    return images, masks
