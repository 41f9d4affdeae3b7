"""What data sets publish about the objects in an image: mask images, label images, `.mat` files; `coco` has the json.

Each kind is a description with paths in which `{split}` and `{name}` stand for those of an image. Its `index` looks up
the annotations of one split, and what it finds for an image can be pickled and is read only where the image is.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from unseg_hf import image_files

if TYPE_CHECKING:
    from unseg_hf.inputs import Prompt

OBJECT = 1000
"""Number of an object times this, plus its class, tells apart all segments of a label image with objects."""


def read_text(path: Path) -> str:
    """A text file of a data set, in UTF-8 with or without its mark; ValueError if it is none."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}): save it as such") from error


class Segment(NamedTuple):
    """A `(height, width)` bool mask and the number of its class; None for several classes together."""

    mask: np.ndarray
    class_id: int | None = None


def prompt_of(segments: Sequence[Segment], mode: str, tint: str) -> "Prompt":
    """What to protect: all segments, with their classes where they are known."""
    from unseg_hf.inputs import Prompt  # it brings torch, which listing the data sets need not wait for

    masks, classes = zip(*segments, strict=True)
    return Prompt(masks=masks, classes=None if None in classes else classes, mode=mode, tint=tint)


class Annotation(Protocol):
    """The annotation of one image."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All that the masks depend on."""
        ...

    def segments(self, size: tuple[int, int], classes: frozenset[int] | None, separate: bool) -> list[Segment]:
        """The labelled pixels, without those to ignore and without crowds.

        Args:
            size: height and width of the image.
            classes: only these; None for all.
            separate: one for each segment (object, or class where there are no objects), else their union.

        Returns:
            At least one segment, whose mask is empty where nothing is labelled.

        Raises:
            OSError, ValueError: an annotation that cannot be read or does not fit the image, naming it.
        """
        ...


@dataclass(frozen=True)
class Index:
    """The annotations of one split.

    Args:
        find: the annotation of the image with a name; None where there is none.
        names: of all images in the split, where the annotations say it.
    """

    find: Callable[[str], Annotation | None]
    names: frozenset[str] | None = None


class Kind(Protocol):
    """A way to annotate images; an entry of the table holds one."""

    @property
    def files(self) -> tuple[str, ...]:
        """Templates of the annotation files; any one of them is enough."""
        ...

    def index(self, base: Path, split: str) -> Index: ...

    def classes(self, base: Path, split: str) -> dict[int, str]:
        """Names of the classes; several names of one class have commas between them."""
        ...


@dataclass(frozen=True)
class FileKind:
    """A kind with a file for each image.

    Args:
        files: templates; the first file that is there counts.
    """

    files: tuple[str, ...]

    def index(self, base: Path, split: str) -> Index:
        def find(name: str) -> Annotation | None:
            for template in self.files:
                if (path := base / template.format(split=split, name=name)).is_file():
                    return self._at(path, base, split, name)
            return None

        return Index(find)

    def classes(self, base: Path, split: str) -> dict[int, str]:
        return {}

    def _at(self, path: Path, base: Path, split: str, name: str) -> Annotation:
        raise NotImplementedError


@dataclass(frozen=True)
class BinaryMasks(FileKind):
    """Mask images, bright on the objects, in any image format."""

    def _at(self, path: Path, base: Path, split: str, name: str) -> Annotation:
        return BinaryMask(path)


@dataclass(frozen=True)
class BinaryMask:
    path: Path

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def segments(self, size: tuple[int, int], classes: frozenset[int] | None, separate: bool) -> list[Segment]:
        values = image_files.read(self.path, upright=False).rgb8().max(axis=2)
        # Half of the range cuts smoothed edges and JPEG's ringing in the middle; a mask of 0 and 1 has neither.
        return [Segment(fitting(values > (127 if values.max() > 1 else 0), size, self.path))]


@dataclass(frozen=True)
class LabelImages(FileKind):
    """Label images: every value is a class.

    Args:
        ignored: values that are no class.
        objects: template of images that number the objects, 0 and 255 for none, which separate segments of a class.
        named: names of the classes, or the name of a file that has them: `objectInfo150.txt` of ADE20K.
    """

    ignored: tuple[int, ...] = (0, 255)
    objects: str | None = None
    named: Mapping[int, str] | str = field(default_factory=dict)

    def index(self, base: Path, split: str) -> Index:
        if self.files[0].endswith(".mat"):
            _mat_reader()  # is missed here, once and not by every image
        return super().index(base, split)

    def _at(self, path: Path, base: Path, split: str, name: str) -> Annotation:
        objects = base / self.objects.format(split=split, name=name) if self.objects else None
        return LabelImage(path, self.ignored, objects if objects and objects.is_file() else None)

    def classes(self, base: Path, split: str) -> dict[int, str]:
        if not isinstance(self.named, str):
            return dict(self.named)
        try:
            lines = read_text(base / self.named).splitlines()[1:]
            return {int(fields[0]): fields[-1] for fields in (line.strip().split("\t") for line in lines) if fields[0]}
        except FileNotFoundError:
            return {}


@dataclass(frozen=True)
class LabelImage:
    path: Path
    ignored: tuple[int, ...]
    objects: Path | None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,) if self.objects is None else (self.path, self.objects)

    def segments(self, size: tuple[int, int], classes: frozenset[int] | None, separate: bool) -> list[Segment]:
        segments = fitting(_labels(self.path), size, self.path).astype(np.int32)
        labelled = ~np.isin(segments, self.ignored)
        if separate and self.objects is not None:
            objects = fitting(_labels(self.objects), size, self.objects).astype(np.int32)
            segments += OBJECT * np.where(np.isin(objects, (0, 255)), 0, objects)
        found = np.unique(segments[labelled]).tolist()
        return select_segments(np.where(labelled, segments, -1), {s: s % OBJECT for s in found}, classes, separate)


@dataclass(frozen=True)
class CityscapesImages(FileKind):
    """`instanceIds.png` of Cityscapes: the class of stuff and of groups of things, and 1000 times it for one thing.

    Args:
        stuff: names of the classes without objects that are evaluated.
        things: names of those with objects; their groups are crowds.
    """

    stuff: Mapping[int, str]
    things: Mapping[int, str]

    def _at(self, path: Path, base: Path, split: str, name: str) -> Annotation:
        return CityscapesImage(path, frozenset(self.stuff), frozenset(self.things))

    def classes(self, base: Path, split: str) -> dict[int, str]:
        return {**self.stuff, **self.things}


@dataclass(frozen=True)
class CityscapesImage:
    path: Path
    stuff: frozenset[int]
    things: frozenset[int]

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def segments(self, size: tuple[int, int], classes: frozenset[int] | None, separate: bool) -> list[Segment]:
        segments = fitting(_labels(self.path), size, self.path)
        class_of = {s: s if s < OBJECT else s // OBJECT for s in np.unique(segments).tolist()}
        wanted = {s: c for s, c in class_of.items() if c in (self.stuff if s < OBJECT else self.things)}
        return select_segments(segments, wanted, classes, separate)


def select_segments(
    segments: np.ndarray, class_of: Mapping[int, int], classes: frozenset[int] | None, separate: bool
) -> list[Segment]:
    """Segments of some classes, from an image of their numbers."""
    wanted = {segment: class_id for segment, class_id in class_of.items() if classes is None or class_id in classes}
    union = np.isin(segments, list(wanted))
    if not separate or not union.any():
        return [Segment(union)]
    found = (Segment(segments == segment, class_id) for segment, class_id in wanted.items())
    return [segment for segment in found if segment.mask.any()]


def _labels(path: Path) -> np.ndarray:
    """`(height, width)` whole numbers of a label image, or of the `Segmentation` in one of SBD's `.mat` files.

    Raises:
        ValueError: the file is damaged or holds no labels.
    """
    if path.suffix != ".mat":
        return image_files.read_mask(path)
    try:
        content = _mat_reader()(path)
        (field,) = (name for name in content if name.startswith("GT"))
        return content[field][0]["Segmentation"][0]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error}); unpack it again") from error
    except Exception as error:
        # SciPy's reader meets damaged files with whatever its parsing raises.
        raise ValueError(f"{path} is damaged, or no .mat file as SBD's ({error!r}); unpack it again") from error


def _mat_reader() -> Callable:
    """SciPy's `loadmat`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("SBD's .mat files need SciPy: pip install 'unseg-hf[layouts]'") from error
    return loadmat


def fitting(values: np.ndarray, size: Iterable[int], path: Path) -> np.ndarray:
    """The pixels of an annotation file; ValueError unless they are of the image's height and width."""
    if values.shape[:2] != tuple(size):
        raise ValueError(f"{path} has {values.shape[:2]} (height, width), but its image has {tuple(size)}")
    return values
