"""HQSeg-44K as it comes with SAM-HQ: about 44,000 images with one finely cut object each."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..image_files import formats_of_data
from .records import Record, decoding

PARTS = {
    "DIS5K-TR": ("DIS5K/DIS-TR/im", "DIS5K/DIS-TR/gt"),
    "DIS5K-VD": ("DIS5K/DIS-VD/im", "DIS5K/DIS-VD/gt"),
    "ThinObject5K-TR": (
        "thin_object_detection/ThinObject5K/images_train",
        "thin_object_detection/ThinObject5K/masks_train",
    ),
    "ThinObject5K-TE": (
        "thin_object_detection/ThinObject5K/images_test",
        "thin_object_detection/ThinObject5K/masks_test",
    ),
    "COIFT": ("thin_object_detection/COIFT/images", "thin_object_detection/COIFT/masks"),
    "HRSOD": ("thin_object_detection/HRSOD/images", "thin_object_detection/HRSOD/masks_max255"),
    "fss_all": ("cascade_psp/fss_all", "cascade_psp/fss_all"),
    "DUTS-TR": ("cascade_psp/DUTS-TR", "cascade_psp/DUTS-TR"),
    "DUTS-TE": ("cascade_psp/DUTS-TE", "cascade_psp/DUTS-TE"),
    "ecssd": ("cascade_psp/ecssd", "cascade_psp/ecssd"),
    "MSRA_10K": ("cascade_psp/MSRA_10K", "cascade_psp/MSRA_10K"),
}
"""Where the images (.jpg) and the masks (.png) of each part lie; in `cascade_psp` side by side."""

TRAINING_PARTS = ("DIS5K-TR", "ThinObject5K-TR", "fss_all", "DUTS-TR", "DUTS-TE", "ecssd", "MSRA_10K")
"""What SAM-HQ and UnSeg train on; the other parts are their tests."""


class HqSegSource:
    """The unpacked folder tree of HQSeg-44K. See `unseg_hf.data.records.Source` for the methods.

    Each image has one mask: its mask file where it is above 127, since the values between 0 and 255 smooth its edge.

    Args:
        root: the folder with `DIS5K`, `cascade_psp` and `thin_object_detection` in it.
        parts: names of [`PARTS`]; those of [`TRAINING_PARTS`] by default.
        weight: share in a mixture; None draws every record once an epoch.

    Raises:
        FileNotFoundError: a folder of a part is missing, or has no images.
        ValueError: an unknown part.
    """

    def __init__(self, root: str | Path, parts: Sequence[str] | None = None, weight: float | None = None):
        self.root, self.parts, self.weight = Path(root), tuple(parts or TRAINING_PARTS), weight
        self.name = f"HQSeg-44K in {self.root.name}"
        if unknown := [part for part in self.parts if part not in PARTS]:
            raise ValueError(f"{self.name} has no part {unknown[0]!r}; there is {', '.join(PARTS)}")
        self._files = [(part, stem) for part in self.parts for stem in self._stems(part)]
        self.size = len(self._files)

    def _stems(self, part: str) -> list[str]:
        images, masks = (self._stems_in(*place) for place in zip(PARTS[part], (".jpg", ".png"), strict=True))
        if not images:
            raise FileNotFoundError(f"{self.root / PARTS[part][0]}: no .jpg files; {_layout(part)}")
        for kind, alone in (("image", images - masks), ("mask", masks - images)):
            if alone:
                warnings.warn(
                    f"{self.root}, {part}: {len(alone)} left out, such as {min(alone)}, whose {kind} is there alone",
                    stacklevel=4,
                )
        return sorted(images & masks)

    def _stems_in(self, folder: str, suffix: str) -> set[str]:
        try:
            return {path.stem for path in (self.root / folder).iterdir() if path.suffix == suffix}
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"{self.root / folder}: no such folder; {_layout(*self.parts)}") from None

    def order(self, random: np.random.Generator, rank: int, world: int) -> Iterator[int]:
        yield from random.permutation(self.size)[rank::world].tolist()

    def load(self, handle: int) -> Record:
        part, stem = self._files[handle]
        images, masks = PARTS[part]
        # As SAM-HQ reads them: no turning by EXIF, which the masks do not follow.
        image = _read(self.root / images / f"{stem}.jpg", "RGB")
        return Record(f"{part}/{stem}", image, [np.asarray(_read(self.root / masks / f"{stem}.png", "L")) > 127])


def _read(path: Path, mode: str) -> Image.Image:
    with decoding(str(path)), Image.open(path, formats=formats_of_data()) as image:
        return image.convert(mode)


def _layout(*parts: str) -> str:
    places = (f"{part}: {PARTS[part][0]}/*.jpg with {PARTS[part][1]}/*.png" for part in parts)
    return "the published layout, from the folder given on, is\n  " + "\n  ".join(places)
