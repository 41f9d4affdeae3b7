"""`unseg protect`: images and folders of them."""

import argparse
import contextlib
import gc
import json
import math
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .image_tasks import Task, is_json, plan, refuse_overwriting
from .worker_processes import when_asked_to_end

STRENGTHS = {"low": 4.0, "medium": 8.0, "high": 16.0}  # epsilon in grey levels
WRITE_EVERY = 5.0  # seconds between two states of the report
MOST_THREADS = 8  # images at a time
PIXEL_BYTES = 20  # of memory, at most, that an image takes for each of its pixels


def add_protect(commands: Any) -> argparse.ArgumentParser:
    """Add the command to argparse's sub-parsers; its parser still lacks --model, --device and --bf16."""
    protect = commands.add_parser("protect", help="protect images", description="Protect images, folders of them too.")
    protect.set_defaults(run=run_protect)
    protect.add_argument("inputs", nargs="+", type=_path, metavar="INPUT", help="image files, or folders to search")
    protect.add_argument(
        "-o", "--output", type=_path, required=True, metavar="OUT", help="folder, or file for one image"
    )
    prompts = protect.add_argument_group(
        "what to protect (default: the objects that the generator finds; look at them with unseg inspect --picture)"
    )
    prompts.add_argument(
        "--masks",
        type=_path,
        metavar="PATH",
        help="mask file, folder of masks with the images' names, or COCO's json of the upright images: its objects, "
        "or all of their boxes (needs unseg-hf[layouts])",
    )
    prompts.add_argument(
        "--labels", action="store_true", help="the masks are label maps: every label but --ignore-labels is an object"
    )
    prompts.add_argument(
        "--ignore-labels", type=_numbers(int), nargs="+", metavar="N", help="with --labels (default: 0 255)"
    )
    prompts.add_argument(
        "--box",
        type=_numbers(float, 4),
        action="append",
        metavar="X0,Y0,X1,Y1",
        help="box around an object, in pixels; may be repeated",
    )
    prompts.add_argument(
        "--point",
        type=_numbers(float, 2, 3),
        action="append",
        metavar="X,Y[,0]",
        help="pixel on the object; 0: not on it; may be repeated",
    )
    prompts.add_argument(
        "--whole-image", action="store_true", help="everything; hardly protects, for it does not say where objects are"
    )
    prompts.add_argument(
        "--per-segment",
        action="store_true",
        help="a noise for each mask or label, not one for their union",
    )
    add_strength_options(protect)
    files = protect.add_argument_group("files")
    files.add_argument(
        "--format", choices=("png", "webp", "tiff", "jpeg"), default=None, help="default: png; jpeg is lossy"
    )
    files.add_argument("--quality", type=int, metavar="N", help="of jpeg, 1 to 100 (default: 95)")
    files.add_argument("--overwrite", action="store_true", help="do images again whose output is there")
    files.add_argument("--json", type=_path, metavar="FILE", help="write a report of every image")
    return protect


def add_strength_options(parser: argparse.ArgumentParser) -> None:
    strength = parser.add_argument_group("strength")
    strength.add_argument("--strength", choices=STRENGTHS, help="epsilon 4, 8 or 16 (default: the model's, mostly 8)")
    strength.add_argument(
        "--epsilon",
        type=float,
        metavar="N",
        help="largest change in a mask, in grey levels of 255; smooth parts may get less",
    )
    strength.add_argument(
        "--epsilon-background",
        type=float,
        metavar="N",
        help="largest change elsewhere, with --epsilon or --strength (default: as much smaller as the model's is)",
    )
    strength.add_argument(
        "--tint",
        choices=("auto", "always", "never"),
        default="auto",
        help="a flat tint in place of waves, for masks without a class (default: for small things, such as cells); "
        "best alike in a data set",
    )


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("it is empty: a variable that is not set, maybe; . is the folder here")
    return Path(text)


def _numbers(kind: type, *counts: int):
    def parse(text: str) -> tuple:
        try:
            values = tuple(kind(part) for part in text.split(","))
        except ValueError:
            values = ()
        if not values or (counts and len(values) not in counts):
            wanted = " or ".join(map(str, counts)) or "some"
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} numbers with commas between them")
        return values

    return parse


def run_protect(options: argparse.Namespace) -> int:
    epsilon, background = budget_of(options)
    given = [n for n in ("masks", "box", "point", "whole_image") if getattr(options, n)]
    if len(given) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{names} were given: pass one kind of prompt")
    if options.labels and not options.masks:
        raise ValueError("--labels needs --masks")
    of_coco = is_json(options.masks)
    if options.labels and of_coco:
        raise ValueError(f"--labels is for mask images, not for {options.masks}")
    one_mask = options.masks and not (options.labels or of_coco)
    if options.per_segment and (options.whole_image or options.point or one_mask):
        raise ValueError(
            "--per-segment needs several masks: --labels, COCO's json, --box more than once, or no prompt"
        )
    if options.ignore_labels is not None and not options.labels:
        raise ValueError("--ignore-labels needs --labels")
    if options.quality is not None and not 1 <= options.quality <= 100:
        raise ValueError(f"--quality {options.quality}: must be from 1 to 100")
    unreadable: list[str] = []
    tasks = plan(options.inputs, options.output, options.format, options.masks, unreadable)
    if options.quality is not None and not any(_is_lossy(task.target) for task in tasks):
        raise ValueError(f"--quality {options.quality} is for --format jpeg")
    if options.json:
        folders = {parent for task in tasks for parent in task.target.parents}
        files = (p for t in tasks for p in (t.source, t.mask, t.target))
        refuse_overwriting("--json", [options.json], (*folders, *files))

    import psutil
    from tqdm import tqdm

    from .image_files import printable
    from .overlap import Room, in_threads

    report, measure = Report(options.json), bool(options.json) or len(tasks) == 1
    report.write()  # where that is impossible, it is known before the work
    with _without_garbage_collection():
        prompt = _prompt_of(options)
        protector = load_protector(options.model, options.device, options.bf16)
    try:
        with (
            # As by Ctrl-C: what is finished is kept and reported.
            when_asked_to_end(signal.default_int_handler),
            _shared_processor(protector, len(tasks)) as (threads, model_turn),
            tqdm(total=len(tasks), unit="image", disable=len(tasks) < 2 or not sys.stderr.isatty()) as progress,
        ):
            # Half of the memory that is free: of large photos fewer are worked on at a time.
            room = Room(max(1, psutil.virtual_memory().available // 2 // PIXEL_BYTES))
            work = _Worker(protector, model_turn, room, options, prompt, (epsilon, background), measure)

            def record(task: Task, outcome: dict[str, Any]) -> None:
                report.add(task, **outcome)
                report.write_now_and_then()
                if "error" in outcome:
                    tqdm.write(f"unseg: {printable(outcome['error'])}", file=sys.stderr)
                progress.update()

            in_threads(tasks, work, record, threads)
        for folder in unreadable:
            print(f"unseg: {printable(folder)}", file=sys.stderr)
        report.print_summary()
    finally:
        report.write()
    return 1 if report.count("failed") or unreadable else 0


def _prompt_of(options: argparse.Namespace):
    """What to protect in each image, without its mask; ValueError for a box or point that makes no sense."""
    from .inputs import Prompt

    return Prompt(
        boxes=options.box,
        points=[point[:2] for point in options.point] if options.point else None,
        point_labels=[point[2] if len(point) == 3 else 1 for point in options.point] if options.point else None,
        whole_image=options.whole_image,
        mode="per_segment" if options.per_segment else "union",
        tint=options.tint,
        **({} if options.ignore_labels is None else {"ignore_labels": sum(options.ignore_labels, ())}),
    )


@contextlib.contextmanager
def _shared_processor(protector, images: int) -> Iterator[tuple[int, Any]]:
    """How many images to work on at a time, and what to enter for the time that one is in the model."""
    import torch

    from .protection import one_thread

    at_a_time = min(torch.get_num_threads(), images, MOST_THREADS)
    device = protector.model.device
    if protector.uses_all_threads:
        # It takes half a gigabyte an image.
        yield at_a_time, threading.Lock()
        return
    if device.type == "cuda" and images > 1:
        try:
            protector.record_encoder()
        except RuntimeError as error:  # too little memory, mostly
            from .image_files import one_line

            raise ValueError(f"the generator does not run on {str(device)!r}: {one_line(error)}") from error
    # A GPU has one image on its way there or back while it works on another; a Mac's ends a process whose threads use
    # it at a time.
    turns = {"cpu": contextlib.nullcontext(), "cuda": threading.Semaphore(2)}
    # One thread of torch's an image, also for its figures.
    with one_thread():
        yield at_a_time, turns.get(device.type) or threading.Lock()


def shares_of(
    epsilon: float | None, background: float | None, names: tuple[str, str] = ("epsilon", "epsilon_background")
) -> tuple[float | None, float | None]:
    """A budget in grey levels of 255 as shares of the pixel range; None is the model's.

    Raises:
        ValueError: one that makes no sense, by the names that the user knows.
    """
    for name, value in zip(names, (epsilon, background), strict=True):
        if value is not None and not 0 <= value <= 255:
            raise ValueError(f"{name} {value:g}: must be from 0 to 255 grey levels")
    if background is not None and epsilon is None:
        raise ValueError(f"{names[1]} {background:g} needs {names[0]}: give both")
    if background is not None and background > epsilon:
        raise ValueError(f"{names[1]} {background:g} is above {names[0]} {epsilon:g}")
    return tuple(None if value is None else value / 255 for value in (epsilon, background))


def budget_of(options: argparse.Namespace) -> tuple[float | None, float | None]:
    """(epsilon, epsilon_background) as shares of the pixel range; None is the model's."""
    if options.strength and options.epsilon is not None:
        raise ValueError(f"--strength {options.strength} and --epsilon {options.epsilon:g} were given: pass one")
    epsilon = STRENGTHS.get(options.strength, options.epsilon)
    return shares_of(epsilon, options.epsilon_background, ("--epsilon", "--epsilon-background"))


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Importing allocates much and frees nothing: looking for garbage meanwhile takes a tenth of the time."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@_without_garbage_collection()
def load_protector(model: str | None, device: str, bf16: bool = False):
    from transformers.utils import logging

    from .protection import load_generator

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return load_generator(model, device, bf16=bf16)


def _is_lossy(target: Path) -> bool:
    from . import image_files

    return image_files.SUFFIXES[target.suffix.lower()] in image_files.LOSSY_FORMATS


@dataclass(frozen=True)
class _Worker:
    """Does an image.

    Args:
        protector: with the generator.
        model_turn: what to enter for the time that the image is in its model.
        room: for the pixels of all images that are worked on.
        options: of the command.
        prompt: what to protect, but for the image's own mask.
        budget: epsilon and epsilon_background, as shares.
        measure: whether to report all figures.
    """

    protector: Any
    model_turn: Any
    room: Any
    options: argparse.Namespace
    prompt: Any
    budget: tuple[float | None, float | None]
    measure: bool

    def __call__(self, task: Task) -> dict[str, Any]:
        """What became of an image: `status`, and its `report` or the line of its `error`."""
        from . import image_files
        from .image_files import one_line

        try:
            # What is no file, a folder or a link to nowhere, is no earlier output: writing says what it is.
            if task.target.is_file() and not self.options.overwrite:
                return {"status": "skipped", "older": _is_older(task.target, task.source, task.mask)}
            with self.room.taken(math.prod(image_files.size_of(task.source))):
                return {"status": "protected", "report": self._protect(task)}
        # One bad image must not stop the others, whatever is wrong with it.
        except Exception as error:
            text = one_line(error)
            mask = f" with {task.mask}" if task.mask and str(task.mask) not in text else ""
            return {"status": "failed", "error": text if str(task.source) in text else f"{task.source}{mask}: {text}"}

    def _protect(self, task: Task) -> dict[str, Any]:
        """Protects and writes one image; reports notes, and on `measure` the figures of the file that was written."""
        from . import image_files
        from .fidelity import compare
        from .inspection import share_left

        quality = 95 if self.options.quality is None else self.options.quality
        job = self.protector.prepare(*self._image_and_prompt(task), *self.budget)
        with self.model_turn:
            decoded = self.protector.decode(job, self.protector.encode([job])[0])
        protected = self.protector.apply(job, decoded)
        with ThreadPoolExecutor(1) as aside:
            writing = aside.submit(image_files.write, protected.picture, task.target, self.options.format, quality)
            # SSIM alone takes longer than protecting: not for every image of a folder that nobody asked about.
            few = {"notes": list(protected.notes), "protected_share": protected.share, "tinted": protected.tinted}
            report = (protected.report if self.measure else few) | {"unchanged": protected.unchanged}
            written = writing.result()
        report["notes"] += [note for note in written.notes if note not in report["notes"]]
        if _is_lossy(task.target):
            clean = image_files.read(image_files.encode(protected.original, "jpeg", quality)).rgb8()
            report |= compare(protected.original, written, protected.region) if self.measure else {}
            report["noise_left"] = share_left(protected.original, protected.picture, clean, written.rgb8())
            report["notes"].append("JPEG changes pixels beyond the bound and takes part of the noise; png keeps all")
        return report

    def _image_and_prompt(self, task: Task) -> tuple[Any, Any]:
        """What is read of a task, and what to protect in it."""
        from . import image_files

        if is_json(task.mask):
            from .layouts.annotations import prompt_of

            if task.annotation is None:
                raise ValueError(f"{task.source}: {task.mask} has no image of this name")
            image = image_files.read(task.source)
            segments = task.annotation.segments((image.height, image.width), None, self.options.per_segment)
            return image, prompt_of(segments, self.prompt.mode, self.prompt.tint)
        if task.mask:
            kind = "label_map" if self.options.labels else "mask"
            return task.source, replace(self.prompt, **{kind: image_files.read_mask(task.mask)})
        return task.source, self.prompt


class Report:
    """What happened to each image: for the screen, and for `--json`, where entries of earlier runs are kept."""

    def __init__(self, path: Path | None):
        self.path, self.entries, self._written = path, [], 0.0
        self.earlier: dict[str, dict] = {}
        if path is not None and path.is_dir():
            raise ValueError(f"--json {path} is a folder: name a file")
        if path is not None and path.exists():
            try:
                self.earlier = {entry["output"]: entry for entry in json.loads(path.read_text())["images"]}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"--json {path} is there and no report of this command: choose another name"
                ) from error

    def add(self, task: Task, status: str, **details: Any) -> None:
        earlier = self.earlier.get(str(task.target), {}) if status == "skipped" else {}
        if earlier and _are_two(Path(earlier["input"]), task.source):
            earlier = {}  # what is there was made of the other one
        entry = earlier | {"input": str(task.source), "output": str(task.target), "status": status} | details
        # One that came while the run was stopped comes once more.
        again = self.entries and self.entries[-1]["output"] == entry["output"]
        self.entries[len(self.entries) - bool(again) :] = [entry]

    def count(self, status: str) -> int:
        return sum(entry["status"] == status for entry in self.entries)

    def write_now_and_then(self) -> None:
        """Write it if the last time is a while ago: a process that is killed says nothing any more."""
        if time.monotonic() - self._written > WRITE_EVERY:
            self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        if self.path is not None:
            from .image_files import put_in_place

            entries = self.earlier | {entry["output"]: entry for entry in self.entries}
            put_in_place(json.dumps({"images": list(entries.values())}, indent=2).encode(), self.path)

    def print_summary(self) -> None:
        from .image_files import printable

        reports = [entry["report"] for entry in self.entries if entry["status"] == "protected"]
        if len(self.entries) == 1 and reports:
            entry, report = self.entries[0], reports[0]
            print(f"{printable(entry['input'])} -> {printable(entry['output'])}")
            inside, outside = report["max_noise"], report["max_noise_background"]
            print(f"  max |noise|   {inside:g} of 255 in the mask, {outside:g} outside")
            print(f"  mask          {report['protected_share']:.0%} of the image, {report['masks']} mask(s)")
            print(f"  PSNR          {decibels(report['psnr'])}")
            print(f"  SSIM          {report['ssim']:.4f}")
            print(f"  time          {report['seconds']:.2f} s")
        elif reports:
            from statistics import median

            shares = [report["protected_share"] for report in reports]
            print(f"noise on {median(shares):.0%} of an image (median; {min(shares):.0%} to {max(shares):.0%})")
            tinted = Counter(report["tinted"] for report in reports)
            say_of_tints(tinted[True], tinted[False])
        for note, count in Counter(note for report in reports for note in report["notes"]).items():
            print(f"  note          {note}" if len(self.entries) == 1 else f"note ({count} images): {note}")
        left = [report["noise_left"] for report in reports if report.get("noise_left") is not None]
        if left:
            print(f"JPEG left {sum(left) / len(left):.0%} of the noise" + (" on average" if len(left) > 1 else ""))
        skipped, failed = self.count("skipped"), self.count("failed")
        unchanged = sum(report["unchanged"] for report in reports)
        summary = f"{len(reports) - unchanged} protected"
        if unchanged:
            summary += f", {unchanged} written as they were (the notes say why)"
        if skipped:
            older = sum(entry.get("older", False) for entry in self.entries)
            than = f", {older} of them older than their photo or mask" if older else ""
            summary += f", {skipped} skipped (already there, whatever the settings{than}; --overwrite does them again)"
        if failed:
            summary += f", {failed} failed"
        print(summary)


def _is_older(target: Path, *sources: Path | None) -> bool:
    """Whether something that an output was made of has been changed since."""
    with contextlib.suppress(OSError):
        made = target.stat().st_mtime
        return any(source.stat().st_mtime > made for source in sources if source)
    return False


def _are_two(one: Path, other: Path) -> bool:
    """Whether two files are there, and not one that is named in two ways."""
    try:
        return not one.samefile(other)
    except OSError:
        return False


def say_of_tints(tints: int, waves: int) -> None:
    """Of images of which some have a tint and others, that might have one, do not: what to do about it."""
    if tints and waves:
        print(
            f"note: images with a tint: {tints}, with waves: {waves}; a model learns from a few that are "
            "unlike the others as from clean images: in one data set, take --tint never for photographs, --tint "
            "always for small things (images of one channel always have waves)"
        )


def decibels(psnr: float | None) -> str:
    return "no difference" if psnr is None else f"{psnr:.1f} dB"
