"""What the demo shows: marks and masks on a photo, the noise, and what a web site would leave of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from unseg_hf.demo.session import Marks, Photo
from unseg_hf.evaluation.post_processing import POST_PROCESSINGS
from unseg_hf.inspection import share_left
from unseg_hf.protection import Protected

DETAIL = 480
"""Side of the details, in pixels of the photo."""

# Okabe and Ito's palette: told apart by colour-blind eyes.
_MASK_COLOURS = ((0, 158, 240), (240, 160, 0), (0, 170, 120), (220, 110, 170), (240, 228, 66), (213, 94, 0))
_ON, _OFF = (0, 130, 90), (200, 60, 0)

WEB_TREATMENTS = {"jpeg75": "JPEG 75", "half": "half size", "greyscale": "greyscale"}
"""Name of a post-processing -> what the page calls it."""


def marked(photo: Photo, marks: Marks, masks: Sequence[np.ndarray] = ()) -> Image.Image:
    """The view of a photo with masks as coloured areas with an outline, and the clicks and boxes over them."""
    pixels = np.asarray(photo.view, np.float32)
    outlines = np.zeros(pixels.shape[:2], bool)
    for i, mask in enumerate(masks):
        small = Image.fromarray(mask).resize(photo.view.size, Image.Resampling.NEAREST)
        inside = np.asarray(small)
        colour = np.array(_MASK_COLOURS[i % len(_MASK_COLOURS)], np.float32)
        pixels = np.where(inside[..., None], 0.55 * pixels + 0.45 * colour, pixels)
        grey = small.convert("L")
        edge = np.asarray(grey.filter(ImageFilter.MaxFilter(3))) != np.asarray(grey.filter(ImageFilter.MinFilter(3)))
        outlines |= edge
    pixels[outlines] = 255
    picture = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    unit = max(4, round(max(picture.size) / 90))
    if marks.way == "boxes":
        for x0, y0, x1, y1 in marks.boxes:
            corners = (*photo.to_view(x0, y0), *photo.to_view(x1, y1))
            draw.rectangle(corners, outline="black", width=max(3, unit // 2))
            draw.rectangle(corners, outline="white", width=max(1, unit // 4))
        if marks.corner is not None:
            _sign(draw, *photo.to_view(*marks.corner), unit, (60, 60, 60), "+")
    if marks.way == "points":
        for x, y, label in marks.points:
            _sign(draw, *photo.to_view(x + 0.5, y + 0.5), unit, _ON if label else _OFF, "+" if label else "-")
    return picture


def _sign(draw: ImageDraw.ImageDraw, x: float, y: float, unit: int, colour: tuple, sign: str) -> None:
    """A disc with a plus or minus in it, so that nobody has to tell green from red."""
    draw.circle((x, y), 1.6 * unit, fill="white")
    draw.circle((x, y), 1.3 * unit, fill=colour)
    width = max(2, unit // 3)
    draw.line((x - 0.7 * unit, y, x + 0.7 * unit, y), fill="white", width=width)
    if sign == "+":
        draw.line((x, y - 0.7 * unit, x, y + 0.7 * unit), fill="white", width=width)


def detail_window(protected: Protected) -> tuple[slice, slice]:
    """Rows and columns of a square of at most `DETAIL` pixels around the middle of the protected part."""
    rows, columns = (np.flatnonzero(protected.region.any(axis=axis)) for axis in (1, 0))
    window = []
    for found, size in zip((rows, columns), protected.region.shape, strict=True):
        middle = (int(found[0]) + int(found[-1])) // 2 if len(found) else size // 2
        start = min(max(middle - DETAIL // 2, 0), max(size - DETAIL, 0))
        window.append(slice(start, start + DETAIL))
    return window[0], window[1]


def web_treatments(protected: Protected) -> list[tuple[Image.Image, str, float | None]]:
    """What web sites do: a detail of the treated picture, what was done, and the share of the noise it leaves.

    The share is measured on the whole picture; a picture made smaller is enlarged again for that.
    """
    original, noisy = (Image.fromarray(p.rgb8()) for p in (protected.original, protected.picture))
    rows, columns = detail_window(protected)
    results = []
    for name, title in WEB_TREATMENTS.items():
        before, after = (_at(noisy.size, POST_PROCESSINGS[name](image)) for image in (original, noisy))
        share = share_left(protected.original, protected.picture, before, after)
        results.append((Image.fromarray(after[rows, columns]), title, share))
    return results


def _at(size: tuple[int, int], image: Image.Image) -> np.ndarray:
    """(height, width, 3) uint8 pixels of a picture at another size."""
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))
