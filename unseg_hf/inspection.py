"""Looking at protected images: what the noise is, what it costs, and what recompression leaves of it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from .evaluation.post_processing import jpeg
from .fidelity import compare, strips
from .image_files import Picture, printable

SHEET_SIDE = 160
"""Longest side of a photo on a contact sheet, in pixels."""
NAME_LENGTH = 40
"""Characters of a photo's name under it: what fits below it and its noise."""


def inspect_pair(
    original: Picture, protected: Picture, region: np.ndarray | None = None, published: Picture | None = None
) -> dict[str, float | None]:
    """Compare a protected picture with its original.

    Args:
        original, protected: of the same shape and type.
        region: `(height, width)` bool, where the full budget applied; everywhere by default.
        published: what became of the protected picture where it was published.

    Returns:
        `max_noise`, `max_noise_background` in grey levels of 255, `psnr` in dB (None for equal pictures), `ssim`, and
        `left_after_jpeg75`, the share of the noise that JPEG of quality 75 leaves (None for equal pictures); with
        `published` also `left_as_published`.

    Raises:
        ValueError: pictures of different size or kind, or a published one of another shape.
    """
    protected = grey_again(protected, original)
    if original.pixels.shape != protected.pixels.shape or original.pixels.dtype != protected.pixels.dtype:
        raise ValueError(
            f"the original is {_kind(original)}, the protected picture {_kind(protected)}: compare a picture with its "
            "own original, at the same size"
        )
    if region is None:
        region = np.ones(original.pixels.shape[:2], dtype=bool)
    figures = compare(original, protected, region)
    if region.all():
        figures["max_noise_background"] = None
    figures["left_after_jpeg75"] = noise_left(original, protected, quality=75)
    if published is not None:
        figures["left_as_published"] = noise_left_as_published(original, protected, published)
    return figures


def grey_again(picture: Picture, original: Picture) -> Picture:
    """A picture in the one channel of its original, where a format without grey, WebP, has made it three alike."""
    height, width, channels = original.pixels.shape
    became_rgb = channels == 1 and picture.pixels.shape == (height, width, 3)
    if became_rgb and (picture.pixels == picture.pixels[..., :1]).all():
        return replace(picture, pixels=picture.pixels[..., :1])
    return picture


def noise_left(original: Picture, protected: Picture, quality: int) -> float | None:
    """The share of the noise that JPEG (Pillow's defaults but for the quality) leaves: 1 all of it, 0 nothing."""
    return share_left(
        original, protected, *(np.asarray(jpeg(Image.fromarray(p.rgb8()), quality)) for p in (original, protected))
    )


def share_left(
    original: Picture, protected: Picture, original_after: np.ndarray, protected_after: np.ndarray
) -> float | None:
    """The share of the noise that is left in `(height, width, 3)` uint8 pixels after some treatment of both pictures.

    The difference of the two treated pictures, projected on the noise; what the treatment does to both is not counted.
    """
    noise = protected.rgb8().astype(np.float32) - original.rgb8()
    energy = float((noise**2).sum(dtype=np.float64))
    if energy == 0:
        return None
    after = protected_after.astype(np.float32) - original_after
    return float((after * noise).sum(dtype=np.float64) / energy)


def noise_left_as_published(original: Picture, protected: Picture, published: Picture) -> float | None:
    """The share of the noise that is left in what a web site, say, made of a protected picture.

    All three at the published size, and grey if it is: the published pixels are fitted (least squares) by the
    original's, the noise and a constant, so that brightness and contrast may have changed. The noise's factor is the
    share of what resizing and grey alone leave of it, and what these take counts as well.

    Args:
        original, protected: of the same shape and type.
        published: the protected picture, resized, recompressed or recoloured; not cropped or turned.

    Returns:
        1 for all of the noise, 0 for nothing; None if there was none.

    Raises:
        ValueError: the published picture has other proportions.
    """
    height, width, size = original.height, original.width, (published.width, published.height)
    if abs(size[0] * height - size[1] * width) > max(width, height) + max(size):  # a pixel more or less of each side
        raise ValueError(
            f"the published picture has {size[0]} x {size[1]} pixels, the protected one {width} x {height}: it was "
            "cropped or turned, and where its noise lies is not known; take one that was not"
        )
    noise = protected.rgb8().astype(np.float32) - original.rgb8()
    if not noise.any():
        return None
    target = published.rgb8()
    mode = "L" if (target == target[..., :1]).all() else "RGB"
    before, after = (
        np.asarray(Image.fromarray(picture.rgb8()).convert(mode).convert("RGB").resize(size, Image.Resampling.LANCZOS))
        for picture in (original, protected)
    )
    products = np.zeros((3, 4))
    for part in strips(target):
        own = before[part].ravel().astype(np.float64)
        terms = np.stack([own, after[part].ravel() - own, np.ones(own.size)])
        products += terms @ np.stack([*terms, target[part].ravel()], axis=1)
    factor = np.linalg.lstsq(products[:, :3], products[:, 3], rcond=None)[0][1]
    left = products[1, 1] / target.size  # of the noise's energy, for each value
    return float(factor * np.sqrt(left / np.mean(noise**2, dtype=np.float64)))


def amplified_noise(original: Picture, protected: Picture, factor: float | None = None) -> Image.Image:
    """The noise around mid-grey; by default so amplified that the largest change is black or white."""
    noise = protected.rgb8().astype(np.float32) - original.rgb8()
    if factor is None:
        factor = 127 / max(1.0, float(np.abs(noise).max()))
    return Image.fromarray(np.clip(np.rint(128 + factor * noise), 0, 255).astype(np.uint8))


def comparison_picture(original: Picture, protected: Picture) -> Image.Image:
    """Original, protected picture and amplified noise side by side, with a caption over each."""
    noise = protected.rgb8().astype(np.float32) - original.rgb8()
    factor = 127 / max(1.0, float(np.abs(noise).max()))
    panels = {
        "original": Image.fromarray(original.rgb8()),
        "protected": Image.fromarray(protected.rgb8()),
        f"noise x {factor:.0f}": amplified_noise(original, protected, factor),
    }
    return captioned([list(panels.values())], list(panels), gap=8, caption=24, font_size=14)


def on_the_sheet(original: Picture, protected: Picture, name: str) -> tuple[str, Image.Image, Image.Image]:
    """What `contact_sheet` takes of a photo: its name, and original and amplified noise at a small size."""
    pictures = Image.fromarray(original.rgb8()), amplified_noise(original, protected)
    for picture in pictures:
        picture.thumbnail((SHEET_SIDE, SHEET_SIDE))
    return name, *pictures


def contact_sheet(photos: Sequence[tuple[str, Image.Image, Image.Image]], columns: int = 4) -> Image.Image:
    """Many photos, each beside its noise, with their names under them: where the noise is, and where it is not.

    Args:
        photos: from `on_the_sheet`.
        columns: photos in a row.
    """
    gap, caption = 8, 18
    rows = [photos[start : start + columns] for start in range(0, len(photos), columns)]
    heights = [max(noise.height for _, _, noise in row) for row in rows]
    across = 2 * SHEET_SIDE + gap // 2 + gap
    sheet = Image.new("RGB", (len(rows[0]) * across + gap, sum(heights) + len(rows) * (caption + gap) + gap), "white")
    draw, top = ImageDraw.Draw(sheet), gap
    for row, height in zip(rows, heights, strict=True):
        for column, (name, original, noise) in enumerate(row):
            left = gap + column * across
            sheet.paste(original, (left, top))
            sheet.paste(noise, (left + SHEET_SIDE + gap // 2, top))
            draw.text((left, top + height + 2), printable(name)[-NAME_LENGTH:], fill="black", font_size=12)
        top += height + caption + gap
    return sheet


def captioned(rows: list[list[Image.Image]], titles: list[str], gap: int, caption: int, font_size: int) -> Image.Image:
    """Pictures of one size in rows, with a title over each column.

    Args:
        rows: RGB pictures, as many in each row as there are titles.
        titles: of the columns.
        gap: pixels between pictures and around them.
        caption: pixels for the titles.
        font_size: of the titles, in pixels.
    """
    width, height = rows[0][0].size
    size = (len(titles) * (width + gap) + gap, len(rows) * (height + gap) + caption)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        left = gap + column * (width + gap)
        draw.text((left, caption // 6), title, fill="black", font_size=font_size)
        for line, pictures in enumerate(rows):
            sheet.paste(pictures[column], (left, caption + line * (height + gap)))
    return sheet


def _kind(picture: Picture) -> str:
    return f"{picture.width} x {picture.height} with {picture.pixels.shape[2]} channels of {picture.pixels.dtype}"
