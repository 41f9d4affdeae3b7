"""Images and prompts into the UnSeg generator, noise out of it."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import BatchFeature, SamProcessor
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from .image_files import as_rgb8

MASK_STRIDE = 4  # SAM's mask prompts have a quarter of the resolution of its images


class UnSegProcessor(SamProcessor):
    r"""Prepares images and prompts for [`UnSegModel`], and brings its noise to the size of the images.

    An image is resized so that its longer side is the model's input size, padded to a square with black at the right
    and bottom, and normalised; padding comes before normalisation, as in the authors' code. Or it is stretched to the
    square: then the noise has the same place and the same number of waves in images of all shapes, also when a victim
    resizes them all to one size.

    Args:
        image_processor (`SamImageProcessor` or `SamImageProcessorPil`):
            Sizes and normalisation. Resizing is always Pillow's, so that an image gets the same noise on every
            machine, with torchvision or without.
        stretch (`bool`, *optional*, defaults to `False`):
            Whether images are stretched to the square, and not padded.
        sharpness (`float`, *optional*, defaults to 1.0):
            What enlarged noise is multiplied with before it is clipped, at least 1: the slopes between the cells of
            the noise, four for each patch of the encoder, become as much steeper. Training does without.
    """

    def __init__(self, image_processor, stretch: bool = False, sharpness: float = 1.0):
        if not sharpness >= 1:
            raise ValueError(f"sharpness={sharpness:g}: must be at least 1")
        self.stretch, self.sharpness = stretch, sharpness
        if not isinstance(image_processor, SamImageProcessorPil):
            image_processor = SamImageProcessorPil.from_dict(image_processor.to_dict())
        super().__init__(image_processor)

    @classmethod
    def for_image_size(cls, image_size: int, stretch: bool = False, sharpness: float = 1.0) -> "UnSegProcessor":
        """The processor of a generator whose input is `image_size` pixels square."""
        square = {"height": image_size, "width": image_size}
        mask_side = image_size // MASK_STRIDE
        return cls(
            SamImageProcessorPil(
                size={"longest_edge": image_size},
                pad_size=square,
                mask_size={"longest_edge": mask_side},
                mask_pad_size={"height": mask_side, "width": mask_side},
            ),
            stretch,
            sharpness,
        )

    def __call__(
        self,
        images=None,
        masks: Sequence[np.ndarray] | None = None,
        input_points=None,
        input_labels=None,
        input_boxes=None,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Prepare a batch.

        Args:
            images: one image or a list: PIL images, or arrays of shape `(height, width, 3)` or `(height, width)`,
                uint8 in [0, 255].
            masks: one array an image, `(prompts, height, width)` at the image's size, zero outside the masks; every
                image of a batch needs the same number of prompts.
            input_points: nested lists `[image][prompt][point][x, y]` in pixels of the image.
            input_labels: nested lists `[image][prompt][point]`, 1 in the object and 0 outside.
            input_boxes: nested lists `[image][prompt][x0, y0, x1, y1]` in pixels of the image.
            return_tensors: "pt"; there is no other backend.

        Returns:
            `pixel_values` `(batch, 3, image_size, image_size)`, `original_sizes` and `reshaped_input_sizes`
            `(batch, 2)` as (height, width), and of the prompts those that were passed: `input_masks`
            `(batch, prompts, image_size / 4, image_size / 4)` float in [0, 1], `input_points`, `input_labels`,
            `input_boxes` in pixels of the model's input.

        Raises:
            ValueError: images or masks of another type or shape.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: UnSegProcessor returns PyTorch tensors, 'pt'")
        if isinstance(images, torch.Tensor):
            raise ValueError(
                f"images is a tensor of shape {tuple(images.shape)}: pass PIL images or arrays (height, width, 3), or "
                "a Protector, which takes tensors (channels, height, width) and does all that follows"
            )
        single = isinstance(images, (Image.Image, np.ndarray))
        pictures = [_rgb(image) for image in ([images] if single else images)]
        features = super().__call__(
            images=[self._shaped(picture) for picture in pictures],
            input_points=input_points,
            input_labels=input_labels,
            input_boxes=input_boxes,
            input_data_format="channels_last",
            return_tensors="pt",
        )
        features["original_sizes"] = torch.tensor([picture.shape[:2] for picture in pictures])
        mean, std = (
            torch.tensor(v)[:, None, None] for v in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        for pixels, (height, width) in zip(features["pixel_values"], features["reshaped_input_sizes"], strict=True):
            pixels[:, height:] = -mean / std
            pixels[:, :, width:] = -mean / std
        for name in {"input_points", "input_boxes"} & features.keys():
            features[name] = features[name].float()
            if self.stretch:
                for coordinates, (height, width) in zip(features[name], features["original_sizes"], strict=True):
                    coordinates.unflatten(-1, (-1, 2)).mul_(self.target_size / torch.stack([width, height]))
        if masks is not None:
            if isinstance(masks, np.ndarray) and len(masks) != len(pictures):
                raise ValueError(
                    f"masks of shape {masks.shape} for {len(pictures)} images: pass a list with an array "
                    "(prompts, height, width) for each"
                )
            shapes, wanted = [np.shape(mask) for mask in masks], [picture.shape[:2] for picture in pictures]
            if [shape[1:] for shape in shapes] != wanted or len({shape[:1] for shape in shapes}) > 1:
                raise ValueError(
                    f"masks of shapes {shapes} for images of (height, width) {wanted}: pass (prompts, height, width) "
                    "for each image, with the same number of prompts"
                )
            sizes = [tuple(size) for size in features["reshaped_input_sizes"].tolist()]
            features["input_masks"] = torch.stack(
                [self.mask_prompts(mask, size) for mask, size in zip(masks, sizes, strict=True)]
            )
        return features

    def post_process_noise(
        self, noise: torch.Tensor, original_size: tuple[int, int], reshaped_input_size: tuple[int, int]
    ) -> torch.Tensor:
        """Noise of one image at that image's size.

        Args:
            noise (`torch.Tensor` of shape `(prompts, 3, h, w)`): noise over the square, in [-1, 1].
            original_size: (height, width) of the image.
            reshaped_input_size: (height, width) of the image inside the square.

        Returns:
            `(prompts, 3, height, width)` float32 in [-1, 1], without gradients.
        """
        full = [self.full_size_noise(one, original_size, reshaped_input_size)[:] for one in noise]
        return torch.from_numpy(np.stack(full)).permute(0, 3, 1, 2)

    def full_size_noise(
        self, noise: torch.Tensor, original_size: tuple[int, int], reshaped_input_size: tuple[int, int]
    ) -> "FullSizeNoise":
        """Noise of one prompt, `(3, h, w)`, whose parts are brought to the image's size when they are asked for."""
        height, width = (int(side) for side in reshaped_input_size)
        size = tuple(int(side) for side in original_size)
        square = (self.image_processor.pad_size["height"], self.image_processor.pad_size["width"])
        noise = noise.detach().float()
        if size[0] < height or size[1] < width:
            noise = F.interpolate(noise[None], square, mode="bilinear", align_corners=False)[..., :height, :width]
            noise = F.interpolate(noise, size, mode="bilinear", align_corners=False, antialias=True)[0]
            steps = []
        else:
            # The square of the model's input, and the image, which is only a part of it.
            steps = [(noise.shape[1:], square), ((height, width), size)]
        return FullSizeNoise(noise.permute(1, 2, 0).clamp(-1, 1).cpu().numpy(), steps, self.sharpness)

    def noise_box(
        self,
        extent: tuple[int, int, int, int],
        original_size: tuple[int, int],
        reshaped_input_size: tuple[int, int],
        cell: int,
    ) -> tuple[int, int, int, int]:
        """The cells of the model's embedding grid whose noise a part of an image gets: (top, bottom, left, right).

        Args:
            extent: (top, bottom, left, right) of the part, in pixels of the image.
            original_size: (height, width) of the image.
            reshaped_input_size: (height, width) of the image inside the square.
            cell: pixels of the model's input to a side of a cell.
        """
        limit = self.target_size // cell
        box: list[int] = []
        for places, size, side in zip((extent[:2], extent[2:]), original_size, reshaped_input_size, strict=True):
            # Bilinear noise comes from neighbours too: one pixel of the input away, or of a smaller image more, and
            # then one of the noise's own cells, four to a cell of the grid.
            reach = 1 + side / size + cell / 4
            first, last = (place * side / size for place in places)
            box += [max(0, int((first - reach) // cell)), min(limit, int(-(-(last + reach) // cell)))]
        return tuple(box)

    def _shaped(self, picture: np.ndarray) -> np.ndarray:
        """A picture as SAM's processor may resize it to the longer side alone."""
        # So narrow that resizing would leave no pixel of the short side, it is stretched, too.
        least = -(-max(picture.shape[:2]) // self.target_size)
        height, width = [self.target_size] * 2 if self.stretch else (max(side, least) for side in picture.shape[:2])
        if (height, width) == picture.shape[:2]:
            return picture
        return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))

    def mask_prompts(self, masks: np.ndarray, reshaped_input_size: tuple[int, int]) -> torch.Tensor:
        """Masks of one image as the model takes them.

        Args:
            masks: `(prompts, height, width)` or `(height, width)` at the image's size, zero outside the masks.
            reshaped_input_size: (height, width) of the image inside the square.

        Returns:
            `(prompts, image_size / 4, image_size / 4)` float: the share of each cell that the mask covers.
        """
        height, width = reshaped_input_size
        masks = np.asarray(masks)
        masks = masks[None] if masks.ndim == 2 else masks
        square = np.zeros((len(masks), self.target_size, self.target_size), dtype=np.uint8)
        for drawn, mask in zip(square, masks, strict=True):
            drawn[:height, :width] = _shrunk(mask, (height, width))
        return F.avg_pool2d(torch.from_numpy(square).float() / 255, MASK_STRIDE)


def _shrunk(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pillow's resize of a mask to (height, width), of its rows and then of its columns, and of those alone that are
    not empty: the same numbers, `(height, width)` uint8, sooner where the mask is small."""
    rows = np.zeros((len(mask), size[1]), dtype=np.uint8)
    filled = _filled(mask.any(axis=1))
    inside = (mask[filled] != 0).view(np.uint8) * np.uint8(255)
    rows[filled] = _resized(inside, (len(inside), size[1]))
    shrunk = np.zeros(size, dtype=np.uint8)
    filled = _filled(rows.any(axis=0))
    shrunk[:, filled] = _resized(rows[:, filled], (size[0], filled.stop - filled.start))
    return shrunk


def _filled(any_there: np.ndarray) -> slice:
    """From the first to the last that is True; of none the first."""
    places = np.flatnonzero(any_there) if any_there.any() else np.zeros(1, dtype=int)
    return slice(int(places[0]), int(places[-1]) + 1)


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BOX))


class FullSizeNoise:
    """Noise at an image's size, in parts: all of it takes 12 bytes a pixel, and most of a segment's is not needed.

    A value does not depend on the part that it was asked for in.

    Args:
        noise: `(h, w, channels)` float32 in [-1, 1].
        steps: in which it is enlarged, bilinearly: (height, width) of what is enlarged, and that it becomes.
        sharpness: what it is multiplied with before it is clipped.
    """

    def __init__(
        self, noise: np.ndarray, steps: Sequence[tuple[Sequence[int], Sequence[int]]], sharpness: float = 1.0
    ):
        # A channel at a time: numpy is slow where an innermost axis is as short as three.
        self._noise = np.ascontiguousarray(noise.transpose(2, 0, 1)) * np.float32(sharpness)
        self._clipped = sharpness > 1
        self._steps = [[_neighbours(*sides) for sides in zip(*step, strict=True)] for step in steps]

    def __getitem__(self, part: slice | tuple[slice, slice]) -> np.ndarray:
        """Rows of the image, or rows and columns: a new `(rows, columns, channels)` float32 array."""
        rows, columns = part if isinstance(part, tuple) else (part, slice(None))
        noise = self._after(len(self._steps), rows, columns)
        noise = np.clip(noise, -1, 1, out=noise) if self._clipped else noise
        return noise.transpose(1, 2, 0)

    def _after(self, steps: int, rows: slice, columns: slice) -> np.ndarray:
        if steps == 0:
            return self._noise[:, rows, columns].copy()
        (above, below, down), (left, right, across) = (
            [values[part] for values in axis]
            for axis, part in zip(self._steps[steps - 1], (rows, columns), strict=True)
        )
        few = self._after(steps - 1, slice(above[0], below[-1] + 1), slice(left[0], right[-1] + 1))
        wide = _mixed(few.take(left - left[0], 2), few.take(right - left[0], 2), across)
        return _mixed(wide.take(above - above[0], 1), wide.take(below - above[0], 1), down[:, None])


def _mixed(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Both arrays in one, with this share of the second; what they held is lost."""
    first *= 1 - share
    second *= share
    first += second
    return first


def _neighbours(few: int, many: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Between which two of `few` cells each of `many` pixels lies, and the share of the second: bilinear weights."""
    place = ((np.arange(many) + 0.5) * few / many - 0.5).clip(0, few - 1)
    first = place.astype(np.int64)
    return first, np.minimum(first + 1, few - 1), (place - first).astype(np.float32)


def _rgb(image) -> np.ndarray:
    """Any accepted image as `(height, width, 3)` uint8."""
    if isinstance(image, Image.Image):
        return np.asarray(as_rgb8(image))
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise ValueError(
            f"an image array of shape {image.shape} and type {image.dtype}: pass (height, width, 3) or "
            "(height, width), uint8 in [0, 255]"
        )
    image = image if image.ndim == 3 else image[:, :, None]
    return np.ascontiguousarray(np.broadcast_to(image, (*image.shape[:2], 3)))


__all__ = ["FullSizeNoise", "UnSegProcessor"]
