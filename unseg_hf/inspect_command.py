"""`unseg inspect`: what noise did to images, beside their originals; or, of images alone, whether they carry it."""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .image_tasks import images_in, match_masks, refuse_overwriting
from .protect_command import decibels, load_protector

FAINT_BUDGET = 2 / 255  # the smallest in which noise is recognised
LEFT = {"left_after_jpeg75": "after JPEG 75", "left_as_published": "as published"}
"""Figures of what is left of the noise, and what to call them."""
ON_A_SHEET = 300  # photos: more of them make a picture that few programs open


def add_inspect(commands: Any) -> argparse.ArgumentParser:
    """Add the command to argparse's sub-parsers; its parser still lacks --model and --device."""
    look = commands.add_parser(
        "inspect",
        help="compare protected images with their originals, or look for the noise in images",
        description="Compare a pair of images, or two folders of them; or tell of one image, or each in a folder, "
        "whether it carries the generator's noise.",
    )
    look.set_defaults(run=run_inspect)
    look.add_argument("original", type=Path, help="file or folder; alone, it is that in which the noise is looked for")
    look.add_argument("protected", type=Path, nargs="?", help="the same, protected; in a folder by the same names")
    look.add_argument("--mask", type=Path, metavar="PATH", help="measure, or look, inside this mask or these")
    look.add_argument(
        "--published",
        type=Path,
        metavar="PATH",
        help="the protected image, or images, as a web site serves them, resized or recompressed: how much of the "
        "noise is left",
    )
    look.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="write a PNG of original, protected and amplified noise; of folders one of all photos, small",
    )
    look.add_argument("--json", action="store_true", help="print JSON")
    return look


def run_inspect(options: argparse.Namespace) -> int:
    if options.protected is None:
        if given := [f"--{name}" for name in ("published", "picture") if getattr(options, name)]:
            raise ValueError(f"{' and '.join(given)}: for originals and protected images, in two files or two folders")
        return _look_for_noise(options)
    if options.picture and options.picture.suffix.lower() != ".png":
        raise ValueError(f"--picture {options.picture}: it is a PNG, so name it .png")
    kinds, in_folders = {True: "a folder", False: "a file"}, options.original.is_dir()
    for path in filter(None, (options.original, options.protected, options.published)):
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        if path.is_dir() != in_folders:
            raise ValueError(f"{path}: name {kinds[in_folders]}, as {options.original} is one")
    pairs = _pairs(options)
    if options.picture:
        given = [path for pair in pairs for path in (pair.original, pair.protected, pair.mask, pair.published)]
        refuse_overwriting("--picture", [options.picture], given)
    if in_folders:
        return _compare_folders(options, pairs)
    from . import image_files
    from .inspection import comparison_picture

    (pair,) = pairs
    original, protected, figures = _compared(pair)
    if options.picture:
        image_files.write(image_files.from_pil(comparison_picture(original, protected)), options.picture, "png")
    if options.json:
        print(json.dumps(figures, indent=2))
        return 0
    print(f"max |noise|     {figures['max_noise']:g} of 255{_outside(figures)}")
    print(f"PSNR            {decibels(figures['psnr'])}")
    print(f"SSIM            {figures['ssim']:.4f}")
    for when, left in ((when, figures[name]) for name, when in LEFT.items() if name in figures):
        print(f"{when:15} {'no noise to begin with' if left is None else f'{max(left, 0):.0%} of the noise is left'}")
    if options.picture:
        print(f"picture         {options.picture}")
    return 0


@dataclass(frozen=True)
class Pair:
    """An image, what became of it (None where that is missing), its mask, and what a web site made of it."""

    original: Path
    protected: Path | None
    mask: Path | None = None
    published: Path | None = None


def _pairs(options: argparse.Namespace) -> list[Pair]:
    if not options.original.is_dir():
        return [Pair(options.original, options.protected, options.mask, options.published)]
    found = _images_of(options.original, [options.protected, options.mask, options.published])
    mask_of = match_masks(options.mask, found)
    protected, published = (_Names(folder) for folder in (options.protected, options.published))
    return [
        Pair(path, protected.find(relative), mask_of.get(path), published.find(relative))
        for path, relative in found.items()
    ]


class _Names:
    """Images of a folder by those of another one: `a.png`, `a.jpg.png` or `a.webp` is `a.jpg` protected.

    Args:
        folder: of the images; None is none.
    """

    def __init__(self, folder: Path | None):
        self._found: dict[Path, list[Path]] = {}
        for path, below in ({} if folder is None else _images_of(folder)).items():
            for name in (below, below.with_suffix("")):
                self._found.setdefault(name, []).append(path)

    def find(self, relative: Path) -> Path | None:
        """The image of a name; ValueError where several are called so."""
        found = self._found.get(relative) or self._found.get(relative.with_suffix("")) or [None]
        if len(found) > 1:
            raise ValueError(f"{found[0]} and {found[1]} are both called like {relative}: keep one of them")
        return found[0]


def _images_of(folder: Path, apart: Iterable[Path | None] = ()) -> dict[Path, Path]:
    """The images in a folder, and their paths below it; ValueError where it has none, or cannot be searched."""
    unreadable: list[str] = []
    found = {path: path.relative_to(folder) for path in images_in(folder, unreadable, filter(None, apart))}
    if unreadable or not found:
        raise ValueError(unreadable[0] if unreadable else f"no images in {folder}")
    return found


def _compared(pair: Pair) -> tuple[Any, Any, dict[str, float | None]]:
    """Both pictures, and the figures."""
    from . import image_files
    from .inputs import read_region
    from .inspection import inspect_pair

    if pair.protected is None:
        raise ValueError(f"{pair.original}: there is no protected image of this name")
    original, protected = image_files.read(pair.original), image_files.read(pair.protected)
    region = None
    if pair.mask:
        region = read_region(image_files.read_mask(pair.mask), (original.height, original.width))
    published = image_files.read(pair.published) if pair.published else None
    return original, protected, inspect_pair(original, protected, region, published)


def _outside(figures: dict[str, Any]) -> str:
    outside = figures["max_noise_background"]
    return "" if outside is None else f" in the mask, {outside:g} outside"


def _compare_folders(options: argparse.Namespace, pairs: list[Pair]) -> int:
    from statistics import median

    from . import image_files
    from .inspection import contact_sheet, on_the_sheet

    every, sheet = -(-len(pairs) // ON_A_SHEET), []

    def compare(numbered: tuple[int, Pair]) -> dict[str, Any]:
        number, pair = numbered
        original, protected, figures = _compared(pair)
        if options.picture and number % every == 0:
            sheet.append(on_the_sheet(original, protected, pair.original.name))
        return {"protected": str(pair.protected)} | figures

    def describe(figures: dict[str, Any]) -> str:
        parts = [
            f"max |noise| {figures['max_noise']:g}{_outside(figures)}",
            decibels(figures["psnr"]),
            f"SSIM {figures['ssim']:.4f}",
        ]
        parts += [f"{max(figures[n], 0):.0%} left {when}" for n, when in LEFT.items() if figures.get(n) is not None]
        return ", ".join(parts)

    results = _one_by_one(options, [(pair.original, (n, pair)) for n, pair in enumerate(pairs)], compare, describe)
    good = [figures for figures in results if "error" not in figures]
    changed = [figures for figures in good if figures["psnr"] is not None]
    if options.picture and sheet:
        image_files.write(image_files.from_pil(contact_sheet(sheet)), options.picture, "png")
    if options.json:
        print(json.dumps({"images": results}, indent=2))
    else:
        if changed:
            names = ("psnr", "ssim", "left_after_jpeg75")
            # Of a change that is none in 8 bits, JPEG leaves no share.
            psnr, ssim, jpeg = (median([f[name] for f in changed if f[name] is not None] or [0]) for name in names)
            print(
                f"{len(changed)} images with noise, at most {max(f['max_noise'] for f in changed):g} of 255; medians: "
                f"{psnr:.1f} dB, SSIM {ssim:.4f}, {jpeg:.0%} of the noise is left after JPEG 75"
            )
        if options.published:
            shares = [f["left_as_published"] for f in changed if f.get("left_as_published") is not None]
            left = f", {max(median(shares), 0):.0%} of the noise is left in the median" if shares else ""
            print(f"{len(shares)} of them as published{left}")
        for count, what in ((len(good) - len(changed), "as they were"), (len(results) - len(good), "failed")):
            if count:
                print(f"{count} images {what}")
        if options.picture and sheet:
            print(f"picture: {options.picture}" + (f" (every {every}th photo)" if every > 1 else ""))
    return int(len(good) < len(results))


def _one_by_one(
    options: argparse.Namespace, items: list[tuple[Path, Any]], work: Callable, describe: Callable
) -> list[dict[str, Any]]:
    """Work on each item, and print a line of it; one that fails never stops the others."""
    from tqdm import tqdm

    from .image_files import one_line, printable

    results = []
    for path, item in tqdm(items, unit="image", disable=not (options.json and sys.stderr.isatty())):
        try:
            figures = work(item)
        except Exception as error:
            text = one_line(error)
            figures = {"error": text if str(path) in text else f"{path}: {text}"}
            print(f"unseg: {printable(figures['error'])}", file=sys.stderr)
        else:
            if not options.json:
                print(f"{printable(path)}: {describe(figures)}")
        results.append({"image": str(path)} | figures)
    return results


def _look_for_noise(options: argparse.Namespace) -> int:
    """Of images without their originals."""
    in_folder = options.original.is_dir()
    found = _images_of(options.original, [options.mask]) if in_folder else {options.original: options.original}
    mask_of = match_masks(options.mask, found)
    protector = load_protector(options.model, options.device)

    def look(path: Path) -> dict[str, Any]:
        return _noise_in(path, mask_of.get(path), protector)

    if not in_folder:
        from .image_files import printable

        said = look(options.original)
        words, notes = said.pop("words"), said.pop("notes")
        if options.json:
            print(json.dumps(said, indent=2))
            return 0
        print(f"{printable(options.original)}: {words}")
        for note in notes:
            print(f"note: {note}")
        return 0
    results = _one_by_one(options, [(path, path) for path in found], look, lambda said: said["words"])
    good = [said for said in results if "error" not in said]
    if options.json:
        print(json.dumps({"images": results}, indent=2))
    else:
        print(f"{sum(bool(said['sure']) for said in good)} of {len(good)} images carry this generator's noise", end="")
        unknown, failed = sum(said["noise"] is None for said in good), len(results) - len(good)
        print(f"; of {unknown} it cannot be told" if unknown else "", end="")
        print(f"; {failed} failed" if failed else "")
    return int(len(good) < len(results))


def _noise_in(path: Path, mask: Path | None, protector: Any) -> dict[str, Any]:
    """`noise` in grey levels, its `standard_error`, and whether it is `sure`, of one image (None: it cannot be told);
    the same in `words`; and the `notes` of a user."""
    from . import image_files
    from .inputs import Prompt
    from .noise_choice import without_colour
    from .protection import PROTECTED_BEFORE
    from .recognition import Recognition

    prompt = Prompt(mask=image_files.read_mask(mask) if mask else None)
    picture, embeddings = image_files.read(path), None
    # With the whole budget, and with one of those in which some generators have another noise.
    for epsilon in (None, FAINT_BUDGET):
        job = protector.prepare(picture, prompt, epsilon)
        embeddings = embeddings or protector.encode([job])[0]
        protected = protector.apply(job, protector.decode(job, embeddings))
        found, levels = protected.before, protected.epsilon * 255
        if found is None or found.sure:
            break
    notes = [note for note in protected.notes if note != PROTECTED_BEFORE]
    if found is None:
        why = "hardly any pixel of it would get noise"
        if protected.tinted:
            why = "it would get a tint, which may be its own colour"
        elif without_colour(protected.original.pixels) or protected.original.pixels.shape[2] == 1:
            why = "it has no colour"
        words = f"whether it carries this generator's noise cannot be told: {why}"
        return {"noise": None, "standard_error": None, "sure": None, "words": words, "notes": notes}
    noise, error = found.share * levels, found.error * levels
    said = "it carries this generator's noise" if found.sure else "no sign of the noise that it would get"
    if found.unclear:
        said = "there may be a little of this generator's noise in it"
    elif not found.sure and not Recognition(1, found.error).sure:
        said = "it cannot be told, for what it shows is as strong as this generator's noise would be"
    words = f"{said} ({noise:.1f} of 255, standard error about {error:.1f})"
    return {"noise": noise, "standard_error": error, "sure": found.sure, "words": words, "notes": notes}
