"""Protecting images: the only place where noise meets pixels."""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from .configuration_unseg import UnSegConfig
from .fidelity import compare, max_noise, strips
from .image_files import Picture, one_line, write
from .inputs import ImageInput, Prompt, given_masks, mask_of_box, read_any, union_of
from .modeling_unseg import UnSegImageEmbeddings, UnSegModel
from .noise_choice import SMALL_BUDGET, ceiling_of, needs_tint, standing_out
from .object_finder import find_objects
from .processing_unseg import FullSizeNoise, UnSegProcessor
from .proposals import PROMPT_CHUNK, TRUSTED_IOU, masks_at, propose, segment
from .recognition import Recognition, recognise
from .recorded_encoder import RecordedEncoder

ALL_OVER = (
    "noise all over the image does not say where its objects are, and models learn them much as from clean images: "
    "mark the objects, if only by a box around each"
)
UNSURE = (
    "no object stands out: what is most likely one is protected; look at where the noise is, and mark the objects if "
    "it is not on them"
)
WHOLE_BOX = "all of a box is protected: no object was made out in it"
PROTECTED_BEFORE = (
    "it seems to carry this noise already, and noise on noise is beyond the bound: if it was protected before, take "
    "its original"
)
SMALL_MODEL = 512  # pixels of its input's side
# Arguments of loading, by model and processor alike.
SHARED = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")


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


_lock, _inside, _before = threading.Lock(), 0, 1


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Meanwhile torch has one thread.

    Threads inside a small model wait for each other as long as they work, and many times as long on a machine that has
    other things to do; so do those beside a device. (A thread that begins to use torch meanwhile has one, too.)
    """
    global _inside, _before
    with _lock:
        own = torch.get_num_threads()
        _before = _before if _inside else own
        _inside += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            # Of several threads that were here at the same time only the first knows how many there were.
            torch.set_num_threads(own if _inside else _before)


def _in_one_thread(method: Callable) -> Callable:
    """A method of [`Protector`] that has one thread of torch's, unless the model is large and on a CPU."""

    @functools.wraps(method)
    def run(self, *arguments, **options):
        with contextlib.nullcontext() if self.uses_all_threads else one_thread():
            return method(self, *arguments, **options)

    return run


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
        before: how much of this noise the original carried already ([`Recognition`]), if it was protected before, say;
            None where that cannot be told: of tints, grey images, budgets below 2/255 and regions of a few pixels.
    """

    original: Picture
    picture: Picture
    region: np.ndarray = field(repr=False)
    epsilon: float
    epsilon_background: float
    masks: int
    tinted: bool | None
    seconds: float
    notes: tuple[str, ...] = ()
    before: Recognition | None = None

    @property
    def image(self) -> Image.Image:
        """The protected picture as a fresh PIL image, which `datasets` stores as PNG."""
        return self.picture.to_pil()

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows."""
        return self.image._repr_png_()

    def save(self, path: str | os.PathLike) -> None:
        """Write the picture with all that its file had beside pixels (alpha, EXIF, ICC profile, resolution), read it
        back and compare, as `unseg protect` does; `image.save` would leave EXIF and resolution out.

        Args:
            path: its suffix is the format; JPEG takes part of the noise. Missing folders are made.

        Raises:
            ImageFileError: it cannot be written, or would not give back the same pixels.
        """
        write(self.picture, path)

    @property
    def unchanged(self) -> bool:
        """Whether not one pixel was changed: there was nothing to protect, or the budget is below one level."""
        return bool((self.original.pixels == self.picture.pixels).all())

    @property
    def carried_noise(self) -> bool:
        """Whether the original carried this noise already, for sure."""
        return self.before is not None and self.before.sure

    @property
    def share(self) -> float:
        """Of the image that the region covers, 0 to 1."""
        return float(self.region.mean())

    @functools.cached_property
    def report(self) -> dict[str, Any]:
        """Measured on the pixels, ready for JSON: `max_noise` and `max_noise_background` in grey levels of 255
        (inside and outside the region), `psnr` in dB (None when nothing changed), `ssim`, the settings, and
        `noise_before`, the share of this noise that the original carried (None where it cannot be told)."""
        return {
            **compare(self.original, self.picture, self.region),
            "epsilon": self.epsilon * 255,
            "epsilon_background": self.epsilon_background * 255,
            "masks": self.masks,
            "tinted": self.tinted,
            "protected_share": self.share,
            "noise_before": None if self.before is None else self.before.share,
            "height": self.picture.height,
            "width": self.picture.width,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def load_generator(checkpoint: str | os.PathLike | None, device: str, **options) -> "Protector":
    """`Protector.from_pretrained` for commands: whatever goes wrong is a ValueError, of checkpoint and device."""
    try:
        return Protector.from_pretrained(checkpoint, device=device, **options)
    # Devices that are not there and damaged files raise anything from AssertionError to SafetensorError.
    except Exception as error:
        name = checkpoint or "(embedded)"
        raise ValueError(f"the generator {name} does not load on {device!r}: {one_line(error)}") from error


class Protector:
    """Protects images with a generator; what the pipeline, the command line and the demo all call.

    Args:
        model: the generator; it is put into evaluation mode.
        processor: its processor.

    Raises:
        ValueError: a model that is no generator, or one with an object finder and a processor that does not stretch
            images.

    Example:

    ```python
    >>> from unseg_hf import Protector

    >>> protector = Protector.from_pretrained()
    >>> protected = protector.protect("photo.jpg", mask="photo_mask.png")
    >>> protected.image.save("protected.png")
    ```
    """

    def __init__(self, model: UnSegModel, processor: UnSegProcessor):
        if getattr(getattr(model, "config", None), "model_type", None) != UnSegConfig.model_type:
            raise ValueError(
                f"{type(model).__name__} is no generator: pass a UnSegModel, and its UnSegProcessor after it"
            )
        if not hasattr(processor, "stretch"):
            raise ValueError(
                f"{type(processor).__name__} is no UnSegProcessor: take the one that was saved with the model"
            )
        if model.object_finder is not None and not processor.stretch:
            raise ValueError(
                "the object finder looks at stretched images, and the processor pads them: take the one that was "
                "saved with the model, or stretch=True"
            )
        side = model.config.sam_config.vision_config.image_size
        if processor.target_size != side:
            raise ValueError(
                f"the processor makes images of {processor.target_size} pixels, and the model takes {side}: take the "
                "one that was saved with the model"
            )
        self.model, self.processor = model.eval(), processor
        self._recorded: RecordedEncoder | None = None

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | os.PathLike | None = None,
        device: str | torch.device | None = None,
        bf16: bool = False,
        **kwargs,
    ) -> "Protector":
        """Load a generator: a folder, a Hub id, or by default the one in the package.

        Args:
            checkpoint: folder or Hub id.
            device: where it runs; by default where it is loaded, on the CPU unless `device_map` says otherwise.
            bf16: encode images with products in bfloat16, which is fast where the device has units for it. Some
                pixels come out one grey level away from float32's.
            kwargs: passed on to `UnSegModel.from_pretrained` (`dtype`, `attn_implementation`, ...).

        Raises:
            ValueError: a checkpoint without a trained noise head, a plain SAM for example, or without a processor, or
                neither folder nor id.
        """
        checkpoint = default_checkpoint() if checkpoint is None else checkpoint
        check_model_name(checkpoint)
        # All code that is needed is here; without a word transformers asks whether a checkpoint's own may run.
        kwargs.setdefault("trust_remote_code", False)
        model, loading = UnSegModel.from_pretrained(checkpoint, output_loading_info=True, **kwargs)
        if missing := {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}:
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
        model = model if device is None else model.to(device)
        shared = {k: v for k, v in kwargs.items() if k in SHARED}
        # An image processor alone would do for loading, and leave out how the noise is enlarged.
        if not UnSegProcessor.get_processor_dict(checkpoint, **shared)[0]:
            raise ValueError(
                f"{checkpoint} has no processor beside its model (processor_config.json): save one there "
                "(processor.save_pretrained), or both by pipeline(...).save_pretrained"
            )
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
        Prompt.check_names(prompt_fields)
        job = self.prepare(image, prompt or Prompt(**prompt_fields), epsilon, epsilon_background)
        return self.apply(job, self.decode(job, self.encode([job])[0]))

    @property
    def uses_all_threads(self) -> bool:
        """Whether the model makes good use of torch's threads: it is large, and on a CPU."""
        large = self.model.config.sam_config.vision_config.image_size > SMALL_MODEL
        return large and self.model.device.type == "cpu"

    @_in_one_thread
    def prepare(
        self, image: ImageInput, prompt: Prompt, epsilon: float | None = None, epsilon_background: float | None = None
    ) -> "Job":
        """The first step of `protect`: reads the image and checks what was asked for; nothing runs on the model."""
        start = time.perf_counter()
        epsilon, epsilon_background = self.model.config.budget(epsilon, epsilon_background)
        picture = read_any(image)
        prompt.check_inside(picture.height, picture.width)
        masks, classes, notes = given_masks(prompt, (picture.height, picture.width))
        if picture.max_value > 255 and picture.pixels.max() < picture.max_value / 4:
            notes = (
                *notes,
                "no pixel is above a quarter of what 16 bits hold, of which the noise is a share: if this is an image "
                "of fewer bits, scale it to the whole range",
            )
        features = self.processor(
            picture.rgb8(),
            input_boxes=None if prompt.boxes is None else [prompt.boxes],
            input_points=None if prompt.points is None else [[prompt.points]],
            input_labels=None if prompt.points is None else [[prompt.point_labels]],
        )
        seconds = time.perf_counter() - start
        return Job(picture, prompt, epsilon, epsilon_background, masks, classes, features, notes, seconds)

    @_in_one_thread
    @torch.inference_mode()
    def encode(self, jobs: Sequence["Job"]) -> list[UnSegImageEmbeddings]:
        """The second step: the embeddings of the jobs' images, in one batch."""
        pixels = torch.cat([job.features["pixel_values"] for job in jobs]).to(self.model.device)
        start = time.perf_counter()
        embeddings = (self._recorded or self.model.get_image_embeddings)(pixels)
        for job in jobs:
            job.seconds += (time.perf_counter() - start) / len(jobs)
        return [embeddings.of_image(i) for i in range(len(jobs))]

    @_in_one_thread
    @torch.inference_mode()
    def decode(self, job: "Job", embeddings: UnSegImageEmbeddings) -> "Decoded":
        """The third step: finds the masks if none were given, and makes the noise. The last that runs on the model."""
        start = time.perf_counter()
        masks, found = self.find_masks(job, embeddings)
        region = union_of(masks)
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
        # Of several boxes the same may be said.
        notes = tuple(dict.fromkeys((*job.picture.notes, *job.notes, *found)))
        return Decoded(noise, tinted, region, len(masks), notes)

    @staticmethod
    def _all_over(job: "Job", region: np.ndarray) -> bool:
        """Whether nothing tells one part of the image's noise from another: neither its budget nor its kind."""
        if region.all():
            return not (job.of_classes and len(set(job.classes)) > 1)
        return job.epsilon_background == job.epsilon and not job.of_classes

    @_in_one_thread
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
        if decoded.region.any() and not largest:
            notes = (*notes, "no pixel was changed: the image is too small, or its budget below one level")
        # A tint may be the colour of anything.
        told = not decoded.tinted and whole_levels(255, *budget)[0] >= 2
        before = recognise(job.picture.pixels, protected, decoded.region) if told else None
        if before is not None and before.sure:
            notes = (*notes, PROTECTED_BEFORE)
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
            before=before,
        )

    @_in_one_thread
    @torch.inference_mode()
    def find_masks(self, job: "Job", embeddings: UnSegImageEmbeddings) -> tuple[Sequence[np.ndarray], list[str]]:
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
                notes.append(WHOLE_BOX)
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
        self, job: "Job", embeddings, masks: Sequence[np.ndarray], region: np.ndarray
    ) -> "tuple[FullSizeNoise | NoiseOfSegments, bool | None]":
        """Noise whose rows are `(rows, width, 3)` float32 in [-1, 1], and whether it is a tint; None if it is that of
        classes."""
        apart = job.of_classes or (job.prompt.mode == "per_segment" and len(masks) > 1)
        sizes = tuple(job.features[name][0].tolist() for name in ("original_sizes", "reshaped_input_sizes"))
        segments, inside, drawn = [], [], [self.processor.mask_prompts(region, sizes[1])]
        for index, mask in enumerate(masks if apart else ()):
            if mask.any():
                top, bottom, left, right = extent = _extent(mask)
                segments.append((mask[top:bottom, left:right].copy(), extent))  # of all that may be too much to keep
                inside.append(index)
                drawn.append(self.processor.mask_prompts(mask, sizes[1]))
        drawn = torch.cat(drawn)
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

        tinted = codes[chosen] in (self.model.config.tint_codes or ())
        if self.model.config.turned_columns and not tinted and not job.of_classes:
            patches = embeddings.image_embeddings.shape[-1]
            self.model.config.validate_architecture()  # which may have been changed since
            turned = torch.zeros(patches, dtype=torch.bool, device=noise.device)
            turned[list(self.model.config.turned_columns)] = True
            noise = torch.where(turned.repeat_interleave(noise.shape[-1] // patches), -noise, noise)
        everywhere, *own = (self.processor.full_size_noise(one, *sizes) for one in noise)
        if not segments:
            return everywhere, tinted
        own = [(*segment, one) for segment, one in zip(segments, own, strict=True)]
        return NoiseOfSegments(everywhere, own), None if job.of_classes else tinted

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
        """Noise `(prompts, 3, h, w)` over the square for mask prompts `(prompts, h, w)` and their codes."""
        prompts = {"input_masks": masks[None].to(self.model.device), "codes": torch.tensor([codes])}
        return self.model(image_embeddings=embeddings, noise_boxes=boxes, **prompts).noise[0].cpu()


class NoiseOfSegments:
    """Outside all segments the noise of their union, and in each its own; small ones lie over large ones.

    Args:
        everywhere: noise of the union.
        segments: of each what is inside, bool, cut out at (top, bottom, left, right), those, and its noise.
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
                inside = mask[first - top : last - top]
                own_rows = own[first:last, left:right]
                noise[first - rows.start : last - rows.start, left:right][inside] = own_rows[inside]
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
    masks: Sequence[np.ndarray] | None
    classes: list[int] | None
    features: Any
    notes: tuple[str, ...]
    seconds: float

    @property
    def of_classes(self) -> bool:
        """Whether each mask gets the noise of its class."""
        return self.prompt.mode == "per_segment" and self.classes is not None


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
    for part in strips(pixels):
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


__all__ = ["Job", "Protected", "Protector", "apply_noise", "default_checkpoint"]
