"""`unseg protect-dataset`: from what stands on the command line to a protected tree."""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

DESCRIPTION = """Protect the training images of a published data set in its own layout: OUT gets the same tree, so that
training code runs on it unchanged. Annotations and all other images are copied; copies of the protected ones are left
out. The same command again goes on where a stopped one was. OUT/unseg-protected.jsonl says what happened to each file.
"""
QUALITY = 100


def add_protect_dataset(commands: Any) -> argparse.ArgumentParser:
    """Add the command to argparse's sub-parsers; its parser still lacks strength, --model and --device."""
    parser = commands.add_parser(
        "protect-dataset",
        help="protect a published data set in its own layout",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run_protect_dataset)
    parser.add_argument("name", metavar="NAME", help="of the data set; --list shows them")
    parser.add_argument("--root", type=Path, required=True, metavar="IN", help="folder of the data set")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="for the protected tree")
    parser.add_argument("--list", nargs=0, action=_Show, help="list the data sets and exit")
    parser.add_argument("--layout", action=_Show, metavar="NAME", help="show the tree that is expected and exit")
    what = parser.add_argument_group("what to protect (default: every labelled pixel of the training images)")
    what.add_argument("--split", nargs="+", metavar="SPLIT", help="protect these splits")
    what.add_argument("--names", type=Path, metavar="FILE", help="of these only the images that the file names")
    what.add_argument("--classes", nargs="+", metavar="CLASS", help="names or numbers of the classes to protect")
    what.add_argument(
        "--per-segment", action="store_true", help="each segment gets the noise of its class, not one for all"
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--jpeg-names",
        choices=("png-bytes", "jpeg", "rename"),
        default="png-bytes",
        help="what becomes of .jpg images: lossless PNG under the same name, which readers that go by the suffix "
        "refuse (default); JPEG, which loses; or lossless under the suffix .png, which lists and json do not know",
    )
    files.add_argument(
        "--quality", type=int, metavar="N", help=f"of --jpeg-names jpeg, 95 to 100 (default: {QUALITY})"
    )
    files.add_argument("--link", choices=("hard", "symbolic"), help="link what stays as it is instead of copying it")
    files.add_argument("--processes", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    return parser


class _Show(argparse.Action):
    """Prints something and leaves, as --help does."""

    def __call__(self, parser, namespace, values, option_string=None):
        from .table import DATA_SETS
        from .tree import expected_tree

        if self.dest == "list":
            width = max(map(len, DATA_SETS))
            for name, data_set in DATA_SETS.items():
                budget = f"; {data_set.epsilon:g}/255 by default" if data_set.epsilon else ""
                print(f"{name:<{width}}  {data_set.title}: {data_set.protects}{budget}")
        elif values not in DATA_SETS:
            parser.error(f"--layout {values}: there is {', '.join(DATA_SETS)}")
        else:
            note = DATA_SETS[values].note
            print(expected_tree(values) + (f"\nNote: {note}" if note else ""))
        parser.exit()


def run_protect_dataset(options: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    from unseg_hf.protect_command import budget_of, load_protector

    from .tree import find_layout, read_names

    epsilon, background = budget_of(options)
    if options.quality is not None and (options.jpeg_names != "jpeg" or not 95 <= options.quality <= 100):
        raise ValueError(f"--quality {options.quality}: from 95 to 100, and with --jpeg-names jpeg")
    if options.processes < 1:
        raise ValueError(f"--processes {options.processes}: must be at least 1")
    found = find_layout(options.name, options.root)
    splits = found.chosen_splits(options.split)
    names = None if options.names is None else read_names(options.names)
    classes = found.class_ids(options.classes, splits)

    from unseg_hf.model_identity import model_identity
    from unseg_hf.worker_processes import alone

    from .run import RECORD, SETTINGS, Settings, folder_identity, prepare_output, run

    for folder in (options.root.resolve(), *options.root.resolve().parents):
        for file in (RECORD, SETTINGS):
            if (folder / file).exists():
                raise ValueError(f"{folder} has {file}: {options.root} is protected already")
    plan = found.plan(options.output, splits, names, options.jpeg_names == "rename")
    if not plan.images:
        raise ValueError(f"{options.root}: no images of {', '.join(splits)} to protect{_hint(plan)}")
    load = partial(load_protector, options.model, options.device)
    protector = load()
    if epsilon is None and found.data_set.epsilon:
        epsilon = found.data_set.epsilon / 255
    levels = [share * 255 for share in protector.model.config.budget(epsilon, background)]
    settings = Settings(
        data_set=options.name,
        input=folder_identity(options.root),
        splits=tuple(splits),
        names=None if names is None else hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest(),
        classes=None if classes is None else tuple(sorted(classes)),
        per_segment=options.per_segment,
        tint=options.tint,
        epsilon=round(levels[0], 6),
        epsilon_background=round(levels[1], 6),
        jpeg_names=options.jpeg_names,
        quality=(options.quality or QUALITY) if options.jpeg_names == "jpeg" else None,
        link=options.link,
        model=model_identity(options.model)[0],
    )
    prepare_output(options.output, settings)
    single = (lambda: protector) if options.processes == 1 else None
    with alone(options.output, SETTINGS):
        entries = run(plan, options.root, options.output, settings, single or load, options.processes, _progress)
    _print_summary(options, splits, plan, entries)
    failed = any(entry["status"] == "failed" for entry in entries)
    protected = any(entry["status"] == "protected" and not entry["unchanged"] for entry in entries)
    return 1 if failed or not protected else 0


def _hint(plan) -> str:
    """Why there may be no image to protect."""
    if plan.unknown:
        return f": none is called {min(plan.unknown)!r}, as --names has it"
    if plan.missing:
        return f": their lists name {len(plan.missing)} images that are not there, such as {min(plan.missing)}"
    return ""


def _progress(entries, total: int):
    from tqdm import tqdm

    return tqdm(entries, total=total, unit="file", disable=total < 2 or not sys.stderr.isatty())


def _from_elsewhere(root: Path, paths: Iterable[str]) -> Iterator[str]:
    """Those of the paths below a folder that links lead out of it."""
    real = root.resolve()
    folders: dict[Path, Path] = {}
    for path in paths:
        folder, name = (root / path).parent, Path(path).name
        if folder not in folders:
            folders[folder] = Path(os.path.realpath(folder))
        file = folders[folder] / name
        if not (Path(os.path.realpath(file)) if file.is_symlink() else file).is_relative_to(real):
            yield path


def _print_summary(options: argparse.Namespace, splits: list[str], plan, entries: list[dict[str, Any]]) -> None:
    from unseg_hf.image_files import printable
    from unseg_hf.protect_command import say_of_tints

    def say(line: str, file: Any = None) -> None:
        print(printable(line), file=file)

    for entry in entries:
        if entry["status"] == "failed":
            say(f"unseg: {entry['error']}", sys.stderr)
    protected = [entry for entry in entries if entry["status"] == "protected"]
    failed = sum(entry["status"] == "failed" for entry in entries)
    for note, count in Counter(note for entry in protected for note in entry["notes"]).items():
        say(f"note ({count} images): {note}")
    tinted = Counter(entry["tinted"] for entry in protected)
    say_of_tints(tinted[True], tinted[False])
    if jpegs := [entry for entry in protected if "over_bound_share" in entry]:
        left = [entry["noise_left"] for entry in jpegs if entry["noise_left"] is not None]
        share = sum(entry["over_bound_share"] for entry in jpegs) / len(jpegs)
        say(
            f"JPEG leaves {sum(left) / max(1, len(left)):.0%} of the noise, and {share:.2%} of the pixels over the "
            f"bound, by at most {max(entry['over_bound_levels'] for entry in jpegs)} of 255 ({len(jpegs)} images)"
        )
    for reason, count in plan.clean.items():
        say(f"{count} images stay clean: {reason}")
    if plan.left_out:
        say(
            f"{len(plan.left_out)} files left out: unprotected copies of protected images, by their names, such as "
            f"{plan.left_out[0]}"
        )
    if plan.archives:
        say(
            f"{len(plan.archives)} files that may hold the original images were taken over, such as "
            f"{plan.archives[0]}: remove them before OUT is published"
        )
    if outside := list(_from_elsewhere(options.root, [*plan.copies, *(task.path for task in plan.images)])):
        say(
            f"{len(outside)} files come from elsewhere, by links in {options.root}, such as {outside[0]} "
            f"from {os.path.realpath(options.root / outside[0])}: look whether they are to be published"
        )
    if plan.missing:
        say(
            f"{len(plan.missing)} images that the lists of {', '.join(splits)} name are not in {options.root}, "
            f"such as {min(plan.missing)}"
        )
    if plan.unknown:
        say(f"{len(plan.unknown)} names of {options.names} are of no image, such as {min(plan.unknown)}")
    others = len(entries) - len(protected) - failed
    unchanged = sum(entry.get("unchanged", False) for entry in protected)
    say(
        f"{len(protected) - unchanged} images of {', '.join(splits)} protected, "
        + (f"{unchanged} with nothing to protect in them, " if unchanged else "")
        + f"{others} other files "
        f"{'copied' if options.link is None else 'linked'}" + (f", {failed} failed and left out" if failed else "")
    )
