"""Images as they are published, as PNG files; and as a victim gets to see them, after somebody's treatment."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import unseg_hf
from unseg_hf.evaluation.controls import BANDS, CONTROLS, UNWEIGHTED, control_noise, tint_for
from unseg_hf.evaluation.labelled_images import LabelledImage, LabelledImages
from unseg_hf.evaluation.post_processing import POST_PROCESSINGS
from unseg_hf.evaluation.removal import REMOVALS, fit_removal
from unseg_hf.fidelity import max_noise, psnr, ssim
from unseg_hf.image_files import replacing
from unseg_hf.model_identity import model_identity
from unseg_hf.noise_codes import CLASSES, FAINT, MASK, TINTS

GENERATORS = {
    "generator": "the protected images",
    "generator-per-segment": "images protected segment by segment",
    "generator-boxes": "images protected by a box around each object",
    "generator-found": "images protected where the generator itself found objects",
    "generator-whole-image": "images protected all over",
}
"""Ways to ask the generator, and what a report calls the images."""

ROUGH = ("generator-boxes", "generator-found", "generator-whole-image")
"""Those that reach beyond the objects: what users get who have no masks."""

NOISES = ("clean", *GENERATORS, *CONTROLS)
"""What may be done to the training images: nothing, the generator's noise, or a control noise."""

REMOVAL_PREFIX = "removal:"
DENOISER = f"{REMOVAL_PREFIX}denoiser"
PUBLIC = f"{REMOVAL_PREFIX}generator"
TREATMENTS = (*POST_PROCESSINGS, *(REMOVAL_PREFIX + name for name in REMOVALS), PUBLIC)
"""What may happen to published images before a victim is trained on them."""

MANIFEST = "manifest.json"
SSIM_IMAGES = 50
"""SSIM, which takes longer than protecting, is measured on so many images."""

PUBLIC_ROUNDS = 3
"""Times that the public generator is asked what it adds to an image, each time with less noise in it."""

ATTACKER_IMAGES = 200
"""Images that somebody who trains a denoiser protects for it, at most."""


@dataclass
class Measured:
    """What a noise did to the published files, compared with the originals.

    `max_inside` and `max_outside` are the largest absolute differences in the region and outside it, in grey levels of
    255; `mean_psnr` is the mean of the images' PSNR in dB, None if no image was changed; `mean_ssim` that of the first
    `ssim_images` images' SSIM; `unchanged` counts the images without any difference, which `mean_psnr` leaves out.
    """

    images: int = 0
    max_inside: int = 0
    max_outside: int = 0
    mean_psnr: float | None = None
    mean_ssim: float | None = None
    ssim_images: int = 0
    unchanged: int = 0

    def add(self, original: np.ndarray, published: np.ndarray, region: np.ndarray) -> None:
        """Count one image: two arrays of shape `(height, width, 3)`, uint8, and its region `(height, width)`, bool."""
        inside, outside = max_noise(original, published, region)
        self.max_inside, self.max_outside = max(self.max_inside, inside), max(self.max_outside, outside)
        if self.ssim_images < SSIM_IMAGES:
            self.mean_ssim = _mean_with(self.mean_ssim, self.ssim_images, ssim(original, published))
            self.ssim_images += 1
        decibels = psnr(original, published)
        if decibels is None:
            self.unchanged += 1
        else:
            self.mean_psnr = _mean_with(self.mean_psnr, self.images - self.unchanged, decibels)
        self.images += 1


def _mean_with(mean: float | None, count: int, value: float) -> float:
    """The mean of so many values and one more."""
    return ((mean or 0.0) * count + value) / (count + 1)


def noise_budget(noise: str, epsilon: float, epsilon_background: float) -> tuple[float, float]:
    """Bounds of a noise in the region and outside it, in [0, 1]; arguments as for [`publish`].

    `clean` spends nothing, and the controls of [`UNWEIGHTED`] spend `epsilon` outside the region too.
    """
    if noise == "clean":
        return 0.0, 0.0
    return epsilon, epsilon if noise in UNWEIGHTED else epsilon_background


def noise_settings(
    images: LabelledImages,
    noise: str,
    epsilon: float,
    epsilon_background: float,
    model: str | None,
    tint: str = "auto",
) -> dict[str, str | float]:
    """Everything that decides the pixels of published files, as a dict for JSON; arguments as for [`publish`].

    `epsilon` and `epsilon_background` are the bounds that the noise is applied with, see [`noise_budget`].
    """
    settings = {"noise": noise, "images": images.fingerprint(), "unseg_hf": unseg_hf.__version__}
    if noise != "clean":
        bounds = noise_budget(noise, epsilon, epsilon_background)
        settings |= zip(("epsilon", "epsilon_background"), bounds, strict=True)
    if noise.startswith("generator"):
        settings["model"] = model_identity(model)[0]
    if noise == "bands":
        settings["codes"] = " ".join([MASK, FAINT, *TINTS, *CLASSES])
    if tint != "auto" and (noise == "bands" or noise.startswith("generator")):
        settings["tint"] = tint
    return settings


def publish(
    images: LabelledImages,
    noise: str,
    folder: Path,
    *,
    epsilon: float,
    epsilon_background: float,
    model: str | None = None,
    tint: str = "auto",
    device: str = "cpu",
) -> Measured:
    """Write every image with its noise as `<folder>/<number>.png`, and measure those files against the originals.

    Does nothing if the folder's manifest says that it is complete with the same settings. Otherwise the files are
    written to a temporary folder, which then takes the place of the folder: a folder is complete or not there.

    Args:
        images: the images, whose regions weight the noise.
        noise: one of [`NOISES`].
        folder: where the files go.
        epsilon: bound in the region, in [0, 1] (8/255: eight grey levels).
        epsilon_background: bound outside the region, in [0, 1]; for `whole` it is `epsilon`, whatever is given here,
            and for those of [`ROUGH`] that of what lies outside what they mark.
        model: checkpoint for `generator`: a folder, a Hub id, or None for the embedded one.
        tint: when the generator, and `bands`, which do as the embedded one does, take a tint, see [`Prompt`].
        device: where the generator runs.

    Raises:
        FileExistsError: the folder is there and is not one of ours.
        ValueError: a file on disk is further from its original than the budget allows.
    """
    settings = noise_settings(images, noise, epsilon, epsilon_background, model, tint)
    manifest = json.loads((folder / MANIFEST).read_text()) if (folder / MANIFEST).is_file() else None
    if manifest is None and folder.exists():
        raise FileExistsError(f"{folder} exists and has no {MANIFEST}; choose another output folder or remove it")
    complete = all(file.is_file() for file in published_files(folder, images))
    if manifest and complete and manifest["settings"] == settings:
        return Measured(**manifest["measured"])

    bounds = noise_budget(noise, epsilon, epsilon_background)
    protect = protection_of(images, noise, *bounds, model, tint, device)
    if noise in ROUGH:
        bounds = epsilon, epsilon
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    measured = Measured()
    for labelled, file in zip(images, published_files(partial, images), strict=True):
        protect(labelled).save(file, compress_level=1)
        with Image.open(file) as published:
            measured.add(np.asarray(labelled.image), np.asarray(published), labelled.region)
    largest_changes = (measured.max_inside, measured.max_outside)
    for where, largest, bound in zip(("in", "outside"), largest_changes, bounds, strict=True):
        if largest > bound * 255 + 1e-6:
            raise ValueError(
                f"{noise}: files in {partial} differ by {largest} grey levels {where} the region, over the budget of "
                f"{bound * 255:g}; noises are comparable only within one budget, so mend the noise"
            )
    (partial / MANIFEST).write_text(json.dumps({"settings": settings, "measured": asdict(measured)}, indent=2))
    if manifest is not None:
        shutil.rmtree(folder)
    partial.rename(folder)
    return measured


def published_files(folder: Path, images: LabelledImages) -> list[Path]:
    """The file of each image in a folder that [`publish`] wrote."""
    return [folder / f"{index:06d}.png" for index in range(len(images))]


def protection_of(
    images: LabelledImages,
    noise: str,
    epsilon: float,
    epsilon_background: float,
    model: str | None,
    tint: str,
    device: str,
) -> Callable[[LabelledImage], Image.Image]:
    """What puts a noise on one of the images; arguments as for [`publish`]."""
    if noise == "clean":
        return lambda labelled: labelled.image
    if noise.startswith("generator"):
        from unseg_hf.protection import load_generator

        protector = load_generator(model, device)

        def protect_with_generator(labelled: LabelledImage) -> Image.Image:
            prompt: dict[str, Any] = {"mask": labelled.region}
            if noise == "generator-whole-image":
                prompt = {"whole_image": True}
            elif noise == "generator-boxes" and (boxes := labelled.boxes()):
                prompt = {"boxes": boxes}
            elif noise == "generator-found":
                prompt = {}
            elif noise == "generator-per-segment":
                segments = [(mask & labelled.region, label) for mask, label in labelled.segments()]
                # One mask at least: an image of background alone gets its noise from an empty one.
                segments = [segment for segment in segments if segment[0].any()] or [(labelled.region, 0)]
                masks, classes = zip(*segments, strict=True)
                prompt = {"masks": masks, "mode": "per_segment"} | ({} if images.binary else {"classes": classes})
            return protector.protect(
                labelled.image, epsilon=epsilon, epsilon_background=epsilon_background, tint=tint, **prompt
            ).image

        return protect_with_generator

    from unseg_hf.protection import apply_noise

    def protect_with_control(labelled: LabelledImage) -> Image.Image:
        # The seed comes from the name, so that a file does not depend on which other images are published.
        seed = int.from_bytes(hashlib.sha256(labelled.name.encode()).digest()[:8])
        pixels = np.asarray(labelled.image)
        labels = labelled.region if images.binary else labelled.labels
        of_mask = noise == "bands" and images.binary
        code = _code_of_bands(pixels, labelled.region, epsilon, tint) if of_mask else MASK
        control = control_noise(noise, labels, seed, code)
        pixels = apply_noise(pixels, control, labelled.region, epsilon, epsilon_background)
        return Image.fromarray(pixels)

    return protect_with_control


def _code_of_bands(pixels: np.ndarray, region: np.ndarray, epsilon: float, tint: str) -> str:
    """That which the embedded generator has for a mask in such an image."""
    from unseg_hf.noise_choice import SMALL_BUDGET, needs_tint

    if tint == "always" or (tint == "auto" and needs_tint(pixels, region, len(pixels) / BANDS)):
        return tint_for(pixels, TINTS)
    return FAINT if epsilon < SMALL_BUDGET else MASK


def treat(
    published: Path,
    images: LabelledImages,
    treatment: str,
    size: int,
    file: Path,
    attacker: tuple[Path, LabelledImages] | None = None,
    protect: Callable[[LabelledImage], Image.Image] | None = None,
) -> None:
    """Write published images as a victim sees them: treated, then resized to a square; nothing if the file is there.

    Args:
        published: folder that [`publish`] wrote.
        images: the images that were published.
        treatment: one of [`TREATMENTS`].
        size: side of the square in pixels.
        file: where the array goes, `(count, 3, size, size)` uint8 in [0, 255], as .npy. Images are resized with
            antialiased bilinear interpolation.
        attacker: what somebody who trains a denoiser has: a folder of images published with the same noise, and their
            originals.
        protect: what somebody has who knows the public generator, for `removal:generator`: see [`protection_of`].
    """
    if file.is_file():
        return
    apply = None if treatment == PUBLIC else treatment_function(published, images, treatment, attacker)
    pixels = np.empty((len(images), 3, size, size), np.uint8)
    for index, path in enumerate(published_files(published, images)):
        with Image.open(path) as image:
            seen = image.convert("RGB")
        seen = without_public_noise(seen, images[index], protect) if apply is None else apply(seen)
        pixels[index] = _square(seen, size)
    with replacing(file) as stream:
        np.save(stream, pixels)


def without_public_noise(
    published: Image.Image, labelled: LabelledImage, protect: Callable[[LabelledImage], Image.Image]
) -> Image.Image:
    """A published image less what the public generator adds to it: it makes nearly the same noise for an image that
    has noise already, and whoever trains on the image has its labels."""
    pixels = np.asarray(published).astype(np.int16)
    found = pixels
    for _ in range(PUBLIC_ROUNDS):
        image = Image.fromarray(found.astype(np.uint8))
        added = np.asarray(protect(replace(labelled, image=image))).astype(np.int16) - found
        found = (pixels - added).clip(0, 255)
    return Image.fromarray(found.astype(np.uint8))


def treatment_function(
    published: Path, images: LabelledImages, treatment: str, attacker: tuple[Path, LabelledImages] | None = None
) -> Callable[[Image.Image], Image.Image]:
    """What a treatment, but for `removal:generator`, does to one RGB image; arguments as for [`treat`]."""
    if not treatment.startswith(REMOVAL_PREFIX):
        return POST_PROCESSINGS[treatment]
    pairs = None
    if treatment == DENOISER and attacker is not None:
        folder, originals = attacker
        files = zip(published_files(folder, originals), originals, strict=True)
        pairs = [
            (np.asarray(Image.open(path)), np.asarray(original.image))
            for path, original in islice(files, ATTACKER_IMAGES)
        ]
    return fit_removal(treatment.removeprefix(REMOVAL_PREFIX), published_files(published, images), pairs)


def clean_squares(images: LabelledImages, size: int) -> np.ndarray:
    """The images themselves as a victim is tested on them: `(count, 3, size, size)` uint8, resized as by [`treat`]."""
    return np.stack([_square(labelled.image, size) for labelled in images])


def annotation_squares(images: LabelledImages, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Labels and instances of images that were resized to a square, by nearest neighbour.

    A treatment may leave an image smaller than it was: annotations are resized from their own size, and both cover
    the whole picture, so that they stay aligned.

    Returns:
        Labels, `(count, size, size)` uint8, and instances, `(count, size, size)` int32 or None.
    """
    labels, instances = [], []
    for labelled in images:
        labels.append(np.asarray(Image.fromarray(labelled.labels).resize((size, size), Image.Resampling.NEAREST)))
        if labelled.instances is not None:
            resized = Image.fromarray(labelled.instances).resize((size, size), Image.Resampling.NEAREST)
            instances.append(np.asarray(resized))
    return np.stack(labels), np.stack(instances) if instances else None


def _square(image: Image.Image, size: int) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
