"""Protecting images: the only place where noise meets pixels."""

import functools
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from .image_files import Picture, from_array, from_pil, read, read_mask
from .modeling_unseg import UnSegImageEmbeddings, UnSegModel
from .object_finder import find_objects
from .processing_unseg import FullSizeNoise, UnSegProcessor
from .proposals import PROMPT_CHUNK, TRUSTED_IOU, masks_at, propose, segment
from .recorded_encoder import RecordedEncoder

MODES = ("union", "per_segment")
TINTS = ("auto", "always", "never")
ALL_OVER = (
    "noise all over the image does not say where its objects are, and models learn them much as from clean images: "
    "mark the objects, if only by a box around each"
)
UNSURE = (
    "no object stands out: what is most likely one is protected; look at where the noise is, and mark the objects if "
    "it is not on them"
)
GREY = 3 / 255  # of an image's range, between its channels
LOW, LOW_IN_GREY = 0.8, 2  # waves: of less height they say little, and in images without colour
LOW_OF_MANY, MANY = 2.5, 8  # waves, and so many parts: what cells are like under a microscope, and hardly any photo
LEAST_SPREAD = 4 / 255  # of an image's range: colours that vary less hide a tint no less
CLEARLY = 1.1  # times as far
SMALL_BUDGET = 6 / 255  # of an image's range: what is below is small
TEXTURE_CELLS = 48  # down an image and across it
TEXTURED = 6 / 255  # deviation of grey from a plane, of its range, from which noise is hidden
SMOOTH = 1 / 3  # of that, up to which it shows
FLAT = 0.5 / 255  # deviation below which there is no texture at all
SHARED = ("revision", "token", "cache_dir", "local_files_only", "subfolder")  # by model and processor
STRIP = 2**17  # pixels of a large photo that are worked on at a time
ImageInput = str | os.PathLike | bytes | BinaryIO | Image.Image | np.ndarray | torch.Tensor | Picture


def default_checkpoint() -> Path:
    """Folder of the generator that comes with the package."""
    return Path(__file__).parent / "checkpoints" / "unseg-tiny"


def check_model_name(name: str | os.PathLike) -> None:
    """ValueError for what is no folder, and cannot be an id of the Hub."""
    if os.path.isdir(name):
        return
    try:
        validate_repo_id(str(name))
    except HFValidationError as error:
        raise ValueError(f"{name}: no such folder, and no id of the Hub, which is like 'owner/name'") from error


@dataclass(frozen=True)
class Prompt:
    """What to protect in one image: at most one of `mask`, `masks`, `label_map`, `boxes`, `points` and `whole_image`;
    with none of them the generator looks for objects itself: its object finder, or SAM where it has none.

    Args:
        mask: a mask image, numeric or boolean: PIL image, array or tensor `(height, width)`, or a file. Whole numbers
            are inside where they are not 0, floats where they are at least 0.5, JPEG files where they are at least
            128.
        masks: several of those.
        classes: number of the class of each of `masks`, for "per_segment".
        label_map: a label image; every label becomes a mask, except `ignore_labels`, and is its class.
        ignore_labels: labels of `label_map` that are no objects.
        boxes: `[x0, y0, x1, y1]` each, in pixels of the upright image; SAM finds the object in it. Where it finds
            none, all of the box is protected: of photographs a model learns hardly more from that than from masks.
        points: `[x, y]` each, in pixels of the upright image: on the object that SAM finds there, or on those that the
            object finder, where there is one, has found in the image.
        point_labels: 1 for a point on the object, 0 for one that is not; all 1 by default.
        whole_image: everything gets the full budget. It does not say where objects are: models learn them as before.
        mode: "union" prompts the generator once with all masks together (the paper's way), "per_segment" once with
            each mask, on the same image embedding. Where classes are known, each class gets a noise of its own then,
            the same in all images; if the generator has fewer noises than there are classes, some share one.
        tint: when masks without a class get a flat tint in place of the generator's noise, if it has one: "auto" where
            that says more ([`needs_tint`]), "always" (images of one channel excepted) or "never". All images of a data
            set should get the same: from a few that do not, a model learns what objects look like.

    Raises:
        ValueError: contradicting fields, naming them.
    """

    mask: Any = None
    masks: Sequence[Any] | None = None
    classes: Sequence[int] | None = None
    label_map: Any = None
    ignore_labels: Sequence[int] = (0, 255)
    boxes: Sequence[Sequence[float]] | None = None
    points: Sequence[Sequence[float]] | None = None
    point_labels: Sequence[int] | None = None
    whole_image: bool = False
    mode: str = "union"
    tint: str = "auto"

    def __post_init__(self):
        given = [n for n in ("mask", "masks", "label_map", "boxes", "points") if getattr(self, n) is not None]
        given += ["whole_image"] if self.whole_image else []
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} were given: pass one kind of prompt")
        if self.mode not in MODES:
            raise ValueError(f"mode={self.mode!r}: must be one of {', '.join(MODES)}")
        if self.tint not in TINTS:
            raise ValueError(f"tint={self.tint!r}: must be one of {', '.join(TINTS)}")
        if self.classes is not None:
            object.__setattr__(self, "classes", _class_numbers(self.classes, self.masks))
        for name, width in (("boxes", 4), ("points", 2)):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _coordinates(name, getattr(self, name), width))
        for x0, y0, x1, y1 in self.boxes or ():
            if not (x0 < x1 and y0 < y1):
                raise ValueError(f"box {[x0, y0, x1, y1]}: needs x0 < x1 and y0 < y1, in pixels")
        labels = [1] * len(self.points or ()) if self.point_labels is None else np.ravel(self.point_labels).tolist()
        if len(labels) != len(self.points or ()):
            raise ValueError(f"{len(labels)} point_labels for {len(self.points or ())} points: pass one each")
        if labels and (set(labels) - {0, 1} or 1 not in labels):
            raise ValueError(f"point_labels={labels}: 1 is on the object, 0 is not, and at least one must be on it")
        object.__setattr__(self, "point_labels", [int(label) for label in labels])
        object.__setattr__(self, "ignore_labels", tuple(np.ravel(self.ignore_labels).tolist()))

    def check_inside(self, height: int, width: int) -> None:
        """ValueError for a box that misses an image of this size, or a point outside it."""
        for x0, y0, x1, y1 in self.boxes or ():
            if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
                raise ValueError(f"box {[x0, y0, x1, y1]} lies outside the image of {width} x {height} pixels")
        for x, y in self.points or ():
            if not (0 <= x <= width and 0 <= y <= height):
                raise ValueError(f"point {[x, y]} lies outside the image of {width} x {height} pixels")


def _class_numbers(classes, masks) -> list[int]:
    numbers = np.asarray(classes)
    if numbers.shape != (len(masks or ()),) or numbers.dtype.kind not in "iu":
        raise ValueError(
            f"classes={classes!r} for {len(masks or ())} masks: pass `masks`, and a whole number for each"
        )
    return numbers.tolist()


def _coordinates(name: str, values, width: int) -> list[list[float]]:
    """Boxes or points of any numeric kind as nested lists of finite numbers."""
    try:
        array = np.asarray([[float(number) for number in item] for item in values])
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 2 or array.shape[1] != width or len(array) == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name}={values!r}: pass a list of {width} finite numbers each, in pixels")
    return array.tolist()


@dataclass(frozen=True, eq=False)
class Protected:
    """A protected image beside its original.

    Args:
        original, picture: the upright original and the protected picture, of the same shape and type.
        region: `(height, width)` bool, where the full budget applies.
        epsilon, epsilon_background: the budget, as shares of the pixel range.
        masks: number of masks that made up the region.
        tinted: whether the noise of masks without a class is a tint (see [`Prompt`]); None where there is no such.
        seconds: time it took, reading included.
        notes: what a user should know, in plain words.
    """

    original: Picture
    picture: Picture
    region: np.ndarray
    epsilon: float
    epsilon_background: float
    masks: int
    tinted: bool | None
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def image(self) -> Image.Image:
        """The protected picture as a fresh PIL image, which `datasets` stores as PNG."""
        return self.picture.to_pil()

    @property
    def share(self) -> float:
        """Of the image that the region covers, 0 to 1."""
        return float(self.region.mean())

    @functools.cached_property
    def report(self) -> dict[str, Any]:
        """Measured on the pixels, ready for JSON: `max_noise` and `max_noise_background` in grey levels of 255
        (inside and outside the region), `psnr` in dB (None when nothing changed), `ssim`, and the settings."""
        return {
            **compare(self.original, self.picture, self.region),
            "epsilon": self.epsilon * 255,
            "epsilon_background": self.epsilon_background * 255,
            "masks": self.masks,
            "tinted": self.tinted,
            "protected_share": self.share,
            "height": self.picture.height,
            "width": self.picture.width,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


class Protector:
    """Protects images with a generator; what the pipeline, the command line and the demo all call.

    Args:
        model: the generator; it is put into evaluation mode.
        processor: its processor.

    Raises:
        ValueError: a model with an object finder, and a processor that does not stretch images.

    Example:

    ```python
    >>> from unseg_hf import Protector

    >>> protector = Protector.from_pretrained()
    >>> protected = protector.protect("photo.jpg", mask="photo_mask.png")
    >>> protected.image.save("protected.png")
    ```
    """

    def __init__(self, model: UnSegModel, processor: UnSegProcessor):
        if model.object_finder is not None and not processor.stretch:
            raise ValueError(
                "the object finder looks at stretched images, and the processor pads them: take the one that was "
                "saved with the model, or stretch=True"
            )
        self.model, self.processor = model.eval(), processor
        self._recorded: RecordedEncoder | None = None

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike | None = None,
        device: str | torch.device = "cpu",
        bf16: bool = False,
        **kwargs,
    ) -> "Protector":
        """Load a generator: a folder, a Hub id, or by default the one in the package.

        Args:
            checkpoint: folder or Hub id.
            device: where it runs.
            bf16: encode images with products in bfloat16, which is fast where the device has units for it. Some
                pixels come out one grey level away from float32's.
            kwargs: passed on to `UnSegModel.from_pretrained` (`dtype`, `attn_implementation`, ...).

        Raises:
            ValueError: a checkpoint without a trained noise head, a plain SAM for example, or neither folder nor id.
        """
        checkpoint = default_checkpoint() if checkpoint is None else checkpoint
        check_model_name(checkpoint)
        model, loading = UnSegModel.from_pretrained(checkpoint, output_loading_info=True, **kwargs)
        if missing := loading["missing_keys"]:
            of_finder = all(name.startswith("object_finder.") for name in missing)
            remedy = (
                "in Python, object_finder_width=None does without its object finder" if of_finder else "train it first"
            )
            raise ValueError(
                f"{checkpoint} is no trained generator: {len(missing)} weights are missing, {min(missing)} among "
                f"them; {remedy}, or choose another checkpoint"
            )
        if bf16:
            model.encode_in_bf16()
        model = model.to(device)
        shared = {k: v for k, v in kwargs.items() if k in SHARED}
        return cls(model, UnSegProcessor.from_pretrained(checkpoint, **shared))

    def record_encoder(self) -> None:
        """From now on images are encoded by a recording ([`RecordedEncoder`]): faster where many follow each other.

        For a generator on a CUDA device whose weights stay where they are; nothing else may run there meanwhile.
        """
        self._recorded = RecordedEncoder(self.model)

    def protect(
        self,
        image: ImageInput,
        prompt: Prompt | None = None,
        *,
        epsilon: float | None = None,
        epsilon_background: float | None = None,
        **prompt_fields,
    ) -> Protected:
        """Protect one image.

        Args:
            image: PIL image; array `(height, width[, channels])`, uint8 in [0, 255], uint16 grey, or float in [0, 1];
                tensor `(channels, height, width)` of the same kinds; path, bytes or open file.
            prompt: what to protect; its fields may be passed by name instead (`mask=...`).
            epsilon: budget inside the masks, 0 to 1; the model's by default. Where the image is smooth no more than
                the model's `epsilon_smooth` is spent, of a budget of 6/255 or more.
            epsilon_background: the same outside, 0 to `epsilon`; by default as much smaller as the model's is
                ([`UnSegConfig.budget`]): nothing, for the embedded default.

        Returns:
            [`Protected`]; the bound has been checked on its pixels.

        Raises:
            ImageFileError: an image or mask that cannot be read, naming it.
            ValueError: a prompt or budget that makes no sense, naming it.
        """
        if prompt is not None and not isinstance(prompt, Prompt):
            raise ValueError(f"prompt is a {type(prompt).__name__}: pass a Prompt, or its fields by name (mask=...)")
        if prompt is not None and prompt_fields:
            raise ValueError(f"prompt and {', '.join(prompt_fields)} were given: pass one or the other")
        job = self.prepare(image, prompt or Prompt(**prompt_fields), epsilon, epsilon_background)
        return self.apply(job, self.decode(job, self.encode([job])[0]))

    def prepare(
        self, image: ImageInput, prompt: Prompt, epsilon: float | None = None, epsilon_background: float | None = None
    ) -> "Job":
        """The first step of `protect`: reads the image and checks what was asked for; nothing runs on the model."""
        start = time.perf_counter()
        epsilon, epsilon_background = self.model.config.budget(epsilon, epsilon_background)
        picture = read_any(image)
        prompt.check_inside(picture.height, picture.width)
        masks, classes = given_masks(prompt, (picture.height, picture.width))
        features = self.processor(
            picture.rgb8(),
            input_boxes=None if prompt.boxes is None else [prompt.boxes],
            input_points=None if prompt.points is None else [[prompt.points]],
            input_labels=None if prompt.points is None else [[prompt.point_labels]],
        )
        seconds = time.perf_counter() - start
        return Job(picture, prompt, epsilon, epsilon_background, masks, classes, features, seconds)

    @torch.inference_mode()
    def encode(self, jobs: Sequence["Job"]) -> list[UnSegImageEmbeddings]:
        """The second step: the embeddings of the jobs' images, in one batch."""
        pixels = torch.cat([job.features["pixel_values"] for job in jobs]).to(self.model.device)
        start = time.perf_counter()
        embeddings = (self._recorded or self.model.get_image_embeddings)(pixels)
        for job in jobs:
            job.seconds += (time.perf_counter() - start) / len(jobs)
        return [embeddings.of_image(i) for i in range(len(jobs))]

    @torch.inference_mode()
    def decode(self, job: "Job", embeddings: UnSegImageEmbeddings) -> "Decoded":
        """The third step: finds the masks if none were given, and makes the noise. The last that runs on the model."""
        start = time.perf_counter()
        masks, found = self.find_masks(job, embeddings)
        region = masks[0].copy()
        for mask in masks[1:]:
            region |= mask
        if not region.any():
            what = "the background budget applies everywhere" if job.epsilon_background else "nothing is protected"
            found.append(f"the mask is empty: {what}")
        elif job.epsilon and self._all_over(job, region):
            found.append(ALL_OVER)
        noise, tinted = self._noise(job, embeddings, masks, region)
        if job.prompt.tint == "always" and tinted is False and region.any():
            has_none = "one channel takes none" if self.model.config.tint_codes else "this generator has none"
            found.append(f"it has noise that is no tint: {has_none}")
        job.seconds += time.perf_counter() - start
        return Decoded(noise, tinted, region, len(masks), (*job.picture.notes, *found))

    @staticmethod
    def _all_over(job: "Job", region: np.ndarray) -> bool:
        """Whether nothing tells one part of the image's noise from another: neither its budget nor its kind."""
        of_classes = job.prompt.mode == "per_segment" and job.classes is not None
        if region.all():
            return not (of_classes and len(set(job.classes)) > 1)
        return job.epsilon_background == job.epsilon and not of_classes

    def apply(self, job: "Job", decoded: "Decoded") -> Protected:
        """The last step: adds the noise at the image's size and checks the bound."""
        start = time.perf_counter()
        budget = (job.epsilon, job.epsilon_background)
        ceiling = None
        smooth = self.model.config.epsilon_smooth
        # A tint and the noises of classes stay whole, and a small budget is spent everywhere: victims would not find
        # what smooth parts leave of it.
        softened = decoded.tinted is False and job.epsilon >= SMALL_BUDGET
        if softened and smooth is not None and smooth < job.epsilon:
            ceiling = ceiling_of(job.picture.pixels, decoded.region, job.epsilon, smooth)
        protected = apply_noise(job.picture.pixels, decoded.noise, decoded.region, *budget, ceiling)
        largest = _check_bound(job.picture.pixels, protected, decoded.region, *budget)
        notes = decoded.notes
        if budget[0] and decoded.region.any() and not largest:
            notes = (*notes, "no pixel was changed: the image is too small, or its budget below one level")
        return Protected(
            original=job.picture,
            picture=job.picture.with_pixels(protected),
            region=decoded.region,
            epsilon=job.epsilon,
            epsilon_background=job.epsilon_background,
            masks=decoded.masks,
            tinted=decoded.tinted if decoded.region.any() else None,
            seconds=job.seconds + time.perf_counter() - start,
            notes=notes,
        )

    @torch.inference_mode()
    def find_masks(self, job: "Job", embeddings: UnSegImageEmbeddings) -> tuple[list[np.ndarray], list[str]]:
        """What `decode` will make noise for: `(height, width)` bool masks, and what a user should know of them."""
        notes: list[str] = []
        return (self._find_masks(job, embeddings, notes) if job.masks is None else job.masks), notes

    def propose_masks(self, image: ImageInput) -> list[np.ndarray]:
        """What the generator finds by itself, with its object finder, or with SAM where it has none.

        Returns:
            `(height, width)` bool arrays: of a finder largest first, of SAM best first; none where it is not sure.
        """
        job = self.prepare(image, Prompt())
        masks, notes = self.find_masks(job, self.encode([job])[0])
        return [] if notes else masks

    def _find_masks(self, job: "Job", embeddings: UnSegImageEmbeddings, notes: list[str]) -> list[np.ndarray]:
        """Masks for boxes, points, or no prompt at all; says in `notes` where nothing was found."""
        if job.prompt.boxes is not None:
            return self._in_boxes(job, embeddings, notes)
        if job.prompt.points is not None:
            masks, where = self._at_points(job, embeddings, notes), " at the points"
        else:
            masks, sure = self._proposed(job, embeddings)
            where = ""
            if masks and not sure:
                notes.append(UNSURE)
        if not masks:
            notes.append(f"no object was found{where}: the whole image gets noise")
        return masks or [np.ones((job.picture.height, job.picture.width), dtype=bool)]

    def _proposed(self, job: "Job", embeddings: UnSegImageEmbeddings) -> tuple[list[np.ndarray], bool]:
        """What is found without a prompt, maybe nothing, and whether it is to be trusted."""
        if self.model.object_finder is None:
            reshaped = tuple(job.features["reshaped_input_sizes"][0].tolist())
            logits, sure = propose(self.model, embeddings, reshaped), True
        else:
            pixels = job.features["pixel_values"].to(self.model.device, self.model.dtype)
            logits, sure = find_objects(self.model.object_finder, pixels)
        # In images of a few pixels small objects vanish.
        return [mask for mask in self._at_full_size(job, logits) if mask.any()], sure

    def _at_points(self, job: "Job", embeddings: UnSegImageEmbeddings, notes: list[str]) -> list[np.ndarray]:
        """One mask of what the points are on, or nothing."""
        if self.model.object_finder is None:
            masks, found = self._segmented(job, embeddings)
            return masks if found[0] else []
        # A finder takes no points: they choose from what it finds.
        x, y = np.array(job.prompt.points).T.astype(int)
        x, y = x.clip(max=job.picture.width - 1), y.clip(max=job.picture.height - 1)
        masks, _ = self._proposed(job, embeddings)
        on = np.array([mask[y, x] for mask in masks], bool).reshape(len(masks), len(x))
        wanted = np.array(job.prompt.point_labels, bool)
        hit, excluded = (on & wanted).any(axis=1), (on & ~wanted).any(axis=1)
        if (hit & excluded).any():
            notes.append(
                "what was found at a point is at one that is not on the object, too, and is left out: give a box"
            )
        chosen = [mask for mask, kept in zip(masks, hit & ~excluded, strict=True) if kept]
        if chosen and not on.any(axis=0)[wanted].all():
            notes.append("nothing was found at one of the points: give a box around what it is on")
        return [np.logical_or.reduce(chosen)] if chosen else []

    def _in_boxes(self, job: "Job", embeddings: UnSegImageEmbeddings, notes: list[str]) -> list[np.ndarray]:
        masks, found = self._segmented(job, embeddings)
        for i, corners in enumerate(job.prompt.boxes):
            box = mask_of_box(corners, (job.picture.height, job.picture.width))
            masks[i] &= box
            if not (found[i] and masks[i].any()):
                notes.append("no object was found in a box: all of the box is protected")
                masks[i] = box
        return masks

    def _segmented(self, job: "Job", embeddings: UnSegImageEmbeddings) -> tuple[list[np.ndarray], list[bool]]:
        """SAM's mask for each prompt, and whether it is to be trusted."""
        prompts = {k: v for k, v in job.features.items() if k in ("input_boxes", "input_points", "input_labels")}
        logits, ious = segment(self.model, embeddings, **prompts)
        masks = self._at_full_size(job, logits)
        return masks, [bool(iou >= TRUSTED_IOU) and mask.any() for iou, mask in zip(ious, masks, strict=True)]

    def _at_full_size(self, job: "Job", logits: torch.Tensor) -> list[np.ndarray]:
        reshaped = tuple(job.features["reshaped_input_sizes"][0].tolist())
        return list(masks_at(logits, self.processor.target_size, reshaped, (job.picture.height, job.picture.width)))

    def _noise(
        self, job: "Job", embeddings, masks: list[np.ndarray], region: np.ndarray
    ) -> "tuple[FullSizeNoise | NoiseOfSegments, bool | None]":
        """Noise whose rows are `(rows, width, 3)` float32 in [-1, 1], and whether it is a tint; None if it is that of
        classes."""
        apart = job.prompt.mode == "per_segment" and (len(masks) > 1 or job.classes is not None)
        inside = [index for index, mask in enumerate(masks) if mask.any()] if apart else []
        segments = [(masks[index], _extent(masks[index])) for index in inside]
        sizes = tuple(job.features[name][0].tolist() for name in ("original_sizes", "reshaped_input_sizes"))
        drawn = torch.cat([self.processor.mask_prompts(m, sizes[1]) for m in (region, *(m for m, _ in segments))])
        cell = self.processor.target_size // embeddings.image_embeddings.shape[-1]
        # Of masks without a class, and of what lies around all masks.
        codes = self._codes_of_masks(job, region, cell * sizes[0][0] / sizes[1][0])
        noise = self._decoded(embeddings, drawn[:1].expand(len(codes), -1, -1), codes, None)
        chosen = standing_out(job.picture.pixels, noise.float().mean(dim=(2, 3)).numpy()) if len(codes) > 1 else 0
        noise = [noise[chosen, None]]
        own_codes = [codes[chosen] if job.classes is None else self._code_of_class(job.classes[i]) for i in inside]
        boxes = [self.processor.noise_box(extent, *sizes, cell) for _, extent in segments]
        for start in range(0, len(boxes), PROMPT_CHUNK):
            chunk = slice(start, start + PROMPT_CHUNK)
            noise.append(self._decoded(embeddings, drawn[1:][chunk], own_codes[chunk], boxes[chunk]))
        noise = torch.cat(noise)
        if not torch.isfinite(noise).all():
            raise FloatingPointError(
                "the generator's noise is not finite: its weights are damaged, or its dtype too small"
            )

        everywhere, *own = (self.processor.full_size_noise(one, *sizes) for one in noise)
        tinted = codes[chosen] in (self.model.config.tint_codes or ())
        if not segments:
            return everywhere, tinted
        own = [(*segment, one) for segment, one in zip(segments, own, strict=True)]
        return NoiseOfSegments(everywhere, own), tinted if job.classes is None else None

    def _codes_of_masks(self, job: "Job", region: np.ndarray, patch: float) -> list[int]:
        """Those that are in question for masks without a class; a patch has so many pixels of height."""
        config = self.model.config
        pixels, tint = job.picture.pixels, job.prompt.tint
        # Of one channel there is nothing to tint.
        possible = config.tint_codes and tint != "never" and pixels.shape[2] > 1
        if possible and (tint == "always" or needs_tint(pixels, region, patch)):
            return list(config.tint_codes)
        return [config.faint_code if config.faint_code is not None and job.epsilon < SMALL_BUDGET else 0]

    def _code_of_class(self, class_id: int) -> int:
        of_classes = self.model.config.noise_codes - 1
        return 1 + class_id % of_classes if of_classes else 0

    def _decoded(
        self, embeddings, masks: torch.Tensor, codes: list[int], boxes: list[tuple[int, int, int, int]] | None
    ) -> torch.Tensor:
        """Noise `(prompts, 3, h, w)` over the padded square for mask prompts `(prompts, h, w)` and their codes."""
        prompts = {"input_masks": masks[None], "codes": torch.tensor([codes])}
        prompts = {name: value.to(self.model.device) for name, value in prompts.items()}
        return self.model(image_embeddings=embeddings, noise_boxes=boxes, **prompts).noise[0].cpu()


class NoiseOfSegments:
    """Outside all segments the noise of their union, and in each its own; small ones lie over large ones.

    Args:
        everywhere: noise of the union.
        segments: `(height, width)` bool, (top, bottom, left, right) around what is inside, and noise of each.
    """

    def __init__(
        self,
        everywhere: FullSizeNoise,
        segments: Sequence[tuple[np.ndarray, tuple[int, int, int, int], FullSizeNoise]],
    ):
        self._everywhere = everywhere
        self._largest_first = sorted(segments, key=lambda segment: -np.count_nonzero(segment[0]))

    def __getitem__(self, rows: slice) -> np.ndarray:
        """`(rows, width, 3)` float32 in [-1, 1]."""
        noise = self._everywhere[rows]
        for mask, (top, bottom, left, right), own in self._largest_first:
            first, last = max(rows.start, top), min(rows.start + len(noise), bottom)
            if first < last:
                part = slice(first, last), slice(left, right)
                inside = mask[part]
                noise[first - rows.start : last - rows.start, left:right][inside] = own[part][inside]
        return noise


def _extent(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) around what is inside; there is something."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


@dataclass(eq=False)
class Job:
    """One image on its way through a [`Protector`]; `masks` is None where they have to be found, and `classes`, of
    each mask, where they are not known."""

    picture: Picture
    prompt: Prompt
    epsilon: float
    epsilon_background: float
    masks: list[np.ndarray] | None
    classes: list[int] | None
    features: Any
    seconds: float


@dataclass(eq=False)
class Decoded:
    """What the model said of a [`Job`]: noise in [-1, 1], whose rows at the image's size are made when they are asked
    for, whether it is a tint (None if it is that of classes), the union `(height, width)` bool of its masks and their
    number, and notes for the user."""

    noise: "FullSizeNoise | NoiseOfSegments"
    tinted: bool | None
    region: np.ndarray
    masks: int
    notes: tuple[str, ...]


def needs_tint(pixels: np.ndarray, region: np.ndarray, wave: float) -> bool:
    """Whether a tint says more than waves: the region is lower than [`LOW`] waves, [`LOW_IN_GREY`] without colour, or
    [`LOW_OF_MANY`] if it has [`MANY`] parts or more, less their holes.

    The images of a data set should all get the same noise: from a few that do not, a model learns what objects look
    like, as from clean ones. So the limits are such that photographs hardly ever get a tint, and cells nearly always.

    Args:
        pixels: `(height, width, 3)` uint8 or uint16.
        region: `(height, width)` bool.
        wave: height of a wave in pixels.
    """
    waves = typical_height(region) / wave
    return (
        waves < LOW
        or (waves < LOW_IN_GREY and without_colour(pixels))
        or (waves < LOW_OF_MANY and parts_less_holes(region) >= MANY)
    )


def standing_out(pixels: np.ndarray, tints: np.ndarray) -> int:
    """Index of the tint that is least like an image's own colours: the first, unless another is 1.1 times as far out.

    How far out is Mahalanobis' distance, given how the image's pixels vary: in a retina, whose pixels differ in how
    red they are, red is not far.

    Args:
        pixels: `(height, width, 3)` uint8 or uint16.
        tints: `(tints, 3)`, changes of red, green and blue, all in one unit.
    """
    few = _thinned(pixels).reshape(-1, 3) / np.iinfo(pixels.dtype).max
    spread = np.cov(few, rowvar=False, bias=True) + LEAST_SPREAD**2 * np.eye(3)
    squares = np.einsum("tc,cd,td->t", tints, np.linalg.inv(spread), tints)
    return 0 if squares.max() < CLEARLY**2 * squares[0] else int(squares.argmax())


def ceiling_of(pixels: np.ndarray, region: np.ndarray, epsilon: float, epsilon_smooth: float) -> FullSizeNoise:
    """The largest change that hides in each part of an image: `epsilon_smooth` where it is smooth, `epsilon` where its
    texture covers that much; `(height, width, 1)`, in parts, as shares of the pixel range.

    About a quarter of the region gets `epsilon`: of an object that is smooth all over, but not flat, the roughest.

    Args:
        pixels: `(height, width, channels)` uint8 or uint16.
        region: `(height, width)` bool.
        epsilon, epsilon_smooth: shares of the pixel range, the second below the first.
    """
    rough = texture(pixels)
    few = _thinned(region)
    few = few if few.any() else region  # thin lines may lie between
    covered = F.adaptive_avg_pool2d(torch.from_numpy(few.astype(np.float32))[None], rough.shape)[0].numpy()
    roughest = np.quantile(rough[covered >= min(0.5, covered.max())], 0.75)
    share = ((rough / np.clip(roughest, FLAT, TEXTURED) - SMOOTH) / (1 - SMOOTH)).clip(0, 1)
    largest = (1 - share) * epsilon_smooth + share * epsilon
    return FullSizeNoise(largest[..., None].astype(np.float32), [(largest.shape, pixels.shape[:2])])


def texture(pixels: np.ndarray) -> np.ndarray:
    """How rough an image is: in each of 48 x 48 cells, of 4 pixels at least, and its neighbours the standard deviation
    of its grey from a plane (the root of the mean variance): the slopes of shading hide no noise.

    Args:
        pixels: `(height, width, channels)` uint8 or uint16.

    Returns:
        `(rows, columns)` float64, as shares of the pixel range.
    """
    # In float32 the differences below would leave a texture to what is flat.
    grey = torch.from_numpy(_thinned(pixels).mean(axis=2, dtype=np.float64) / np.iinfo(pixels.dtype).max)
    cells = [max(1, min(TEXTURE_CELLS, side // 4)) for side in grey.shape]

    def covariance(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        products, ones, others = F.adaptive_avg_pool2d(torch.stack([one * other, one, other]), cells)
        return products - ones * others

    variance = covariance(grey, grey)
    # A plane fits best whose two slopes do: over a rectangle they have nothing to do with each other.
    for places in torch.meshgrid(*(torch.arange(side, dtype=grey.dtype) for side in grey.shape), indexing="ij"):
        variance -= covariance(grey, places) ** 2 / covariance(places, places).clamp(min=1e-9)
    variance = variance.clamp(min=0)[None, None]
    return F.avg_pool2d(variance, 3, stride=1, padding=1, count_include_pad=False).sqrt()[0, 0].numpy()


def typical_height(region: np.ndarray) -> float:
    """Half of a `(height, width)` bool region lies in columns' runs of at most so many pixels; infinite if empty."""
    # Runs begin and end where a column, with nothing before and after it, changes.
    changes = np.flatnonzero(np.diff(np.pad(region.T, ((0, 0), (1, 1))), axis=1))
    runs = np.sort(changes[1::2] - changes[::2])
    return float(runs[np.searchsorted(np.cumsum(runs), runs.sum() / 2)]) if len(runs) else float("inf")


def parts_less_holes(region: np.ndarray) -> int:
    """Euler's number of a `(height, width)` bool region whose pixels hang together at corners, too, counted from the
    windows of 2 x 2 pixels (Gray, "Local properties of binary images in two dimensions", 1971)."""
    around = np.pad(_thinned(region), 1).view(np.uint8)
    above, below = around[:-1], around[1:]
    inside = above[:, :-1] + above[:, 1:] + below[:, :-1] + below[:, 1:]
    diagonal = (inside == 2) & (above[:, :-1] == below[:, 1:])
    corners = np.count_nonzero(inside == 1) - np.count_nonzero(inside == 3)
    return (corners - 2 * np.count_nonzero(diagonal)) // 4


def without_colour(pixels: np.ndarray) -> bool:
    """Whether an image of three channels, `(height, width, channels)` uint8 or uint16, is grey all the same.

    Its channels differ by less than [`GREY`] on average: what JPEG leaves of an image that was grey. An image of one
    channel is not: nothing can be told from its colour.
    """
    if pixels.shape[2] < 3:
        return False
    # numpy's own maximum over a last axis of three takes ten times as long.
    few = np.moveaxis(_thinned(pixels), 2, 0)
    spread = functools.reduce(np.maximum, few) - functools.reduce(np.minimum, few)
    return float(spread.mean()) < GREY * np.iinfo(pixels.dtype).max


def _thinned(pixels: np.ndarray) -> np.ndarray:
    """At most 512 rows and columns of an image, which tell its colours as well as all do."""
    height, width = pixels.shape[:2]
    return pixels[:: 1 + height // 512, :: 1 + width // 512]


def apply_noise(
    pixels: np.ndarray,
    noise: "np.ndarray | FullSizeNoise | NoiseOfSegments",
    region: np.ndarray,
    epsilon: float,
    epsilon_background: float,
    ceiling: FullSizeNoise | None = None,
) -> np.ndarray:
    """Add noise within a budget.

    Args:
        pixels: `(height, width, channels)`, uint8 or uint16; one channel gets green's noise, of which most is seen in
            grey: the mean of three channels of colour would leave little.
        noise: `(height, width, 3)` float in [-1, 1]; an array, or what gives its rows when they are asked for.
        region: `(height, width)` bool.
        epsilon, epsilon_background: largest change inside and outside the region, as shares of the pixel range.
        ceiling: what noise is scaled to where that is less, `(height, width, 1)`, as a share of the pixel range.

    Returns:
        Pixels of the same shape and type; no value differs by more than the budget, after rounding and clipping.
    """
    top = np.iinfo(pixels.dtype).max
    shares = np.float32(epsilon * top), np.float32(epsilon_background * top)
    # Whole numbers this small are exact in float32.
    largest = tuple(np.float32(level) for level in whole_levels(top, epsilon, epsilon_background))
    protected = np.empty_like(pixels)
    for part in _strips(pixels):
        scale, limit = np.where(region[part], *shares), np.where(region[part], *largest)
        if ceiling is not None:
            scale = np.minimum(scale, ceiling[part][:, :, 0] * np.float32(top))
        strip = noise[part]
        if pixels.shape[2] == 1:
            strip = strip[:, :, 1:2]
        # A channel at a time: numpy is slow where an innermost axis is as short as three.
        for channel in range(pixels.shape[2]):
            delta = strip[:, :, channel] * scale
            np.rint(delta, out=delta)
            np.clip(delta, -limit, limit, out=delta)
            delta += pixels[part, :, channel]
            protected[part, :, channel] = np.clip(delta, 0, top, out=delta)
    return protected


def _strips(pixels: np.ndarray) -> Iterator[slice]:
    """Rows of a `(height, width, ...)` array, few at a time: float copies of a large photo take many times its memory,
    and those of a strip stay in the processor's cache."""
    rows = max(1, STRIP // pixels.shape[1])
    return (slice(start, min(start + rows, len(pixels))) for start in range(0, len(pixels), rows))


def whole_levels(top: int, epsilon: float, epsilon_background: float) -> tuple[int, int]:
    """The budget in whole steps of a pixel range of 0 to `top`; rounding may not add to it."""
    return int(epsilon * top + 1e-6), int(epsilon_background * top + 1e-6)


def _check_bound(original, protected, region, epsilon, epsilon_background) -> int:
    """The largest change, in whole steps of the pixel range."""
    inside, outside = max_noise(original, protected, region)
    allowed = whole_levels(np.iinfo(original.dtype).max, epsilon, epsilon_background)
    if inside > allowed[0] or outside > allowed[1]:
        raise AssertionError(
            f"noise of {inside} and {outside} levels breaks the bound of {allowed}; please report this"
        )
    return max(inside, outside)


def max_noise(original: np.ndarray, protected: np.ndarray, region: np.ndarray) -> tuple[int, int]:
    """Largest absolute difference inside and outside a region, in steps of the pixels' own range."""
    largest = [0, 0]
    for part in _strips(original):
        a, b = original[part], protected[part]
        difference = np.maximum(a, b) - np.minimum(a, b)
        # As in `without_colour`.
        most = functools.reduce(np.maximum, (difference[:, :, channel] for channel in range(difference.shape[2])))
        for i, where in enumerate((region[part], ~region[part])):
            largest[i] = max(largest[i], int((most * where).max(initial=0)))
    return largest[0], largest[1]


def compare(original: Picture, protected: Picture, region: np.ndarray) -> dict[str, float | None]:
    """`max_noise`, `max_noise_background` in grey levels of 255, `psnr` in dB (None for equal pictures), `ssim`."""
    scale = 255 / original.max_value
    inside, outside = max_noise(original.pixels, protected.pixels, region)
    squares = 0.0
    for part in _strips(original.pixels):
        difference = (original.pixels[part].astype(np.float32) - protected.pixels[part]) * np.float32(scale)
        squares += float(np.square(difference).sum(dtype=np.float64))
    return {
        "max_noise": inside * scale,
        "max_noise_background": outside * scale,
        "psnr": None if squares == 0 else float(10 * np.log10(255**2 * original.pixels.size / squares)),
        "ssim": _ssim(original.pixels, protected.pixels, scale),
    }


def _ssim(original: np.ndarray, protected: np.ndarray, scale: float) -> float:
    """SSIM of two `(height, width, channels)` arrays that `scale` brings to [0, 255].

    The mean over pixels and channels, with a Gaussian window of 11 pixels and sigma 1.5; pictures end in reflections.
    """
    # The window must fit; smaller pictures are continued at their edges.
    short = [(0, max(0, 11 - side)) for side in original.shape[:2]]
    pictures = [
        np.pad(p, (*short, (0, 0)), mode="edge") if short != [(0, 0)] * 2 else p for p in (original, protected)
    ]
    height, width, channels = pictures[0].shape
    # torchmetrics has the same figure, but not the window as a column and a row, which is six times faster.
    window = torch.exp(-0.5 * ((torch.arange(11) - 5) / 1.5) ** 2)
    window = (window / window.sum()).expand(4 * channels, 1, 1, 11)
    total, step = 0.0, max(1, STRIP // width)
    for start in range(0, height, step):
        end = min(start + step, height)
        # With the five rows around them that their windows reach.
        rows = slice(max(0, start - 5), min(height, end + 5))
        a, b = (
            F.pad(
                torch.from_numpy(p[rows].astype(np.float32)).permute(2, 0, 1)[None].contiguous() * scale - 128,
                (5, 5, 5 - (start - rows.start), 5 - (rows.stop - end)),
                mode="reflect",
            )
            for p in pictures
        )
        maps = torch.cat([a, b, a * a + b * b, a * b], dim=1)
        maps = F.conv2d(F.conv2d(maps, window.mT, groups=4 * channels), window, groups=4 * channels)
        mean_a, mean_b, squares, products = maps[0].unflatten(0, (4, channels))
        variances = (squares - mean_a**2 - mean_b**2).clamp(min=0)
        covariance = products - mean_a * mean_b
        # Around 128 the squares above keep digits that they would lose around 0.
        mean_a, mean_b = mean_a + 128, mean_b + 128
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        similarity = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
        similarity /= (mean_a**2 + mean_b**2 + c1) * (variances + c2)
        total += similarity.sum(dtype=torch.float64).item()
    return total / pictures[0].size


def read_any(image: ImageInput) -> Picture:
    """A picture from whatever `Protector.protect` accepts."""
    if isinstance(image, Picture):
        return image
    if isinstance(image, Image.Image):
        return from_pil(image)
    if isinstance(image, torch.Tensor):
        if image.ndim == 3:
            if not 1 <= image.shape[0] <= 4:
                raise ValueError(f"a tensor of shape {tuple(image.shape)}: pass (channels, height, width)")
            image = image.permute(1, 2, 0)
        # NumPy has no bfloat16.
        return from_array(_numpy(image), "the tensor")
    if isinstance(image, np.ndarray):
        return from_array(image)
    return read(image)


def given_masks(prompt: Prompt, size: tuple[int, int]) -> tuple[list[np.ndarray] | None, list[int] | None]:
    """`(height, width)` bool masks of a prompt that holds them, else None, and their classes where it has those."""
    if prompt.whole_image:
        return [np.ones(size, dtype=bool)], None
    if prompt.mask is not None:
        return [read_region(prompt.mask, size)], None
    if prompt.masks is not None:
        if not len(prompt.masks):
            raise ValueError("masks is empty: pass at least one mask, or whole_image=True")
        return [read_region(mask, size) for mask in prompt.masks], prompt.classes
    if prompt.label_map is not None:
        labels = _labels(prompt.label_map, size)
        if labels.dtype.kind == "f":
            raise ValueError(f"a label map of {labels.dtype}: pass whole numbers, one for each object or class")
        found = [int(value) for value in np.unique(labels) if value not in prompt.ignore_labels]
        return ([labels == value for value in found], found) if found else ([np.zeros(size, dtype=bool)], None)
    return None, None


def mask_of_box(box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """The pixels that a box `[x0, y0, x1, y1]` touches, in an image of `(height, width)`: bool."""
    x0, y0, x1, y1 = (max(number, 0) for number in box)
    mask = np.zeros(size, dtype=bool)
    mask[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
    return mask


def read_region(mask, size: tuple[int, int]) -> np.ndarray:
    """A mask in any accepted form as `(height, width)` bool; ValueError unless it has that size."""
    values = _labels(mask, size)
    return values >= 0.5 if values.dtype.kind == "f" else values != 0


def _labels(mask, size: tuple[int, int]) -> np.ndarray:
    if isinstance(mask, torch.Tensor):
        values = _numpy(mask)
    elif isinstance(mask, Image.Image) and mask.mode == "F":
        values = np.asarray(mask)
    else:
        values = np.asarray(mask) if isinstance(mask, (np.ndarray, list)) else read_mask(mask)
    if values.dtype.kind not in "biuf" or (values.dtype.kind == "f" and not np.isfinite(values).all()):
        raise ValueError(f"a mask of {values.dtype}, or with values that are not finite: pass numbers or booleans")
    if values.shape[:1] == (1,) and values.shape[1:] == size:
        values = values[0]
    elif values.ndim == 3 and values.shape[:2] == size and (values == values[:, :, :1]).all():
        values = values[:, :, 0]  # one channel, or a grey picture in several
    if values.shape != size:
        raise ValueError(
            f"a mask of shape {values.shape} for an upright image of (height, width) {size}: both must be the same"
        )
    return values


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


__all__ = ["Job", "Prompt", "Protected", "Protector", "apply_noise", "compare", "default_checkpoint"]
