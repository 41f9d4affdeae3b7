"""`Dataset.map` and `IterableDataset.map` over images: the same pixels as for one photo, stored as PNG."""

import functools
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .configuration_unseg import check_epsilon
from .image_files import ImageFileError, encode_verified, one_line, read_mask
from .inputs import Prompt
from .model_identity import model_identity
from .protection import PROTECTED_BEFORE, Job, Protected, Protector, load_generator

ON_ERROR = ("raise", "keep", "mark", "drop")
REPORT_COLUMNS = (
    "max_noise", "max_noise_background", "psnr", "ssim", "masks", "tinted", "protected_share", "noise_before", "notes",
)  # fmt: skip


class RecordError(ValueError):
    """A record whose image or mask cannot be used; one line that says which and why."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of one image: `png` and `protected`, or the one line of `error`."""

    png: bytes | None = None
    protected: Protected | None = None
    error: str = ""


@dataclass(frozen=True)
class ProtectImages:
    """A function for `map(..., batched=True)` that protects a column of images.

    It holds settings and no weights: the generator is loaded once in each process, so that hashing (for the cache of
    `datasets`) and pickling (for `num_proc`) are cheap, and the cache knows other weights in the same folder.

    For `map` alone: it returns what it changes, and `set_transform` would drop all other columns.

    Pass images undecoded, so that one broken file cannot fail its batch, and nothing of a file is lost. `Dataset.map`
    does so by itself; for an `IterableDataset` call `.decode(False)` before `map` and `.decode()` after it, and pass
    `features=protect.features(dataset.features)` to its `map`.

    Args:
        model: folder, Hub id, or None for the generator in the package.
        image_column: column of images, of the feature `datasets.Image()`; they come back as PNG, without a path
            (`datasets` would prefer a file of that name, if there is one, to the bytes).
        mask_column: column of mask images, or of lists of them; without one, the generator looks for objects.
            `objects.mask` is the field `mask` of a column `objects`, of a struct or of each in a list of structs.
        box_column: column, or field, of lists of boxes around objects, in pixels, in place of masks. An empty list, of
            boxes or of masks, is an image without objects: nothing in it is protected.
        box_format: "xyxy" or "xywh", as in [`Prompt`]; data sets made of COCO's json have `[x, y, width, height]`.
        class_column: column, or field, of lists of whole numbers, the class of each mask or box of a row, which get
            the noises of their classes; with mode="per_segment".
        revision: of a Hub id.
        label_maps: the masks are label maps, of which every label but `ignore_labels` is a mask.
        ignore_labels: labels that are no objects.
        mode: "union" or "per_segment", as in [`Prompt`].
        tint: "auto", "always" or "never", as in [`Prompt`].
        whole_image: everything gets the full budget, which hardly protects (see [`Prompt`]).
        epsilon, epsilon_background: as for [`Protector.protect`]; the second only with the first.
        on_error: what happens to a row whose image, mask or boxes cannot be used: "raise", "keep" the row as it is,
            its image unprotected, "mark" it by a null image and the reason in `error_column`, or "drop" it (then `map`
            keeps all columns, whatever its `remove_columns` says).
        error_column: text, empty in rows without an error; written with "mark" and with "keep".
        report_columns: figures to add as columns `protection_<name>`, of REPORT_COLUMNS; nan and "" where there is no
            figure.
        device: where the generator runs. For "cuda" with `with_rank=True` the rank picks the GPU.
        batch_size: images that are encoded together on a GPU. On a CPU it is always one, so that pixels equal those of
            a single photo.

    Raises:
        ValueError: settings that make no sense, naming them, or a Hub id that is not there.
        FileNotFoundError: a folder without a generator.

    Example:

    ```python
    >>> protect = ProtectImages(image_column="image", mask_column="mask", on_error="mark")
    >>> protected = dataset.map(protect, batched=True, batch_size=32, writer_batch_size=32)
    ```
    """

    model: str | None = None
    image_column: str = "image"
    mask_column: str | None = None
    box_column: str | None = None
    box_format: str = "xyxy"
    class_column: str | None = None
    revision: str | None = None
    label_maps: bool = False
    ignore_labels: tuple[int, ...] = (0, 255)
    mode: str = "union"
    tint: str = "auto"
    whole_image: bool = False
    epsilon: float | None = None
    epsilon_background: float | None = None
    on_error: str = "raise"
    error_column: str = "protection_error"
    report_columns: tuple[str, ...] = ()
    device: str = "cpu"
    batch_size: int = 8
    identity: str = field(init=False)
    version: str = field(init=False)

    def __post_init__(self):
        from . import __version__

        if not isinstance(self.model, str | os.PathLike | None):
            kind = type(self.model).__name__
            raise ValueError(f"model is a {kind}: pass a folder or Hub id; its save_pretrained makes a folder")
        Prompt(whole_image=self.whole_image, box_format=self.box_format, **self._of_all_prompts())
        columns = {name: getattr(self, name) for name in ("mask_column", "box_column") if getattr(self, name)}
        given = (["whole_image"] if self.whole_image else []) + [f"{n}={column!r}" for n, column in columns.items()]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} were given: pass one kind of prompt")
        if self.box_format != "xyxy" and not self.box_column:
            raise ValueError(f"box_format={self.box_format!r} needs box_column")
        if self.class_column and (self.mode != "per_segment" or self.label_maps or not columns):
            raise ValueError(
                f"class_column={self.class_column!r} needs mode='per_segment', and mask_column or box_column without "
                "label_maps, which have their own classes"
            )
        if self.label_maps and not self.mask_column:
            raise ValueError("label_maps needs mask_column")
        if self.on_error not in ON_ERROR:
            raise ValueError(f"on_error={self.on_error!r}: must be one of {', '.join(ON_ERROR)}")
        if isinstance(self.report_columns, str):
            object.__setattr__(self, "report_columns", (self.report_columns,))
        if unknown := sorted(set(self.report_columns) - set(REPORT_COLUMNS)):
            raise ValueError(f"report_columns has {', '.join(unknown)}: there is {', '.join(REPORT_COLUMNS)}")
        if self.epsilon is not None:
            check_epsilon(self.epsilon, self.epsilon_background or 0)
        elif self.epsilon_background is not None:
            raise ValueError(f"epsilon_background={self.epsilon_background:g} needs epsilon: pass both")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}: must be at least 1")
        identity, revision = model_identity(self.model, self.revision)
        settled = {
            "model": None if self.model is None else str(self.model),
            "revision": revision,
            "ignore_labels": tuple(np.ravel(self.ignore_labels).tolist()),
            "report_columns": tuple(self.report_columns),
            "identity": identity,
            "version": __version__,
        }
        for name, value in settled.items():
            object.__setattr__(self, name, value)

    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> dict[str, list]:
        """The columns of a batch that change; with "drop" all of them, as those of which rows are dropped have to."""
        if isinstance(rank, list):
            raise ValueError("map passes indices, which this has no use for: leave out with_indices")
        added = [f"protection_{name}" for name in self.report_columns]
        added += [self.error_column] if self.on_error in ("mark", "keep") else []
        if there := [name for name in added if name in batch]:
            raise ValueError(
                f"there is a column {there[0]!r} already: if these images are protected, noise on noise is beyond the "
                "bound; if it is of others, what it says would be lost: rename it, or pass another error_column"
            )
        if column_and_fields(self.image_column, batch)[1]:
            raise ValueError(
                f"image_column={self.image_column!r} is a field of a column, in which the original would stay: make "
                "it a column of its own first (flatten)"
            )
        _one_thread_in_workers()
        images = _undecoded(batch, self.image_column)
        if any(isinstance(image, str | bytes) for image in images):
            raise ValueError(
                f"column {self.image_column!r} holds paths or bytes: cast it to datasets.Image() before map "
                "(cast_column)"
            )
        column = self.mask_column or self.box_column
        masks = [None] * len(images) if column is None else _undecoded(batch, column)
        classes = _undecoded(batch, self.class_column) if self.class_column else [None] * len(images)
        rows: list[Any] = []
        errors: list[str] = []
        reports: dict[str, list] = {name: [] for name in self.report_columns}
        outcomes = self.outcomes(zip(images, masks, classes, strict=True), rank)
        for index, (image, outcome) in enumerate(zip(images, outcomes, strict=True)):
            if outcome.error and self.on_error == "raise":
                file = image.get("path") if isinstance(image, Mapping) else None
                called = f" ({os.path.basename(file)})" if file else ""
                raise RecordError(
                    f"row {index} of the batch, column {self.image_column!r}{called}: {outcome.error}; mend it, or "
                    "pass on_error='mark', 'drop' or 'keep'"
                )
            errors.append(outcome.error)
            if outcome.protected is not None and outcome.protected.carried_noise:
                warnings.warn(f"images of column {self.image_column!r}: {PROTECTED_BEFORE}", stacklevel=2)
            if outcome.png is not None:
                rows.append({"bytes": outcome.png, "path": None})
            else:
                rows.append(image if self.on_error == "keep" else None)
            for name, value in self._figures(outcome.protected).items():
                reports[name].append(value)
        columns = {self.image_column: rows} | {f"protection_{name}": values for name, values in reports.items()}
        if self.on_error in ("mark", "keep"):
            return columns | {self.error_column: errors}
        if self.on_error == "raise":
            return columns
        kept = [index for index, error in enumerate(errors) if not error]
        others = {name: _undecoded(batch, name) for name in batch if name not in columns}
        return {name: [values[index] for index in kept] for name, values in (others | columns).items()}

    def features(self, features: Mapping[str, Any]) -> Any:
        """`datasets.Features` of the result, of those before: an `IterableDataset` does not find them by itself.

        Raises:
            ValueError: there are none, as of a stream whose columns nobody has named.
        """
        from datasets import Features, Image, Value

        if features is None:
            raise ValueError("this stream does not know its columns: give it features= where it is made")
        added = {
            f"protection_{name}": Value("string" if name == "notes" else "float64") for name in self.report_columns
        }
        if self.on_error in ("mark", "keep"):
            added[self.error_column] = Value("string")
        return Features({**features, self.image_column: Image(), **added})

    def outcomes(self, rows: Iterable[tuple[Any, Any, Any]], rank: int | None = None) -> Iterator[Outcome]:
        """Protect images with their masks, in order; what is wrong with one is its `error`.

        Args:
            rows: an image, as in a column (`{"bytes": ..., "path": ...}`, or as [`Protector.protect`] takes it), its
                mask, a list of masks or of boxes, and a list of their classes; None, of these, is an error where they
                were announced.
            rank: of the process among those of this machine.
        """
        protector = self.protector(rank)
        size = 1 if protector.model.device.type == "cpu" else self.batch_size
        waiting: list[Job | Outcome] = []
        for row in rows:
            waiting.append(self._prepared(protector, *row))
            if len(waiting) == size:
                yield from self._finished(protector, waiting)
                waiting = []
        yield from self._finished(protector, waiting)

    def protector(self, rank: int | None = None) -> Protector:
        """The generator, loaded once in each process; ValueError if it does not load on this device."""
        device = self.device
        if device == "cuda" and rank is not None:
            device = f"cuda:{rank % max(1, torch.cuda.device_count())}"
        return _load(self.model, self.revision, self.identity, device)

    def _prepared(self, protector: Protector, image: Any, mask: Any, classes: Any) -> Job | Outcome:
        try:
            budget = self.epsilon, self.epsilon_background
            if isinstance(image, list):
                if image and isinstance(image[0], Mapping):
                    raise RecordError("the image is a list of images: map takes one a row")
                raise RecordError("the image is a list of numbers: cast its column to datasets.Image() before map")
            return protector.prepare(stored_image(image, "the image"), self.prompt(mask, classes), *budget)
        except MemoryError:
            raise
        # Whatever reading a damaged file raises is that record's trouble alone.
        except Exception as error:
            return Outcome(error=without_folders(one_line(error), image, mask))

    def prompt(self, mask: Any, classes: Any = None) -> Prompt:
        """What to protect in an image with this mask, or these masks or boxes, of these classes.

        Raises:
            RecordError: there is none, though it was announced.
        """
        fields = self._of_all_prompts()
        if self.class_column is not None:
            if classes is None:
                raise RecordError("the classes are missing; give them, or choose what happens to such records")
            fields["classes"] = classes if isinstance(classes, list | np.ndarray) else [classes]
        if self.box_column is not None:
            return boxes_prompt(mask, self.box_format, **fields)
        if self.mask_column is None:
            return Prompt(whole_image=self.whole_image, **fields)
        return stored_prompt(mask, self.label_maps, **fields)

    def _of_all_prompts(self) -> dict[str, Any]:
        return {"mode": self.mode, "tint": self.tint, "ignore_labels": self.ignore_labels}

    def _finished(self, protector: Protector, waiting: list[Job | Outcome]) -> Iterator[Outcome]:
        jobs = [job for job in waiting if isinstance(job, Job)]
        embeddings = iter(protector.encode(jobs) if jobs else ())
        for job in waiting:
            if isinstance(job, Outcome):
                yield job
                continue
            protected = protector.apply(job, protector.decode(job, next(embeddings)))
            try:
                yield Outcome(encode_verified(protected.picture, "png"), protected)
            except ValueError as error:  # metadata that PNG cannot hold
                yield Outcome(error=str(error))

    def _figures(self, protected: Protected | None) -> dict[str, Any]:
        """A value for each report column, always of one type: the type of a column is that of its first rows."""
        if not self.report_columns:
            return {}
        report = {} if protected is None else protected.report
        figures = {}
        for name in self.report_columns:
            if name == "notes":
                figures[name] = "; ".join(report.get(name, ()))
            else:
                value = report.get(name)
                figures[name] = float("nan") if value is None else float(value)
        return figures


@functools.lru_cache(maxsize=2)
def _load(model: str | None, revision: str | None, identity: str, device: str) -> Protector:
    """`identity` is there so that a checkpoint which was replaced is loaded anew."""
    return load_generator(model, device, **({"revision": revision} if revision else {}))


def _one_thread_in_workers() -> None:
    """Several processes with all threads each are slower, and a forked one would wait for threads it has not got."""
    import multiprocess  # what `datasets` starts its workers with

    if multiprocess.parent_process() is not None and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


def _undecoded(batch: Mapping[str, Any], column: str) -> list:
    """The values of a column as they are stored: decoding a batch fails for all rows where it fails for one."""
    from datasets.formatting.formatting import LazyBatch, LazyRow

    if not isinstance(batch, Mapping):
        raise ValueError("ProtectImages takes rows as they are stored: leave input_columns and with_format out")
    column, fields = column_and_fields(column, batch)
    if fields:
        return [field_of(value, fields) for value in _undecoded(batch, column)]
    if isinstance(batch, LazyBatch) and column in batch.keys_to_format:
        return batch.pa_table[column].to_pylist()
    values = None if isinstance(batch, LazyRow) else batch[column]
    first = values[0] if isinstance(values, list) and values else None
    if isinstance(values, np.ndarray | torch.Tensor) or isinstance(first, torch.Tensor):
        # Its JPEG masks have been decoded, and what lies near 0 around their objects passes for object.
        raise ValueError("ProtectImages takes rows as they are stored: leave with_format out")
    if isinstance(values, Mapping | str | bytes) or not hasattr(values, "__len__"):
        raise ValueError("ProtectImages takes batches of rows: pass batched=True to map")
    return list(values)


def column_and_fields(name: str, columns: Iterable[str]) -> tuple[str, list[str]]:
    """`objects.bbox` as the column `objects` and what is meant of it, `["bbox"]`; nothing for all of a column.

    Raises:
        ValueError: there is no such column.
    """
    columns = list(columns)
    top, *fields = [name] if name in columns else name.split(".")
    if top not in columns:
        raise ValueError(f"there is no column {name!r}: the data set has {', '.join(columns)}")
    return top, fields


def field_of(value: Any, fields: Sequence[str]) -> Any:
    """What lies below a value out of a column: a field of a struct, or that of each struct in a list.

    Raises:
        ValueError: there is no such field.
    """
    if value is None or not fields:
        return value
    if isinstance(value, list | tuple | np.ndarray):
        return [field_of(one, fields) for one in value]
    known = list(value) if isinstance(value, Mapping) else []
    if fields[0] not in known:
        there = f"there is {', '.join(known)}" if known else f"it is {type(value).__name__}"
        raise ValueError(f"a column of masks, boxes or classes has no field {fields[0]!r}: {there}")
    return field_of(value[fields[0]], fields[1:])


def boxes_prompt(boxes: Any, box_format: str, **fields: Any) -> Prompt:
    """What boxes out of a column ask for.

    Raises:
        RecordError: there are none.
    """
    if boxes is None:
        raise RecordError("the boxes are missing; give them, or choose what happens to such records")
    if isinstance(boxes, Mapping):
        raise RecordError(f"the boxes are a struct of {', '.join(boxes)}: name the field, as in 'objects.bbox'")
    # As of a list of masks: an image without objects.
    given = {"boxes": boxes, "box_format": box_format} if len(boxes) else {"masks": []}
    return Prompt(**given, **fields)


def stored_prompt(mask: Any, label_maps: bool, **fields: Any) -> Prompt:
    """What a mask out of a column asks for: one mask or label map, or several masks in a list or an array of arrays.

    Args:
        mask: image, array, nested lists as columns of arrays hold them, or a list of these.
        label_maps: it is a label map.
        fields: others of the prompt.

    Raises:
        RecordError: there is no mask, or not this kind of one.
    """
    if mask is None:
        raise RecordError("the mask is missing; give one, or choose what happens to such records")
    if isinstance(mask, list) and mask and isinstance(mask[0], list):
        mask = np.asarray(mask)
    if isinstance(mask, np.ndarray) and mask.ndim == 3 and 1 in (mask.shape[0], mask.shape[2]):
        mask = mask[0] if mask.shape[0] == 1 else mask[:, :, 0]
    several = isinstance(mask, list) or (isinstance(mask, np.ndarray) and mask.ndim == 3)
    if several:
        if label_maps:
            raise RecordError("a list of masks is no label map; leave label_maps out")
        return Prompt(masks=[_read_mask(one) for one in mask], **fields)
    one = _read_mask(mask)
    if label_maps:
        return Prompt(label_map=one, **fields)
    # Of a class it is the only one of a list.
    return Prompt(**({"masks": [one]} if "classes" in fields else {"mask": one}), **fields)


def _read_mask(value: Any) -> Any:
    """A mask out of a column, decoded here so that an error says that it is the mask's."""
    source = stored_image(value, "the mask")
    if not isinstance(source, bytes | str):
        return source
    try:
        return read_mask(source)
    except ImageFileError as error:
        raise RecordError(f"the mask cannot be used: {error}") from error


def without_folders(text: str, *values: Any) -> str:
    """What is said of images and masks out of columns, without the folders of their files: it may be published."""
    for value in values:
        if isinstance(value, Mapping) and (path := value.get("path")):
            text = text.replace(path, os.path.basename(path))
    return text


def stored_image(value: Any, what: str) -> Any:
    """An image or mask out of a column, as [`Protector`] reads it.

    Raises:
        RecordError: there is none.
        OSError: its file cannot be read.
    """
    if value is None:
        raise RecordError(f"{what} is missing")
    if not isinstance(value, Mapping):
        return value
    if not value.keys() & {"bytes", "path"}:
        raise RecordError(
            f"{what} has {', '.join(map(repr, value))}, and no bytes or path; give images, or arrays of them "
            "(pycocotools.mask.decode makes one of a run-length code)"
        )
    data, path = value.get("bytes"), value.get("path")
    if data is not None:
        return data
    if path is None:
        raise RecordError(f"{what} is missing")
    if os.path.isfile(path):
        return path
    if os.path.exists(path):  # a pipe, or a device without an end
        raise RecordError(f"{what} is no file: {os.path.basename(path)}")
    from datasets.utils.file_utils import xopen

    with xopen(path, "rb") as file:  # on the Hub, or in an archive
        return file.read()


__all__ = ["ProtectImages"]
