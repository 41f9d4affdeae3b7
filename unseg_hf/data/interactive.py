"""Training samples for interactive segmentation: one object a sample, jittered, from any mixture of sources."""

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..image_files import ImageFileError, as_rgb8
from .records import Record, Source

OTHERS = 16
"""Records that are tried in place of a batch of which none can be used."""


class Draw(NamedTuple):
    """One sample of an epoch: all that its pixels depend on, beside the seed."""

    epoch: int
    number: int
    source: int
    handle: Any


class InteractiveSegmentation(torch.utils.data.Dataset):
    """Images with one object mask each, jittered in scale, flipped, and padded to a square.

    A sample depends on the seed and its [`Draw`] alone, never on the worker that makes it, so that no two workers
    share a random stream and a resumed run sees what an uninterrupted one would.

    Args:
        sources: where the images come from. Either all have a `weight`, and each sample's source is drawn by it, or
            none has, and an epoch is one pass over all of them.
        image_size: side of the square, in pixels.
        scale_range: the longer side of an image becomes `image_size` times a factor drawn from here (large-scale
            jitter); what does not fit is cropped at random.
        max_masks: a sample's mask is the union of 1 to this many masks of its record.
        epoch_size: samples an epoch; all records by default, which sources without a size cannot tell.
        seed: of all random choices.
        stretch: both sides become that, whatever the shape of the image, as a processor with `stretch` does it.

    Raises:
        ValueError: no images, weights for some sources only or not above 0, or an epoch size that is needed and
            missing.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        image_size: int,
        scale_range: tuple[float, float] = (0.1, 2.0),
        max_masks: int = 1,
        epoch_size: int | None = None,
        seed: int = 0,
        stretch: bool = False,
    ):
        self.sources, self.image_size, self.scale_range = list(sources), image_size, scale_range
        self.max_masks, self.seed, self.stretch = max_masks, seed, stretch
        if not 0 < scale_range[0] <= scale_range[1]:
            raise ValueError(
                f"scales from {scale_range[0]:g} to {scale_range[1]:g}: the first must be above 0, and not above the "
                "second"
            )
        if epoch_size is not None and epoch_size < 1:
            raise ValueError(f"epoch_size={epoch_size}: must be at least 1")
        if not self.sources:
            raise ValueError("no sources of images: name at least one")
        self._weights = [source.weight for source in self.sources]
        if all(weight is None for weight in self._weights):
            # A single one needs none, and its size, which may take long to count, is needed for the epoch alone.
            self._weights = [1.0] if len(self.sources) == 1 and epoch_size else None
        elif None in self._weights:
            named = self.sources[self._weights.index(None)].name
            raise ValueError(f"{named} has no weight and another source has one: give every source a weight, or none")
        elif not all(0 < weight < np.inf for weight in self._weights):
            raise ValueError(f"weights {', '.join(map(str, self._weights))} of the sources: each must be more than 0")
        self._size = epoch_size
        if epoch_size is None or self._weights is None:
            sizes = {source.name: source.size for source in self.sources}
            for name, size in sizes.items():
                if size is None:
                    raise ValueError(
                        f"{name} is a stream, whose size nobody knows: say how many samples an epoch has (epoch_size) "
                        "and, beside other sources, give every source a weight"
                    )
                if size == 0:
                    raise ValueError(f"no images in {name}")
            self._size = epoch_size or sum(source.size for source in self.sources)

    def __len__(self) -> int:
        """Samples an epoch, over all processes."""
        return self._size

    def batches(
        self, epoch: int, batch_size: int, rank: int = 0, world: int = 1, skip: int = 0
    ) -> Iterator[list[Draw]]:
        """The batches of one process in one epoch, full ones only; all processes have equally many.

        Args:
            epoch: from 0.
            batch_size: samples a batch.
            rank: of the process, from 0.
            world: number of processes.
            skip: batches to leave out at the beginning, which a resumed run has seen.
        """
        draws = self._draws(epoch, rank, world)
        count = len(self) // (batch_size * world)
        next(itertools.islice(draws, skip * batch_size, skip * batch_size), None)
        for _ in range(skip, count):
            yield list(itertools.islice(draws, batch_size))

    def batches_of_steps(self, steps: int, batch_size: int) -> Iterator[list[Draw]]:
        """One process's batches of so many steps, over as many epochs as they take.

        Raises:
            ValueError: no step, or an epoch has no full batch.
        """
        if steps < 1:
            raise ValueError(f"{steps} steps: must be at least 1")
        if len(self) < batch_size:
            raise ValueError(f"{len(self)} images are less than a batch of {batch_size}: lower the batch size")
        epochs = (self.batches(epoch, batch_size) for epoch in itertools.count())
        return itertools.islice(itertools.chain.from_iterable(epochs), steps)

    def _draws(self, epoch: int, rank: int, world: int) -> Iterator[Draw]:
        random = np.random.default_rng((self.seed, epoch, rank, world))
        parts = [rank] * len(self.sources)
        if self._weights:
            weights = np.array(self._weights)
            choices = (int(random.choice(len(weights), p=weights / weights.sum())) for _ in itertools.count())
        else:
            # One pass over everything, cut or gone on with where the epoch has another size. Records are dealt as if
            # the sources lay end to end, so that the processes have equally many and together see each once.
            sizes = np.array([source.size for source in self.sources])
            parts = [int(part) for part in (rank - (np.cumsum(sizes) - sizes)) % world]
            shares = [len(range(part, int(size), world)) for part, size in zip(parts, sizes, strict=True)]
            if not sum(shares):
                raise ValueError(
                    f"{sizes.sum()} images for {world} processes: give more images or start fewer processes"
                )
            all_of_them = np.repeat(np.arange(len(self.sources)), shares)
            choices = itertools.chain.from_iterable(random.permutation(all_of_them) for _ in itertools.count())
        passes = [self._endless(index, epoch, part, world) for index, part in enumerate(parts)]
        for number, source in enumerate(choices):
            yield Draw(epoch, number * world + rank, int(source), next(passes[source]))

    def _endless(self, index: int, epoch: int, rank: int, world: int) -> Iterator[Any]:
        source = self.sources[index]
        for turn in itertools.count():
            empty = True
            for handle in source.order(np.random.default_rng((self.seed, epoch, index, turn)), rank, world):
                empty = False
                yield handle
            if empty:
                raise ValueError(f"{source.name} has no records for process {rank} of {world}")

    def __getitem__(self, draw: Draw) -> dict[str, Any]:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: list[Draw]) -> list[dict[str, Any]]:
        """The samples of a batch.

        A record that cannot be read, or has no mask or one of another size, is named in a warning, and another of the
        batch takes its place, cropped anew; where none of the batch can be used, another of the source.

        Returns:
            For each draw `image` `(3, image_size, image_size)` float in [0, 1], `mask` `(image_size, image_size)`, 0
            or 1 and never empty, `inside` of the same shape, 1 where the square shows the image and 0 where it is
            padded, and `name`.

        Raises:
            ValueError: no record of the batch can be used, nor any of some others.
        """
        samples = [self._sample(draw, attempt=0) for draw in draws]
        usable = [draw for draw, sample in zip(draws, samples, strict=True) if sample] or self._another(draws[0])
        if not usable:
            names = [self.sources[draw.source].name for draw in draws]
            raise ValueError(
                f"no usable record in a batch of {len(draws)} from {sorted(set(names))}; see the warnings"
            )
        for place, sample in enumerate(samples):
            if sample is None:
                samples[place] = self._sample(usable[place % len(usable)], attempt=1 + place)
        return samples

    def _another(self, draw: Draw) -> list[Draw]:
        """A record of the same source that can be used, in the draw's place; none if several cannot."""
        for attempt in range(OTHERS):
            random = np.random.default_rng((self.seed, draw.epoch, draw.number, attempt))
            for handle in itertools.islice(self.sources[draw.source].order(random, 0, 1), 1):
                other = draw._replace(handle=handle)
                if self._sample(other, attempt=0):
                    return [other]
        return []

    def _sample(self, draw: Draw, attempt: int) -> dict[str, Any] | None:
        random = np.random.default_rng((self.seed, draw.epoch, draw.number, attempt))
        source = self.sources[draw.source]
        try:
            record = source.load(draw.handle)
            image = as_rgb8(record.image)
            mask = self._choose_mask(record, random)
        except (OSError, ImageFileError) as error:  # the first is Pillow's word for damaged images, too
            warnings.warn(f"{source.name}: left out, {error}", stacklevel=2)
            return None
        if mask is None:
            warnings.warn(f"{source.name}: {record.name} left out, it has no mask with a pixel in it", stacklevel=2)
            return None
        if mask.shape != image.size[::-1]:
            warnings.warn(
                f"{source.name}: {record.name} left out, its mask has shape {mask.shape} and the image, upright, "
                f"(height, width) {image.size[::-1]}; both must be the same",
                stacklevel=2,
            )
            return None
        pixels, target = self._jittered(image, Image.fromarray(mask.astype(np.uint8)), random)
        if random.random() < 0.5:
            pixels, target = pixels[:, ::-1], target[:, ::-1]
        square = np.zeros((5, self.image_size, self.image_size), np.uint8)
        height, width = target.shape
        square[:3, :height, :width], square[3, :height, :width], square[4, :height, :width] = (
            pixels.transpose(2, 0, 1), target, 1,
        )  # fmt: skip
        square = torch.from_numpy(square)
        return {
            "image": square[:3].float() / 255,
            "mask": square[3].float(),
            "inside": square[4].float(),
            "name": f"{source.name}: {record.name}",
        }

    def _choose_mask(self, record: Record, random: np.random.Generator) -> np.ndarray | None:
        count = min(int(random.integers(1, self.max_masks + 1)), len(record.masks))
        # Empty masks are passed over, so that whether a record can be used is no matter of chance.
        masks = (record.masks[int(index)] for index in random.permutation(len(record.masks)))
        chosen = list(itertools.islice((mask for mask in masks if mask.any()), count))
        if len({mask.shape for mask in chosen}) > 1:
            raise OSError(f"{record.name} has masks of shapes {', '.join(str(mask.shape) for mask in chosen)}")
        return np.logical_or.reduce(chosen) if chosen else None

    def _jittered(
        self, image: Image.Image, mask: Image.Image, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """A crop `(height, width, 3)` and its mask `(height, width)`, 0 or 1, with a pixel of the mask in it."""
        scale = random.uniform(*self.scale_range)
        for _ in range(4):
            pixels, target = self._crop(image, mask, scale, random)
            if target.any():
                return pixels, target
        # The object keeps falling outside the crop, or between the pixels of a small one: crop around one of its own.
        row, column = (int(v[0]) for v in np.nonzero(np.asarray(mask)))
        side = min(self.image_size, *image.size)
        left, top = (
            min(max(0, at - side // 2), whole - side) for at, whole in zip((column, row), image.size, strict=True)
        )
        box = (left, top, left + side, top + side)
        return np.asarray(image.crop(box)), np.asarray(mask.crop(box))

    def _crop(
        self, image: Image.Image, mask: Image.Image, scale: float, random: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scaled so that the longer side, or with `stretch` both, is `scale * image_size`, and cropped to at most
        `image_size` a side."""
        unscaled = image.size if self.stretch else [max(image.size)] * 2
        factors = [scale * self.image_size / side for side in unscaled]
        size = [max(1, round(side * factor)) for side, factor in zip(image.size, factors, strict=True)]
        crop = [min(side, self.image_size) for side in size]
        corner = [random.integers(0, side - part + 1) for side, part in zip(size, crop, strict=True)]
        ends = [c + p for c, p in zip(corner, crop, strict=True)]
        box = [float(v / factor) for v, factor in zip((*corner, *ends), factors * 2, strict=True)]
        box = (*box[:2], min(box[2], image.width), min(box[3], image.height))
        return (
            np.asarray(image.resize(crop, Image.Resampling.BILINEAR, box=box)),
            np.asarray(mask.resize(crop, Image.Resampling.NEAREST, box=box)),
        )
