"""The run over a data set: protect, copy, record. Stopped anywhere, it goes on later and ends with the same tree."""

import errno
import hashlib
import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

import unseg_hf
from unseg_hf import image_files
from unseg_hf.fidelity import noise_levels
from unseg_hf.protection import Protector
from unseg_hf.worker_processes import end_with_parent

from .annotations import Annotation, prompt_of
from .bounded_jpeg import encode_within_bound
from .tree import JPEG_SUFFIXES, ImageTask, Plan

RECORD, SETTINGS = "unseg-protected.jsonl", "unseg-protected.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors that every further file would meet as well."""

WAITING = 4
"""Images a process that are handed out at a time."""


@dataclass(frozen=True)
class Settings:
    """All that the output depends on beside the input's files.

    Args:
        data_set: its name.
        input: its folder, see [`folder_identity`].
        splits: whose images are protected.
        names: SHA-256 of the names of the images to protect; None for all.
        classes: numbers of the classes to protect; None for all.
        per_segment: prompt once for each segment, for the noise of its class.
        tint: when segments without a class get a tint, see [`Prompt`].
        epsilon, epsilon_background: the budget in grey levels of 255.
        jpeg_names: "png-bytes", "jpeg" or "rename".
        quality: of JPEG; None where none is written.
        link: how files are taken over that stay as they are: "hard" or "symbolic", None to copy.
        model: the generator's identity, see `model_identity`.
        version: of this package.
    """

    data_set: str
    input: str
    splits: tuple[str, ...]
    names: str | None
    classes: tuple[int, ...] | None
    per_segment: bool
    tint: str
    epsilon: float
    epsilon_background: float
    jpeg_names: str
    quality: int | None
    link: str | None
    model: str
    version: str = unseg_hf.__version__


class Journal:
    """What happened to each file, a JSON line each, by its path in the output; open for additions in a `with` block.

    Args:
        output: root of the output.

    Raises:
        ValueError: the record is damaged.
    """

    def __init__(self, output: Path):
        self.path, self.entries = output / RECORD, {}
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        # A process that was killed may have left half a line.
        for line in lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]:
            try:
                entry = json.loads(line)
                path = PurePosixPath(entry["path"])
                if path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"{path} leads out of it")  # and would be removed
                self.entries[entry["path"]] = entry
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} is damaged: remove the output and start anew") from error

    def __enter__(self) -> "Journal":
        self._write()
        self._file = open(self.path, "a")
        return self

    def __exit__(self, *error) -> None:
        self._file.close()
        # In one order, whatever the order in which things were done.
        self._write()

    def add(self, entry: dict[str, Any]) -> None:
        self.entries[entry["path"]] = entry
        print(json.dumps(entry), file=self._file, flush=True)

    def _write(self) -> None:
        lines = "".join(json.dumps(entry) + "\n" for _, entry in sorted(self.entries.items()))
        image_files.put_in_place(lines.encode(), self.path)


@dataclass(frozen=True)
class Worker:
    """Protects images of one data set.

    Args:
        protector: with the generator.
        root: of the data set.
        output: root of the output.
        settings: see there.
    """

    protector: Protector
    root: Path
    output: Path
    settings: Settings

    def __call__(self, task: ImageTask) -> dict[str, Any]:
        """Protect and write an image; the entry for the record, whatever happened."""
        entry = {"path": task.target} | ({"source": task.path} if task.path != task.target else {})
        target = self.output / task.target
        try:
            # A link would be followed to the original.
            if target.is_symlink():
                target.unlink()
            return entry | self._protect(task, self.root / task.path, target)
        # One bad image must not stop the others, whatever is wrong with it.
        except Exception as error:
            target.unlink(missing_ok=True)
            if _number_of(error) in NO_ROOM:
                raise
            return entry | _failure(task.path, error, self.root, self.output)

    def _protect(self, task: ImageTask, source: Path, target: Path) -> dict[str, Any]:
        settings = self.settings
        if task.listed_as:
            raise ValueError(f"a list has it as {task.listed_as}, and no image is called so: give both the same name")
        if task.annotation is None:
            raise ValueError("it is in a split to be protected, but its annotation is missing")
        # Before anything is read: what is edited meanwhile is done again by the next run.
        state = _state(self.root, task.path, task.annotation)
        original = image_files.read(source, upright=False)
        segments = task.annotation.segments(
            (original.height, original.width),
            None if settings.classes is None else frozenset(settings.classes),
            settings.per_segment,
        )
        protected = self.protector.protect(
            original,
            prompt_of(segments, "per_segment" if settings.per_segment else "union", settings.tint),
            epsilon=settings.epsilon / 255,
            epsilon_background=settings.epsilon_background / 255,
        )
        costs = {}
        if settings.jpeg_names == "jpeg" and target.suffix.lower() in JPEG_SUFFIXES:
            jpeg = encode_within_bound(protected, settings.quality)
            image_files.put_in_place(jpeg.data, target)
            written = jpeg.picture
            costs = {"noise_left": jpeg.noise_left, "over_bound_share": jpeg.over_share}
            costs["over_bound_levels"] = jpeg.over_levels
        else:
            format = "png" if target.suffix.lower() in JPEG_SUFFIXES else None
            written = image_files.write(protected.picture, target, format)
        difference = np.abs(written.pixels.astype(np.int32) - original.pixels)
        return {
            "status": "protected",
            "bytes": target.stat().st_size,
            **state,
            "sha256": image_files.sha256_of(target),
            "input_sha256": image_files.sha256_of(source),
            "epsilon": settings.epsilon,
            "epsilon_background": settings.epsilon_background,
            "masks": protected.masks,
            "tinted": protected.tinted,
            "unchanged": protected.unchanged,
            "mask_share": protected.share,
            **noise_levels(original, written, protected.region),
            "mean_noise": float(difference.mean()) * 255 / original.max_value,
            **costs,
            "notes": list(protected.notes),
        }


def folder_identity(folder: Path) -> str:
    """The name of a folder and the beginning of its path's SHA-256: the output is published, the path need not be."""
    folder = folder.resolve()
    return f"{folder.name} ({hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]})"


def prepare_output(output: Path, settings: Settings) -> None:
    """Make the output folder, or check that it is one of an earlier run with the same settings.

    Raises:
        ValueError: it is not, naming the setting that differs.
    """
    path, wanted = output / SETTINGS, json.loads(json.dumps(asdict(settings)))
    if path.exists():
        try:
            earlier = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged: remove the output and start anew") from error
        for name, value in wanted.items():
            if earlier.get(name) != value:
                raise ValueError(
                    f"{output} was begun with {name}={earlier.get(name)!r}, and now {name}={value!r}: "
                    "choose another output, or repeat the settings"
                )
        return
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} is there, and not from this command: choose another output")
    image_files.put_in_place((json.dumps(wanted, indent=2) + "\n").encode(), path)


def run(
    plan: Plan,
    root: Path,
    output: Path,
    settings: Settings,
    load: Callable[[], Protector],
    processes: int = 1,
    progress: Callable[[Iterable, int], Iterable] = lambda entries, total: entries,
) -> list[dict[str, Any]]:
    """Do what is planned and has not been done.

    Args:
        plan: for the data set.
        root: of the data set.
        output: prepared by [`prepare_output`], and this run's alone; what a killed one left half-written goes.
        settings: see there.
        load: makes a protector; called in each process, so it must be picklable for several.
        processes: that protect images at the same time.
        progress: shows an iterable of entries, given their number, as tqdm does.

    Returns:
        The entries of the record for all planned files.

    Raises:
        OSError: the output cannot be written.
        RuntimeError: a process died.
    """
    for half_written in image_files.leftovers(output):
        half_written.unlink()
    with Journal(output) as journal:
        # What earlier runs wrote and this one does not: other images were in the lists, or other files in the input.
        for path in set(journal.entries).difference(plan.copies, (task.target for task in plan.images)):
            (output / path).unlink(missing_ok=True)
            journal.entries.pop(path, None)
        copies = [path for path in plan.copies if not _is_done(journal, root, output, path, None)]
        images = [task for task in plan.images if not _is_done(journal, root, output, task.path, task)]
        for path in progress(copies, len(copies)):
            journal.add(_take_over(root, output, path, settings.link))
        for entry in progress(_protected(images, load, (root, output, settings), processes), len(images)):
            journal.add(entry)
    return [journal.entries[path] for path in [*plan.copies, *(task.target for task in plan.images)]]


def _is_done(journal: Journal, root: Path, output: Path, path: str, task: ImageTask | None) -> bool:
    """Whether a file was protected, or without a task taken over, and nothing has changed since."""
    target = path if task is None else task.target
    entry = journal.entries.get(target, {"status": "failed"})
    if entry["status"] == "failed" or (entry["status"] == "protected") != (task is not None):
        return False
    try:
        state = _state(root, path, task.annotation if task else None)
        return entry.items() >= {"bytes": (output / target).stat().st_size, **state}.items()
    except (OSError, ValueError):
        return False


def _take_over(root: Path, output: Path, path: str, link: str | None) -> dict[str, Any]:
    """Copy or link a file; the entry for the record, whatever happened."""
    source, target = root / path, output / path
    try:
        state = _state(root, path, None)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        if link is None:
            done = {"status": "copied", "sha256": image_files.copy_in_place(source, target)}
        else:
            original = os.path.realpath(source, strict=True)
            (os.link if link == "hard" else os.symlink)(original, target)
            done = {"status": f"{link} link"}
        return {"path": path, **done, "bytes": target.stat().st_size, **state}
    except (OSError, ValueError) as error:
        if _number_of(error) == errno.EXDEV:
            raise ValueError("--link hard: the output is on another disk; use --link symbolic") from error
        if _number_of(error) in NO_ROOM:
            raise
        return {"path": path, **_failure(path, error, root, output)}


def _protected(tasks: list[ImageTask], load, place: tuple, processes: int) -> Iterator[dict[str, Any]]:
    if not tasks:
        return
    if processes == 1:
        yield from map(Worker(load(), *place), tasks)
        return
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(load, place, max(1, torch.get_num_threads() // processes)),
    )
    waiting = set()
    try:
        for task in tasks:
            waiting.add(pool.submit(_work, task))
            if len(waiting) == WAITING * processes:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in waiting)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a process died, maybe for lack of memory: run the command again to go on, with fewer --processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start(load: Callable[[], Protector], place: tuple, threads: int) -> None:
    """Begin as a worker process."""
    global _worker
    end_with_parent()
    torch.set_num_threads(threads)
    _worker = Worker(load(), *place)


def _work(task: ImageTask) -> dict[str, Any]:
    return _worker(task)


def _state(root: Path, path: str, annotation: Annotation | None) -> dict[str, Any]:
    """Size and time of an input file, and of the annotation files that its result depends on, as json has them."""
    status = (root / path).stat()
    state: dict[str, Any] = {"input_bytes": status.st_size, "input_mtime_ns": status.st_mtime_ns}
    if annotation is not None:
        # Of one that is missing, reading the masks says more.
        there = [file for file in annotation.files if file.exists()]
        statuses = [(file.relative_to(root).as_posix(), file.stat()) for file in there]
        state["annotation"] = [[name, one.st_size, one.st_mtime_ns] for name, one in statuses]
    return state


def _number_of(error: Exception) -> int | None:
    """The system's number for what went wrong, also where an error of this package says it."""
    return getattr(error.__cause__ or error, "errno", None)


def _failure(path: str, error: Exception, *folders: Path) -> dict[str, Any]:
    """What is recorded of a file that failed, without the paths of the folders: the record is published."""
    text = image_files.one_line(error)
    for folder in folders:
        for written in {str(folder.resolve()), str(folder.absolute()), str(folder)}:
            text = text.replace(f"{written}{os.sep}", "")
            if os.path.isabs(written):
                text = text.replace(written, "the folder")
    return {"status": "failed", "error": text if path in text else f"{path}: {text}"}
