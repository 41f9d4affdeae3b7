"""Which files a command works on: images, where their outputs go, and their masks."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any


@dataclass(frozen=True)
class Task:
    """One image: where it is, where its protected version goes, and the file of its mask, if masks were given; where
    that is COCO's json, what it says of the image, None if nothing."""

    source: Path
    target: Path
    mask: Path | None = None
    annotation: Any = None


def plan(
    inputs: Iterable[Path], output: Path, format: str | None, masks: Path | None, unreadable: list[str]
) -> list[Task]:
    """The work: every image of `inputs`, the file it becomes, and its mask.

    Args:
        inputs: files, and folders that are searched.
        output: folder, or file for one image.
        format: of the outputs; None is the suffix of an output file, and PNG in a folder.
        masks: mask file for one image, folder of masks with the names of the images, or COCO's json.
        unreadable: gets a line for each folder that cannot be searched.

    Raises:
        ValueError: no images, an output that would replace an input, a mask or another output, or a file name whose
            suffix contradicts the format.
    """
    from . import image_files

    found: dict[Path, Path] = {}  # the file, and where it goes below the output
    apart = {what: _real(path) for what, path in (("output", output), ("masks", masks)) if path is not None}
    # A folder that was named in two ways is one.
    for real, item in {_real(item): item for item in inputs}.items():
        if item.is_dir():
            if same := [what for what, other in apart.items() if other == real]:
                raise ValueError(f"{item} is the folder of the images and of the {same[0]}: keep them apart")
            for path in images_in(item, unreadable, apart.values()):
                found.setdefault(path, path.relative_to(item))
        else:
            found.setdefault(item, Path(item.name))
    if not found and unreadable:
        raise ValueError(unreadable[0])
    if not found:
        raise ValueError(
            f"no images in {', '.join(map(str, inputs))}: looked for {' '.join(image_files.READ_SUFFIXES)}"
        )
    to_file = bool(output.suffix) and not output.is_dir() and output.suffix.lower() in image_files.READ_SUFFIXES
    if to_file and len(found) > 1:
        raise ValueError(f"{output} is one file for {len(found)} images: name a folder")
    wanted = image_files.SUFFIXES.get(output.suffix.lower()) if to_file else format or "png"
    if wanted is None:
        raise ValueError(f"{output}: cannot write {output.suffix} files; use {', '.join(image_files.SUFFIXES)}")
    if format is None and wanted in image_files.LOSSY_FORMATS:
        raise ValueError(
            f"{output}: {wanted} loses part of the noise; write .png, or ask for it with --format {wanted}"
        )
    if format not in (None, wanted):
        raise ValueError(f"{output} is no {format} file: name it {output.with_suffix(f'.{format}')}")
    suffix = (image_files.LOSSLESS_FORMATS | image_files.LOSSY_FORMATS)[wanted]

    annotation_of = annotations_of(masks, found) if is_json(masks) else {}
    mask_of = dict.fromkeys(found, masks) if is_json(masks) else match_masks(masks, found)
    sharing = Counter(relative.with_suffix("") for relative in found.values())
    tasks: dict[Path, Task] = {}
    for source, relative in found.items():
        # a.jpg beside a.heic: both keep their own suffix in the name.
        name = relative.with_suffix("") if sharing[relative.with_suffix("")] == 1 else relative
        target = output if to_file else output / name.with_name(name.name + suffix)
        if target in tasks:
            raise ValueError(
                f"{tasks[target].source} and {source} would both become {target}: rename one, or protect "
                "their folders one by one"
            )
        tasks[target] = Task(source, target, mask_of.get(source), annotation_of.get(source))
    refuse_overwriting("the output", tasks, (p for t in tasks.values() for p in (t.source, t.mask)))
    return list(tasks.values())


def is_json(masks: Path | None) -> bool:
    return masks is not None and masks.suffix.lower() == ".json"


def annotations_of(path: Path, images: dict[Path, Path]) -> dict[Path, Any]:
    """What COCO's json says of images: by their paths below their folders, or their names where those are unique on
    both sides; arguments and errors as for `match_masks`, and a ValueError for a json that is not COCO's."""
    if not path.is_file():
        raise ValueError(f"{path}: no such json file")
    from .layouts.coco import CocoInstances

    index = CocoInstances("{split}").index(path.parent, path.name)
    last_part = {name: PurePosixPath(name).name for name in index.names}
    listed, stems = Counter(last_part.values()), Counter(relative.stem for relative in images.values())
    by_stem = {last: name for name, last in last_part.items() if listed[last] == stems[last] == 1}
    found: dict[Path, Any] = {}
    owners: dict[str, Path] = {}
    for source, relative in images.items():
        name = relative.with_suffix("").as_posix()
        name = name if name in index.names else by_stem.get(relative.stem, name)
        owner = owners.setdefault(name, source)
        found[source] = index.find(name)
        # As for mask files.
        if found[source] is not None and owner.with_suffix("") != source.with_suffix(""):
            raise ValueError(
                f"{owner} and {source} would both get the objects of {name} in {path}: protect the folders one by one"
            )
    return found


def match_masks(masks: Path | None, images: dict[Path, Path]) -> dict[Path, Path]:
    """The mask file of each image: by its path below the folder, or by its name where that is unique on both sides.

    Args:
        masks: file for one image, or folder; None is no masks.
        images: files, and their paths below the folders that were searched.

    Raises:
        ValueError: no such file or folder, a name that several masks have, or images of several folders have.
    """
    if masks is None:
        return {}
    if not masks.exists():
        raise ValueError(f"{masks}: no such mask file or folder")
    if masks.is_file():
        if len(images) > 1:
            raise ValueError(f"one mask file for {len(images)} images: pass a folder with a mask for each")
        return dict.fromkeys(images, masks)
    unreadable: list[str] = []
    paths = [path.relative_to(masks) for path in images_in(masks, unreadable)]
    if unreadable:
        raise ValueError(unreadable[0])
    by_path = {path.with_suffix(""): path for path in paths}
    if len(by_path) < len(paths):
        twice = next(key for key, count in Counter(p.with_suffix("") for p in paths).items() if count > 1)
        raise ValueError(f"{masks / twice}: several mask files with this name; keep one")
    owners: dict[Path, Path] = {}
    for source, path in images.items():
        # a.jpg beside a.heic are one picture; those of two folders are not.
        owner = owners.setdefault(path.with_suffix(""), source)
        if path.with_suffix("") in by_path and owner.with_suffix("") != source.with_suffix(""):
            mask = masks / by_path[path.with_suffix("")]
            raise ValueError(f"{owner} and {source} would both get the mask {mask}: protect the folders one by one")
    mask_names, image_names = (Counter(path.stem for path in some) for some in (paths, images.values()))
    by_name = {p.stem: p for p in paths if mask_names[p.stem] == 1 and image_names[p.stem] == 1}
    return {
        # One that is missing is named when its image's turn comes.
        source: masks / (by_path.get(path.with_suffix("")) or by_name.get(path.stem) or path.with_suffix(".png"))
        for source, path in images.items()
    }


def files_below(folder: Path, unreadable: list[str]) -> Iterator[Path]:
    """All but folders in a folder and those below it, each folder once, however many links lead there; `unreadable`
    gets a line for each that cannot be searched."""

    def complain(error: OSError) -> None:
        unreadable.append(f"{error.filename}: this folder cannot be read ({error.strerror})")

    seen: set[Path] = set()
    for parent, folders, names in os.walk(folder, onerror=complain, followlinks=True):
        # Links come last, and lead nowhere where they lead to what was searched already, a folder above them maybe.
        if (real := _real(Path(parent))) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort(key=lambda name: (os.path.islink(os.path.join(parent, name)), name))
        yield from (Path(parent, name) for name in names)


def images_in(folder: Path, unreadable: list[str], apart: Iterable[Path] = ()) -> list[Path]:
    """Image files in a folder and those below it, but not below folders `apart` inside it; `unreadable` gets a line
    for each folder that cannot be searched."""
    from .image_files import READ_SUFFIXES

    images = [path for path in files_below(folder, unreadable) if path.suffix.lower() in READ_SUFFIXES]
    # A link to nothing is named when its turn comes; for a pipe it would never end.
    images = [path for path in images if os.path.isfile(path) or not os.path.exists(path)]
    root = _real(folder)
    # What lies inside the folder and is none of its images: a next run would protect the output again.
    inside = {real for real in map(_real, apart) if root in real.parents}
    return sorted(path for path in images if not inside or inside.isdisjoint([where := _real(path), *where.parents]))


def stays_inside(name: str) -> bool:
    """Whether a path with `/` that somebody else has written leads nowhere out of the folder that it belongs to."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def refuse_overwriting(what: str, targets: Iterable[Path], kept: Iterable[Path | None]) -> None:
    needed = {_real(path) for path in kept if path is not None}
    # Where capitals do not count, another spelling is the same file.
    alike = {str(path).casefold(): path for path in needed}
    for target in targets:
        other = alike.get(str(real := _real(target)).casefold())
        if real in needed or (other is not None and real.exists() and other.exists() and real.samefile(other)):
            raise ValueError(f"{what} {target} would replace a file that is needed: choose another name")


def _real(path: Path) -> Path:
    """Where a path leads; unlike pathlib's, this is no error for a loop of links."""
    return Path(os.path.realpath(path))
