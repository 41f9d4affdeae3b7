"""What the demo does with a photo: opened and encoded once, marked, protected. Nothing here knows of a web page."""

from __future__ import annotations

import io
import re
import shlex
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unseg_hf.image_files import ImageFileError, Picture, read, read_mask
from unseg_hf.inputs import Prompt
from unseg_hf.modeling_unseg import UnSegImageEmbeddings
from unseg_hf.protect_command import shares_of
from unseg_hf.protection import Decoded, Job, Protected, Protector, default_checkpoint, whole_levels

VIEW_SIDE = 1024
"""Longest side of the picture that is clicked on, in pixels: a click must not send a whole photo back."""


@dataclass(frozen=True)
class Limits:
    """What a public server accepts.

    Args:
        file_bytes: size of one uploaded file.
        pixels: of one photo or mask.
        side: longest side of a photo, in pixels.
        marks: points, or boxes, on one photo.
        photos: photos in one batch.
        batch_bytes: of all photos of a batch together.
        waiting: jobs in the queue, of all users; who comes later is told to come back.
        sessions: photos that are kept in memory; the ones not used for longest go first.
        visitors: whose settings are kept in memory, about 130 kB each; the rest as for `sessions`.
        kept_seconds: how long photos and results stay, in memory and on disk.
    """

    file_bytes: int = 20 * 2**20
    pixels: int = 16_000_000
    side: int = 12_000
    marks: int = 50
    photos: int = 20
    batch_bytes: int = 100 * 2**20
    waiting: int = 20
    sessions: int = 24
    visitors: int = 4000
    kept_seconds: int = 1800


@dataclass(frozen=True)
class Marks:
    """What a user has marked on a photo, in pixels of the upright photo; each way keeps its own marks.

    Args:
        way: the one that counts: "points", "boxes", "brush", "objects" (that the generator finds) or "whole".
        points: `(x, y, label)`, 1 for a point on the object and 0 for one that is not.
        boxes: `(x0, y0, x1, y1)`.
        corner: first corner of a box that is not finished.
        drawn: `(height, width)` bool, brushed or from a mask file.
    """

    way: str = "boxes"
    points: tuple[tuple[int, int, int], ...] = ()
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    corner: tuple[int, int] | None = None
    drawn: np.ndarray | None = field(default=None, compare=False)

    def clicked(self, x: int, y: int, label: int) -> Marks:
        """With one more click; boxes take two, on opposite corners."""
        if self.way == "points":
            return replace(self, points=(*self.points, (x, y, label)))
        if self.way != "boxes":
            return self
        if self.corner is None:
            return replace(self, corner=(x, y))
        (left, right), (top, bottom) = sorted((self.corner[0], x)), sorted((self.corner[1], y))
        # Both clicks on one pixel still mean a box.
        return replace(self, corner=None, boxes=(*self.boxes, (left, top, right + 1, bottom + 1)))

    def undone(self) -> Marks:
        """Without the last click or box of the way that counts."""
        if self.way == "points":
            return replace(self, points=self.points[:-1])
        if self.way == "boxes" and self.corner is not None:
            return replace(self, corner=None)
        return replace(self, boxes=self.boxes[:-1]) if self.way == "boxes" else self

    def cleared(self) -> Marks:
        """Without those of the way that counts."""
        own = {"points": {"points": ()}, "boxes": {"boxes": (), "corner": None}, "brush": {"drawn": None}}
        return replace(self, **own.get(self.way, {}))

    def prompt(self) -> Prompt | None:
        """What `Protector` is asked for; None while nothing is marked."""
        if self.way == "points" and any(label for _, _, label in self.points):
            return Prompt(points=[p[:2] for p in self.points], point_labels=[p[2] for p in self.points])
        if self.way == "boxes" and self.boxes:
            return Prompt(boxes=self.boxes)
        if self.way == "brush" and self.drawn is not None:
            return Prompt(mask=self.drawn)
        return {"objects": Prompt(), "whole": Prompt(whole_image=True)}.get(self.way)

    def arguments(self, mask_file: str) -> list[str]:
        """The same for `unseg protect`."""
        if self.way == "points":
            points = [f"{x},{y}" if label else f"{x},{y},0" for x, y, label in self.points]
            # In one word each: what begins with a minus would be taken for an option.
            return [f"--point={point}" for point in points]
        if self.way == "boxes":
            return [f"--box={','.join(map(str, box))}" for box in self.boxes]
        return {"brush": ["--masks", mask_file], "whole": ["--whole-image"]}.get(self.way, [])


@dataclass(frozen=True, eq=False)
class Photo:
    """An opened photo: what is computed once and serves every click.

    Args:
        name: of the uploaded file, harmless.
        picture: upright, with its EXIF.
        embeddings: of the generator, on the CPU.
        view: RGB, its longest side at most `VIEW_SIDE`.
        original: the file's name as its user has it, for the command line alone.
    """

    name: str
    picture: Picture
    embeddings: UnSegImageEmbeddings
    view: Image.Image
    original: str

    def from_view(self, x: float, y: float) -> tuple[int, int]:
        """A pixel of the photo from one of the view."""
        across, down = self.picture.width / self.view.width, self.picture.height / self.view.height
        return (
            min(max(int((x + 0.5) * across), 0), self.picture.width - 1),
            min(max(int((y + 0.5) * down), 0), self.picture.height - 1),
        )

    def to_view(self, x: float, y: float) -> tuple[float, float]:
        return x * self.view.width / self.picture.width, y * self.view.height / self.picture.height

    def mask_from_view(self, mask: np.ndarray) -> np.ndarray:
        """A bool mask of the view's size, or nearly, at the photo's size."""
        full = Image.fromarray(mask).resize((self.picture.width, self.picture.height), Image.Resampling.NEAREST)
        return np.asarray(full)


class Workbench:
    """Opens, marks and protects photos with one generator, within limits.

    Args:
        protector: the generator; its `encode`, `find_masks`, `decode` and `apply` do everything.
        limits: of the server.
        checkpoint: the folder or Hub id that the generator was loaded from, None for the embedded one.
        on_accelerator: wraps each function that runs the model, as `spaces.GPU` does.
    """

    def __init__(
        self,
        protector: Protector,
        limits: Limits,
        checkpoint: str | None = None,
        on_accelerator: Callable[[Callable], Callable] = lambda function: function,
    ):
        self.protector, self.limits, self.checkpoint = protector, limits, checkpoint
        self._encode = on_accelerator(self._encode)
        self._find_masks = on_accelerator(self._find_masks)
        self._decode = on_accelerator(self._decode)

    def open(self, path: str | Path, name: str, original: str | None = None) -> Photo:
        """Read and encode a photo; `original` is its name where `name` had to be made harmless.

        Raises:
            ImageFileError: not one whole picture within the limits; the message names `name`, never the path.
        """
        try:
            picture = read(self._file(path, name), max_pixels=self.limits.pixels)
        except ImageFileError as error:
            if "pillow_heif" in str(error):  # what a visitor cannot install
                message = f"{name}: HEIC photos cannot be read here; export it as JPEG or PNG first"
                raise ImageFileError(message) from None
            raise
        if max(picture.width, picture.height) > self.limits.side:
            raise ImageFileError(
                f"{name}: {picture.width} x {picture.height}, and no side may be above {self.limits.side} pixels; "
                "make it smaller or crop it"
            )
        view = Image.fromarray(picture.rgb8())
        view.thumbnail((VIEW_SIDE, VIEW_SIDE))
        job = self.protector.prepare(picture, Prompt(whole_image=True))
        return Photo(name, picture, self._encode(job), view, original or name)

    def read_mask(self, path: str | Path, name: str, photo: Photo) -> np.ndarray:
        """A mask file for a photo, `(height, width)` bool; ImageFileError unless it is one, of the photo's size."""
        mask = read_mask(self._file(path, name), self.limits.pixels)
        size = photo.picture.height, photo.picture.width
        if mask.shape != size:
            raise ImageFileError(
                f"{name}: this mask has {mask.shape[1]} x {mask.shape[0]} pixels and the upright photo {size[1]} x "
                f"{size[0]}; both must be the same"
            )
        return mask != 0

    def find_masks(self, photo: Photo, prompt: Prompt) -> tuple[list[np.ndarray], list[str]]:
        """The masks that `protect` will use, and notes on how they were found; the photo is not encoded again."""
        return self._find_masks(self.protector.prepare(photo.picture, prompt), photo.embeddings)

    def propose_masks(self, photo: Photo) -> list[np.ndarray]:
        """The objects that the generator finds by itself; none where it is not sure."""
        masks, notes = self.find_masks(photo, Prompt())
        return [] if notes else masks

    def protect(
        self,
        photo: Photo,
        prompt: Prompt,
        epsilon: float | None = None,
        epsilon_background: float | None = None,
        keep_exif: bool = False,
    ) -> Protected:
        """Protect an opened photo.

        Args:
            photo: from `open`.
            prompt: what to protect.
            epsilon: budget inside the masks, in grey levels of 255; the model's by default.
            epsilon_background: budget outside; by default as much smaller as the model's is.
            keep_exif: leave camera, date and place in the file.

        Raises:
            ValueError: a budget or prompt that makes no sense.
        """
        shares = shares_of(epsilon, epsilon_background)
        picture = photo.picture if keep_exif else replace(photo.picture, exif=None)
        job = self.protector.prepare(picture, prompt, *shares)
        return self.protector.apply(job, self._decode(job, photo.embeddings))

    def command(self, photo: Photo, marks: Marks, epsilon: float) -> str:
        """What gives the same pixels on the command line."""
        stem = file_stem(photo.name)
        # A name that begins with a hyphen would be read as an option.
        source = f"./{photo.original}" if photo.original.startswith("-") else photo.original
        parts = ["unseg", "protect", source, "-o", f"{stem}_protected.png", *marks.arguments(f"{stem}_mask.png")]
        parts += ["--epsilon", f"{epsilon:g}"]
        return shlex.join(parts + (["--model", self.checkpoint] if self.checkpoint else []))

    @property
    def finds_objects(self) -> bool:
        """Whether the generator looks for objects by itself, at once and with some success."""
        return self.protector.model.object_finder is not None

    @property
    def epsilon(self) -> float:
        """The generator's own budget, in grey levels of 255."""
        return self.protector.model.config.epsilon * 255

    @property
    def card(self) -> Path | str:
        """Where the generator's card is: a folder, or a Hub id."""
        return default_checkpoint() if self.checkpoint is None else self.checkpoint

    def _file(self, path: str | Path, name: str) -> io.BytesIO:
        """The bytes of an upload, under the name that its user knows."""
        if not Path(path).is_file():
            raise ImageFileError(f"{name}: it was forgotten after a while; upload it again")
        size = Path(path).stat().st_size
        if size > self.limits.file_bytes:
            raise ImageFileError(
                f"{name}: {size / 2**20:.0f} MB, and at most {self.limits.file_bytes / 2**20:.0f} MB are accepted; "
                "make it smaller or crop it"
            )
        stream = io.BytesIO(Path(path).read_bytes())
        stream.name = name
        return stream

    def _encode(self, job: Job) -> UnSegImageEmbeddings:
        return _moved(self.protector.encode([job])[0], torch.device("cpu"))

    def _find_masks(self, job: Job, embeddings: UnSegImageEmbeddings) -> tuple[list[np.ndarray], list[str]]:
        return self.protector.find_masks(job, _moved(embeddings, self.protector.model.device))

    def _decode(self, job: Job, embeddings: UnSegImageEmbeddings) -> Decoded:
        return self.protector.decode(job, _moved(embeddings, self.protector.model.device))


def _moved(embeddings: UnSegImageEmbeddings, device: torch.device) -> UnSegImageEmbeddings:
    return UnSegImageEmbeddings(*(tensor.to(device) for tensor in embeddings.to_tuple()))


def file_stem(name: str) -> str:
    """A file name without folder, suffix and anything that a shell or file system could take amiss."""
    last = re.split(r"[\\/]", name)[-1]
    stem = unicodedata.normalize("NFC", Path(last).stem)
    # Letters, numbers and what is written on or between them: vowels in Hindi or Thai are no letters to `\w`.
    kept = (c if c in "._-" or unicodedata.category(c)[0] in "LMN" else " " for c in stem)
    return re.sub(" +", "_", "".join(kept)).strip("._-")[:60] or "photo"


def percent(share: float) -> str:
    """A share in words that a little is not nothing in, and nearly all not all."""
    if 0 < share < 0.005:
        return "under 1%"
    return "over 99%" if 0.995 <= share < 1 else f"{share:.0%}"


def report_rows(protected: Protected, report: dict[str, Any]) -> list[tuple[str, str]]:
    """The report of a protected photo in words, as (what, figure)."""
    top = protected.original.max_value
    inside, outside = (
        level * 255 / top for level in whole_levels(top, protected.epsilon, protected.epsilon_background)
    )
    psnr = "no difference" if report["psnr"] is None else f"{report['psnr']:.1f} dB (higher is closer to the original)"
    elsewhere = ("Largest change elsewhere", f"{report['max_noise_background']:.4g} of 255 (bound: {outside:.4g})")
    return [
        ("Largest change where protected", f"{report['max_noise']:.4g} of 255 grey levels (bound: {inside:.4g})"),
        *([] if protected.region.all() else [elsewhere]),
        ("Protected part", f"{percent(report['protected_share'])} of the photo"),
        ("PSNR", psnr),
        ("SSIM", f"{report['ssim']:.4f} (1 is the original)"),
        ("Size", f"{report['width']} x {report['height']} pixels"),
    ]
