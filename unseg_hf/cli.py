"""The `unseg` command."""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STRENGTHS = {"low": 4.0, "medium": 8.0, "high": 16.0}  # epsilon in grey levels; the background gets a quarter
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".heic", ".heif")


class UsageError(Exception):
    """What was asked for cannot be done; the message says why and what would work."""


@dataclass(frozen=True)
class Task:
    """One image: where it is, where its protected version goes, and its mask file if masks were given."""

    source: Path
    target: Path
    mask: Path | None = None


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 if an image failed, 2 for a request that makes no sense."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (UsageError, ValueError, OSError) as error:
        print(f"unseg: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unseg: stopped; run it again to go on, finished images are skipped", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unseg", description="Publish images that spoil the segmentation models trained on them."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    protect = commands.add_parser("protect", help="protect images", description="Protect images, folders of them too.")
    protect.set_defaults(run=run_protect)
    protect.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="image files, or folders to search")
    protect.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder, or file for one image"
    )
    prompts = protect.add_argument_group("what to protect (default: the objects that SAM finds)")
    prompts.add_argument("--masks", type=Path, metavar="PATH", help="a mask file, or a folder of them matched by name")
    prompts.add_argument(
        "--labels", action="store_true", help="the masks are label maps: every label but --ignore-labels is an object"
    )
    prompts.add_argument(
        "--ignore-labels", type=_numbers(int), default=(0, 255), metavar="N,N", help="with --labels (default: 0,255)"
    )
    prompts.add_argument(
        "--box",
        type=_numbers(float, 4),
        action="append",
        metavar="X0,Y0,X1,Y1",
        help="box around an object, in pixels",
    )
    prompts.add_argument(
        "--point",
        type=_numbers(float, 2, 3),
        action="append",
        metavar="X,Y[,0]",
        help="pixel on the object; 0: not on it",
    )
    prompts.add_argument("--whole-image", action="store_true", help="everything, at full strength")
    prompts.add_argument("--per-segment", action="store_true", help="own noise for each mask, not one for their union")
    strength = protect.add_argument_group("strength")
    strength.add_argument("--strength", choices=STRENGTHS, help="epsilon 4, 8 or 16 (default: the model's, mostly 8)")
    strength.add_argument("--epsilon", type=float, metavar="N", help="largest change in a mask, in grey levels of 255")
    strength.add_argument(
        "--epsilon-background",
        type=float,
        metavar="N",
        help="largest change elsewhere (default: a quarter of epsilon)",
    )
    files = protect.add_argument_group("files")
    files.add_argument(
        "--format", choices=("png", "webp", "tiff", "jpeg"), default=None, help="default: png; jpeg is lossy"
    )
    files.add_argument("--quality", type=int, default=95, metavar="N", help="of jpeg, 1 to 100 (default: 95)")
    files.add_argument("--overwrite", action="store_true", help="do images again whose output is there")
    files.add_argument("--json", type=Path, metavar="FILE", help="write a report of every image")
    _add_model_options(protect)

    look = commands.add_parser(
        "inspect", help="compare a protected image with its original", description="Compare a pair of images."
    )
    look.set_defaults(run=run_inspect)
    look.add_argument("original", type=Path)
    look.add_argument("protected", type=Path)
    look.add_argument("--mask", type=Path, metavar="FILE", help="measure inside and outside this mask")
    look.add_argument(
        "--picture", type=Path, metavar="FILE", help="write original, protected and amplified noise as PNG"
    )
    look.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("generator")
    group.add_argument("--model", metavar="ID", help="folder or Hub id (default: the embedded one)")
    group.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")


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
    epsilon, background = _budget(options)
    given = [n for n in ("masks", "box", "point", "whole_image") if getattr(options, n)]
    if len(given) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(f"{names} were given: pass one kind of prompt")
    if options.labels and not options.masks:
        raise UsageError("--labels needs --masks")
    tasks = list(plan(options.inputs, options.output, options.format, options.masks))

    from tqdm import tqdm
    from transformers.utils import logging

    from .protection import Protector

    logging.disable_progress_bar()
    protector = Protector.from_pretrained(options.model, device=options.device)
    entries = []
    failed = skipped = 0
    with tqdm(tasks, unit="image", disable=len(tasks) < 2 or not sys.stderr.isatty()) as progress:
        for task in progress:
            entry: dict[str, Any] = {"input": str(task.source), "output": str(task.target)}
            entries.append(entry)
            if task.target.exists() and not options.overwrite:
                skipped += 1
                entry["status"] = "skipped"
                continue
            try:
                report = _protect_one(
                    protector, task, options, epsilon, background, bool(options.json) or len(tasks) == 1
                )
                entry |= {"status": "protected", "report": report}
            # One bad image must not stop the others, whatever is wrong with it.
            except Exception as error:
                failed += 1
                text = str(error) or type(error).__name__
                entry |= {"status": "failed", "error": text if str(task.source) in text else f"{task.source}: {text}"}
                tqdm.write(f"unseg: {entry['error']}", file=sys.stderr)
    if options.json:
        from .image_files import put_in_place

        put_in_place(json.dumps({"images": entries}, indent=2).encode(), options.json, str(options.json))
    if len(tasks) == 1 and entries[0]["status"] == "protected":
        _print_report(entries[0])
    done = len(tasks) - failed - skipped
    print(f"{done} protected" + (f", {skipped} skipped (already there)" if skipped else ""), end="")
    print(f", {failed} failed" if failed else "")
    return 1 if failed else 0


def _budget(options: argparse.Namespace) -> tuple[float | None, float | None]:
    if options.strength and options.epsilon is not None:
        raise UsageError(f"--strength {options.strength} and --epsilon {options.epsilon:g} were given: pass one")
    epsilon = STRENGTHS[options.strength] if options.strength else options.epsilon
    for name, value in (("--epsilon", epsilon), ("--epsilon-background", options.epsilon_background)):
        if value is not None and not 0 <= value <= 255:
            raise UsageError(f"{name} {value:g}: must be from 0 to 255 grey levels")
    if epsilon is not None and (options.epsilon_background or 0) > epsilon:
        raise UsageError(f"--epsilon-background {options.epsilon_background:g} is above --epsilon {epsilon:g}")
    as_share = (None if v is None else v / 255 for v in (epsilon, options.epsilon_background))
    return tuple(as_share)


def plan(inputs: Iterable[Path], output: Path, format: str | None, masks: Path | None) -> Iterator[Task]:
    """The work: every image of `inputs`, the file it becomes, and its mask.

    Raises:
        UsageError: no images, an output that would replace an input, two images with one output, or a file name
            whose suffix contradicts the format.
    """
    from . import image_files

    found: list[tuple[Path, Path]] = []
    for item in inputs:
        if item.is_dir():
            # An output folder inside the input would be protected again by the next run.
            found += [
                (p, p.relative_to(item)) for p in _images_in(item) if output.resolve() not in p.resolve().parents
            ]
        else:
            found.append((item, Path(item.name)))
    if not found:
        raise UsageError(f"no images in {', '.join(map(str, inputs))}: looked for {' '.join(SUFFIXES)}")
    to_file = len(found) == 1 and found[0][0].parent != output and output.suffix.lower() in SUFFIXES
    if masks is not None and not masks.exists():
        raise UsageError(f"{masks}: no such mask file or folder")
    if masks is not None and masks.is_file() and len(found) > 1:
        raise UsageError(f"one mask file for {len(found)} images: pass a folder with a mask for each")
    by_name = _index_masks(masks) if masks is not None and masks.is_dir() else {}
    wanted = image_files.SUFFIXES.get(output.suffix.lower()) if to_file else format
    if format is None and wanted in image_files.LOSSY_FORMATS:
        raise UsageError(
            f"{output}: {wanted} loses part of the noise; write .png, or ask for it with --format {wanted}"
        )
    if format not in (None, wanted):
        raise UsageError(f"{output} is no {format} file: name it {output.with_suffix(f'.{format}')}")
    suffix = (image_files.LOSSLESS_FORMATS | image_files.LOSSY_FORMATS)[format or "png"]
    owners: dict[Path, Path] = {}
    for source, relative in found:
        target = output if to_file else output / relative.with_suffix(suffix)
        if target.resolve() == source.resolve():
            raise UsageError(f"{source} would be replaced by its protected version: choose another output")
        if target in owners:
            raise UsageError(f"{owners[target]} and {source} would both become {target}: rename one")
        owners[target] = source
        mask = masks
        if by_name or (masks is not None and masks.is_dir()):
            key = relative.with_suffix("").as_posix()
            mask = by_name.get(key) or by_name.get(Path(key).name) or masks / relative.with_suffix(".png")
        yield Task(source, target, mask)


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _index_masks(folder: Path) -> dict[str, Path]:
    """Mask files by their path without suffix, and by their bare name where that is unique."""
    paths = _images_in(folder)
    names = [p.stem for p in paths]
    index = {p.stem: p for p in paths if names.count(p.stem) == 1}
    return index | {p.relative_to(folder).with_suffix("").as_posix(): p for p in paths}


def _protect_one(protector, task: Task, options, epsilon, background, measure: bool) -> dict[str, Any] | None:
    from . import image_files
    from .inspection import noise_left
    from .protection import Prompt

    labels = image_files.read_mask(task.mask) if task.mask else None
    points = [point[:2] for point in options.point] if options.point else None
    prompt = Prompt(
        mask=None if options.labels else labels,
        label_map=labels if options.labels else None,
        ignore_labels=options.ignore_labels,
        boxes=options.box,
        points=points,
        point_labels=[int(point[2]) if len(point) == 3 else 1 for point in options.point] if points else None,
        whole_image=options.whole_image,
        mode="per_segment" if options.per_segment else "union",
    )
    protected = protector.protect(task.source, prompt, epsilon=epsilon, epsilon_background=background)
    written = image_files.write(protected.picture, task.target, options.format, options.quality)
    if not measure:
        return None
    report = protected.report
    if image_files.SUFFIXES[task.target.suffix.lower()] in image_files.LOSSY_FORMATS:
        left = noise_left(protected.original, protected.picture, options.quality)
        report["notes"].append(
            f"JPEG changes pixels beyond the bound and leaves {left or 0:.0%} of the noise; png keeps all"
        )
    report["notes"] += [note for note in written.notes if note not in report["notes"]]
    return report


def _print_report(entry: dict[str, Any]) -> None:
    report = entry["report"]
    print(f"{entry['input']} -> {entry['output']}")
    print(f"  max |noise|   {report['max_noise']:g} of 255 in the mask, {report['max_noise_background']:g} outside")
    print(f"  mask          {report['protected_share']:.0%} of the image, {report['masks']} mask(s)")
    print(f"  PSNR          {_decibels(report['psnr'])}")
    print(f"  SSIM          {report['ssim']:.4f}")
    print(f"  time          {report['seconds']:.2f} s")
    for note in report["notes"]:
        print(f"  note          {note}")


def run_inspect(options: argparse.Namespace) -> int:
    from . import image_files
    from .inspection import comparison_picture, inspect_pair
    from .protection import read_region

    original, protected = image_files.read(options.original), image_files.read(options.protected)
    region = None
    if options.mask:
        region = read_region(image_files.read_mask(options.mask), (original.height, original.width))
    figures = inspect_pair(original, protected, region)
    if options.picture:
        picture = image_files.from_pil(comparison_picture(original, protected))
        image_files.write(picture, options.picture, "png")
    if options.json:
        print(json.dumps(figures, indent=2))
        return 0
    where = "" if region is None else f" in the mask, {figures['max_noise_background']:g} outside"
    left = figures["left_after_jpeg75"]
    print(f"max |noise|     {figures['max_noise']:g} of 255{where}")
    print(f"PSNR            {_decibels(figures['psnr'])}")
    print(f"SSIM            {figures['ssim']:.4f}")
    print(f"after JPEG 75   {'no noise to begin with' if left is None else f'{left:.0%} of the noise is left'}")
    if options.picture:
        print(f"picture         {options.picture}")
    return 0


def _decibels(psnr: float | None) -> str:
    return "no difference" if psnr is None else f"{psnr:.1f} dB"


if __name__ == "__main__":
    sys.exit(main())
