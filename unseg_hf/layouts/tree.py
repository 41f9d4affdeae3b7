"""From the root of a data set to what becomes of each of its files."""

import filecmp
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from glob import iglob
from pathlib import Path, PurePosixPath

from unseg_hf import image_files
from unseg_hf.image_tasks import files_below

from .annotations import Annotation, Index, read_text
from .table import DATA_SETS, DataSet, Images, Layout

JPEG_SUFFIXES = (".jpg", ".jpeg")
IMAGE_SUFFIXES = (
    *image_files.READ_SUFFIXES, ".jp2", ".jxl", ".pbm", ".pgm", ".pnm", ".ppm", ".psd", ".tga", ".ico", ".dng", ".nef",
    ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".raf",
)  # fmt: skip
"""Also those that cannot be read."""
OF_SYSTEMS = frozenset({"thumbs.db", "ehthumbs.db", "@eadir", "desktop.ini", "__macosx"})
"""Names, in small letters, of what systems put beside images: small copies, mostly."""
ARCHIVE_SUFFIXES = (
    ".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".lmdb", ".mdb", ".h5", ".hdf5", ".npy",
    ".npz", ".parquet", ".arrow", ".tfrecord", ".rec", ".pkl", ".pt", ".pth", ".cache",
)  # fmt: skip
UNLISTED = "not in the lists of the chosen splits"
OTHER_SPLITS = "of other splits"


_BACKUP = re.compile(r"(.+\.(?:jpe?g|png|tiff?|bmp|webp|gif))[^/]+", re.IGNORECASE)


@dataclass(frozen=True)
class ImageTask:
    """An image to protect.

    Args:
        path: below the root.
        target: below the output; differs from `path` where a JPEG becomes a `.png`.
        annotation: None where the data set says that there is one and it was not found.
        listed_as: the name that a list most likely has for this image, and that no image has.
    """

    path: str
    target: str
    annotation: Annotation | None
    listed_as: str = ""


@dataclass
class Plan:
    """What becomes of the files of a data set.

    Args:
        images: to protect, sorted by path.
        copies: all other files, below the root, sorted.
        left_out: images outside the layout that are named as one to protect, most likely the same picture, images of
            other splits that are the same file, and arrays beside an image to protect that have its name.
        clean: number of images among the copies, by why they stay clean.
        archives: copies that may hold the original images.
        missing: names that the chosen splits have in their lists and the tree has not.
        unknown: names of images to protect that no image has.
    """

    images: list[ImageTask] = field(default_factory=list)
    copies: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    clean: Counter[str] = field(default_factory=Counter)
    archives: list[str] = field(default_factory=list)
    missing: frozenset[str] = frozenset()
    unknown: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Found:
    """A data set in the layout in which it was found.

    Args:
        data_set: what it is.
        layout: one of its layouts.
        root: the folder that was given.
        base: the folder below it in which the layout begins.
        images: the groups of images that are there.
    """

    data_set: DataSet
    layout: Layout
    root: Path
    base: Path
    images: tuple[Images, ...]

    def splits(self) -> list[str]:
        """Names of the splits that are there, sorted."""
        found: set[str] = set()
        for images in self.images:
            if images.split is not None:
                found.add(images.split)
                continue
            template = _split_template(images)
            found |= {match["split"] for match in _matches(self.base, template)}
        return sorted(found)

    def chosen_splits(self, wanted: Sequence[str] | None) -> list[str]:
        """The splits to protect: those asked for, or the data set's for training.

        Raises:
            ValueError: one that is not there.
        """
        there = self.splits()
        if wanted is None:
            wanted = [split for split in self.layout.train if split in there]
            if not wanted:
                raise ValueError(
                    f"{self.root} has no training split ({' or '.join(self.layout.train)}), but {', '.join(there)}: "
                    "choose with --split"
                )
        if unknown := [split for split in wanted if split not in there]:
            raise ValueError(f"--split {unknown[0]}: {self.root} has {', '.join(there) or 'none'}")
        return list(dict.fromkeys(wanted))

    def class_ids(self, wanted: Sequence[str] | None, splits: Sequence[str]) -> frozenset[int] | None:
        """Numbers of classes given by name or number; None for all.

        Raises:
            ValueError: one that the data set does not have.
        """
        if wanted is None:
            return None
        names: dict[int, str] = {}
        for split in splits:
            for images in self._images_of(split):
                names |= images.annotation.classes(self.base, split)
        if not names:
            raise ValueError(f"--classes: {self.data_set.title} has one class, or no file that names them")
        number_of = {n.strip().casefold(): i for i, all_names in names.items() for n in re.split("[,;]", all_names)}
        ids = set()
        for text in wanted:
            number = int(text) if text.isdecimal() else number_of.get(text.strip().casefold())
            if number not in names:
                raise ValueError(f"--classes {text}: no such class; there is {', '.join(map(_shown, names.items()))}")
            ids.add(number)
        return frozenset(ids)

    def plan(self, output: Path, splits: Sequence[str], names: frozenset[str] | None, rename: bool) -> Plan:
        """What becomes of each file.

        Args:
            output: where it will go.
            splits: whose images are protected.
            names: protect only these images (stems of their file names); None for all.
            rename: JPEG images get the suffix `.png`.

        Raises:
            OSError, ValueError: an annotation file of a whole split is missing or damaged, a folder cannot be read,
                the output lies in the input, or a renamed image would replace another file.
        """
        plan = Plan()
        unseen = set(names or ())
        indices = {split: [(i, self._index(i, split)) for i in self._images_of(split)] for split in splits}
        known, strays, others = frozenset(self.splits()), {}, []
        expected = {(i.file, n) for some in indices.values() for i, index in some for n in index.names or ()}
        for relative in files_in(self.root, output):
            place = self._place(relative)
            if place is None:
                plan.copies.append(relative)
                if reason := self._stray_reason(relative):
                    strays[relative] = reason
                elif PurePosixPath(relative).suffix.lower() in ARCHIVE_SUFFIXES:
                    plan.archives.append(relative)
                continue
            images, split, name = place
            expected.discard((images.file, name))
            # Cityscapes' file names say more than the name that its annotations share.
            called = {PurePosixPath(name).name, PurePosixPath(relative).stem}
            unseen -= called
            chosen = names is None or not called.isdisjoint(names)
            annotation, reason = self._annotation(indices, images, split, name, chosen)
            if reason is None:
                suffix = PurePosixPath(relative).suffix
                renamed = rename and suffix.lower() in JPEG_SUFFIXES
                target = str(PurePosixPath(relative).with_suffix(".png")) if renamed else relative
                plan.images.append(ImageTask(relative, target, annotation))
            else:
                plan.copies.append(relative)
                # Any folder can look like a split.
                if reason == UNLISTED or (split is not None and split not in known):
                    strays[relative] = reason
                elif reason == OTHER_SPLITS:
                    others.append(relative)
                else:
                    plan.clean[reason] += 1
        plan.missing, plan.unknown = frozenset(name for _, name in expected), frozenset(unseen)
        self._leave_out(plan, strays, others)
        taken = Counter([*plan.copies, *(task.path for task in plan.images)])
        taken.update(task.target for task in plan.images if task.target != task.path)
        for task in plan.images:
            if task.target != task.path and taken[task.target] > 1:
                raise ValueError(
                    f"{task.path} cannot become {task.target}, which is there or becomes another file's "
                    "(--jpeg-names rename): use png-bytes"
                )
        return plan

    def _leave_out(self, plan: Plan, strays: dict[str, str], others: list[str]) -> None:
        """Take out of the copies what would publish an image to protect, and count the other images among them.

        Args:
            plan: is changed.
            strays: images outside the layout, and why they stay clean; those that a list names otherwise are to fail.
            others: images of other splits.
        """
        protected = {_key(_stem(task.path)): task.path for task in plan.images}
        listed = {_key(name): name for name in plan.missing}
        for path, reason in strays.items():
            key = _key(_stem(path))
            if self._fits(self.layout.others, path):
                plan.clean[reason] += 1
            elif key in protected:
                plan.left_out.append(path)
            elif key in listed:
                plan.images.append(ImageTask(path, path, None, listed[key]))
            else:
                plan.clean[reason] += 1
        for path in others:
            same = protected.get(_key(_stem(path)))
            if same is not None and _are_equal(self.root / path, self.root / same):
                plan.left_out.append(path)
            else:
                plan.clean[OTHER_SPLITS] += 1
        # What YOLO's loaders keep beside an image are its pixels, and what has its whole name, and more, is a backup.
        paths = {task.path for task in plan.images}
        beside = {_stem(path) for path in paths}
        for path in plan.copies:
            whole = _BACKUP.fullmatch(path)
            if (path.lower().endswith(".npy") and _stem(path) in beside) or (whole and whole[1] in paths):
                plan.left_out.append(path)
        plan.images.sort(key=lambda task: task.path)
        plan.copies = sorted(set(plan.copies).difference(plan.left_out, (task.path for task in plan.images)))
        plan.archives = [path for path in plan.archives if path not in plan.left_out]

    def _annotation(
        self, indices, images: Images, split: str | None, name: str, chosen: bool
    ) -> tuple[Annotation | None, str | None]:
        """The annotation of an image and why it stays clean, None where it is to be protected."""
        for candidate in indices if split is None else (split,):
            for group, index in indices.get(candidate, ()):
                if group is not images or (index.names is not None and name not in index.names):
                    continue
                if not chosen:
                    return None, "not in --names"
                annotation = index.find(name)
                if annotation is None and self.data_set.unlabelled:
                    return None, "without a mask"
                return annotation, None
        listed = split is None or split in indices
        return None, UNLISTED if listed else OTHER_SPLITS

    def _place(self, relative: str) -> tuple[Images, str | None, str] | None:
        """The group, split (None where the path does not say it) and name of an image file; None for other files."""
        below = self._below_base(relative)
        for images in self.images:
            if match := _match(images.file, below):
                return images, images.split or match.groupdict().get("split"), match["name"]
        return None

    def _stray_reason(self, relative: str) -> str | None:
        """Why a file outside the layout stays clean, if it is an image and no annotation."""
        annotations = [template for images in self.layout.images for template in images.annotation.files]
        if PurePosixPath(relative).suffix.lower() not in IMAGE_SUFFIXES:
            return None
        if self._fits((*annotations, *self.layout.labels), relative):
            return None
        inside = self._fits([f"{images.file.rpartition('/')[0]}/{{name}}" for images in self.images], relative)
        return "named otherwise than this layout's images" if inside else "outside this layout's folders of images"

    def _fits(self, templates: Sequence[str], relative: str) -> bool:
        below = self._below_base(relative)
        return any(_match(template, below) for template in templates)

    def _below_base(self, relative: str) -> str:
        """A path below the root as one below the base, empty for files elsewhere."""
        begin = "" if self.base == self.root else f"{self.base.relative_to(self.root).as_posix()}/"
        return relative[len(begin) :] if relative.startswith(begin) else ""

    def _images_of(self, split: str) -> list[Images]:
        return [images for images in self.images if images.split in (None, split)]

    def _index(self, images: Images, split: str) -> Index:
        index = images.annotation.index(self.base, split)
        if images.listed is None:
            return index
        lines = read_text(self.base / images.listed.format(split=split)).splitlines()

        def listed(line: str) -> str:
            # Some lists have more columns after the name, and some, as DeepLab's for VOC, paths of files.
            whole, first = (_without_suffix(name) for name in (line, line.split()[0]))
            is_name = whole != first and (self.base / images.file.format(split=split, name=whole)).exists()
            return whole if is_name else first

        return Index(index.find, frozenset(listed(line.strip()) for line in lines if line.strip()))


def find_layout(name: str, root: Path) -> Found:
    """The layout in which a data set lies in a folder.

    Raises:
        ValueError: no such data set.
        FileNotFoundError: the folder holds none of its layouts.
    """
    if name not in DATA_SETS:
        raise ValueError(f"no data set {name!r}: there is {', '.join(DATA_SETS)}")
    data_set = DATA_SETS[name]
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; {expected_tree(name)}")
    for layout in data_set.layouts:
        for base in (root / folder for folder in layout.bases):
            if images := tuple(images for images in layout.images if _is_there(base, images)):
                return Found(data_set, layout, root, base, images)
    raise FileNotFoundError(f"{root} is no {name}; {expected_tree(name)}")


def expected_tree(name: str) -> str:
    """The layouts of a data set, for people."""
    lines = [f"{DATA_SETS[name].title} is expected as"]
    for number, layout in enumerate(DATA_SETS[name].layouts):
        where = " or ".join(["the root", *(f"{base}/" for base in layout.bases if base)])
        lines.append(f"{'or, ' if number else ''}in {where} ({layout.origin}):")
        for images in layout.images:
            listed = [images.listed] if images.listed else []
            annotations = " or ".join(images.annotation.files)
            lines.append(f"  {images.file}  with  {'  and  '.join([annotations, *listed])}")
    return "\n".join(lines)


def files_in(folder: Path, output: Path) -> Iterator[str]:
    """Paths of all files below a folder, with `/`, in a fixed order; folders that are links are entered, and what
    begins with a dot, is a system's own, or is a pipe or a device is left out.

    Raises:
        OSError: a folder that cannot be read, or a link to a folder that holds it.
        ValueError: `output` lies in one of the folders.
    """
    output = output.resolve()

    def below(relative: str, inside: tuple[str, ...]) -> Iterator[str]:
        here = os.path.realpath(folder / relative)
        if here in inside:
            raise OSError(f"{folder / relative} is a link to a folder that holds it: remove the link")
        if output.is_relative_to(here):
            raise ValueError(f"the output {output} lies in the input {here}: choose a folder elsewhere")
        with os.scandir(here) as entries:
            wanted = (e for e in entries if e.name[0] != "." and e.name.lower() not in OF_SYSTEMS)
            found = sorted((entry.name, entry.is_dir(), entry.is_file()) for entry in wanted)
        for name, is_folder, is_file in found:
            path = f"{relative}/{name}" if relative else name
            if is_folder:
                yield from below(path, (*inside, here))
            elif is_file or not os.path.exists(folder / path):  # a link to nothing is named when its turn comes
                yield path

    yield from below("", ())


def _is_there(base: Path, images: Images) -> bool:
    wanted = [(images.file,), images.annotation.files, *([(images.listed,)] if images.listed else [])]
    return all(any(next(_matches(base, t), None) for t in templates) for templates in wanted)


def _split_template(images: Images) -> str:
    """The template whose files say which splits there are."""
    if images.listed is not None:
        return images.listed
    annotations = images.annotation.files[0]
    return images.file if "{name}" in annotations else annotations


def _matches(base: Path, template: str) -> Iterator[re.Match[str]]:
    """Those of the paths below `base`, with `/`, that a template fits."""
    # A name may hold folders, in which what cannot be read is told when it is protected.
    folder, _, _ = template.partition("{name}")
    for path in iglob(folder.replace("{split}", "*"), root_dir=base):
        below = files_below(base / path, []) if "{name}" in template else [base / path]
        yield from filter(None, (_match(template, file.relative_to(base).as_posix()) for file in below))


@cache
def _expression(template: str) -> re.Pattern[str]:
    # Files whose names begin with a dot are what systems leave behind.
    parts = {"{split}": "(?P<split>[^/]+)", "{name}": "(?P<name>(?:[^/]+/)*[^./][^/]*)"}
    expression = "".join(parts.get(part, re.escape(part)) for part in re.split("({[a-z]+})", template))
    # An image named .JPG is one too.
    return re.compile(expression, re.IGNORECASE)


def _match(template: str, path: str) -> re.Match[str] | None:
    return _expression(template).fullmatch(path)


def _key(name: str) -> str:
    """What two spellings of an image's name, without suffix, most likely share: its last part, whatever its case."""
    return unicodedata.normalize("NFC", name.replace("\\", "/").rpartition("/")[2]).casefold()


def _stem(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))


def _are_equal(one: Path, other: Path) -> bool:
    """Whether two files have the same content; one that cannot be read is met when its turn comes."""
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _shown(item: tuple[int, str]) -> str:
    return f"{item[1]} ({item[0]})"


def read_names(path: Path) -> frozenset[str]:
    """Names of images, one a line, with or without folder and suffix.

    Raises:
        ValueError: the file has none.
    """
    names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{path} names no images: write a file name a line")
    return frozenset(PurePosixPath(_without_suffix(name)).name for name in names)


def _without_suffix(name: str) -> str:
    """The name in an image file's path; of anything else all of it."""
    path = PurePosixPath(name)
    return path.stem if path.suffix.lower() in image_files.SUFFIXES else name
