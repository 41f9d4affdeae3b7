"""`unseg audit`: from what stands on the command line to an [`unseg_hf.evaluation.audit.Audit`]."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path
from typing import Any

from unseg_hf.image_tasks import images_in, is_json, match_masks

DEFAULT_VICTIMS = {
    "semantic": ("unet", "segformer"),
    "instance": ("mask2former",),
    "panoptic": ("mask2former",),
    "detection": ("rt_detr_v2",),
    "interactive": ("sam",),
}
QUICK = {
    "noises": ("clean", "generator", "random", "stripes", "bands", "colour"),
    "treatments": ("none", "jpeg75", "half", "greyscale"),
    "seeds": (0,),
}
QUICK_IMAGES = {"max_train": 400, "max_test": 200}
FULL = {"trainings": ("plain", "strong", "adversarial"), "clean_shares": (0.0, 0.25, 0.5, 0.75)}
TEST_SHARE = 0.2
MOST_PROCESSES = 4
"""More victims at a time than this and memory may not do."""

PROPOSED = (
    "No masks were given: the victims learned and were tested on what the generator takes for objects by "
    "itself. The scores say how well a model can learn those segments, not the objects that a person would draw."
)
MANY_CLASSES = 64
"""Of so many grey levels in masks a few data sets have classes, and all soft edges."""

DESCRIPTION = """Train victims on protected images, test them on clean ones, with control noises beside them.

DATA is a parquet file, a folder as Hugging Face datasets reads it, a data set of the Hub, or a folder of image files
with --masks. Every stage is kept in OUT: the same command again goes on where a stopped one was.
"""


def add_audit(commands: Any) -> argparse.ArgumentParser:
    """Add the command to argparse's sub-parsers; its parser still lacks --model and --device."""
    parser = commands.add_parser(
        "audit",
        help="measure whether it protects",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run_audit)
    parser.add_argument("data", metavar="DATA", help="images to publish, and their masks")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help="folder for report and cache")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--masks",
        type=Path,
        metavar="PATH",
        help="for a folder of image files: folder of masks with their names, or COCO's json of the upright images",
    )
    data.add_argument(
        "--test", metavar="DATA", help="clean test images (default: about a fifth of DATA, by their pixels)"
    )
    data.add_argument("--test-masks", type=Path, metavar="PATH", help="as --masks, for --test")
    data.add_argument("--split", default="train", help="of a data set with splits (default: train)")
    data.add_argument("--test-split", metavar="SPLIT", help="of --test, or of DATA (default for --test: --split)")
    data.add_argument("--image-column", default="image", metavar="NAME", help="default: image")
    data.add_argument("--mask-column", default="mask", metavar="NAME", help="default: mask")
    data.add_argument("--instance-column", metavar="NAME", help="column of object numbers, 0 for none")
    data.add_argument(
        "--mask-kind",
        choices=("auto", "binary", "classes"),
        default="auto",
        help="what mask values are (default: auto)",
    )
    data.add_argument("--ignore-labels", type=int, nargs="+", default=(), metavar="N", help="values that are no class")
    data.add_argument(
        "--background-labels",
        type=int,
        nargs="+",
        default=(),
        metavar="N",
        help="classes that are background",
    )
    data.add_argument("--attacker", metavar="DATA", help="clean images for removal:denoiser (default: the test's)")
    data.add_argument("--attacker-masks", type=Path, metavar="PATH", help="masks of a folder of those")
    data.add_argument("--max-train", type=int, metavar="N", help="publish the first N images only")
    data.add_argument("--max-test", type=int, metavar="N", help="test on the first N images only")
    data.add_argument(
        "--examples", type=int, metavar="N", help="images shown in the report; 0 if they may not be (default: 2)"
    )
    grid = parser.add_argument_group("grid (names: a wrong one lists them all)")
    size = grid.add_mutually_exclusive_group()
    size.add_argument(
        "--quick",
        action="store_true",
        help="one victim and seed, four controls, four treatments, the first 400 training and 200 test images",
    )
    size.add_argument("--full", action="store_true", help="removal, strong and adversarial training, clean shares too")
    grid.add_argument("--task", choices=tuple(DEFAULT_VICTIMS), default="semantic", help="default: semantic")
    grid.add_argument("--noises", nargs="+", metavar="NAME", help="what the images carry")
    grid.add_argument("--treatments", nargs="+", metavar="NAME", help="what happens to them before a training")
    grid.add_argument("--victims", nargs="+", metavar="NAME[@CHECKPOINT]", help="models, from scratch or a checkpoint")
    grid.add_argument("--trainings", nargs="+", metavar="NAME", help="plain, strong (augmentation), adversarial")
    grid.add_argument(
        "--clean-shares", nargs="+", type=float, metavar="X", help="shares of images left clean; 0 first"
    )
    grid.add_argument("--seeds", nargs="+", type=int, metavar="N", help="of the victims (default: 0 1 2)")
    training = parser.add_argument_group("victims")
    training.add_argument("--epochs", type=int, metavar="N", help="default: 10")
    training.add_argument("--size", type=int, metavar="N", help="side that images are resized to (default: 96)")
    training.add_argument("--batch-size", type=int, metavar="N", help="default: 16")
    training.add_argument("--lr", type=float, metavar="X", help="default: each victim's own")
    training.add_argument("--preset", choices=("small", "full"), help="of the victims (default: small)")
    training.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast")
    training.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="victims at a time (default: on CPUs a core each, at most 4)",
    )
    training.add_argument(
        "--report-only", action="store_true", help="report what OUT holds of the grid, train nothing"
    )
    noise = parser.add_argument_group("noise")
    noise.add_argument(
        "--epsilon", type=float, metavar="N", help="bound in the region, of 255 (default: the generator's)"
    )
    noise.add_argument(
        "--epsilon-background", type=float, metavar="N", help="bound elsewhere (default: as much smaller as its is)"
    )
    noise.add_argument(
        "--tint",
        choices=("auto", "always", "never"),
        help="when the generator and bands take a tint, as for unseg protect (default: auto)",
    )
    return parser


def run_audit(options: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    processes = _processes(options)
    audit = _audit(options)
    if options.report_only:
        results = audit.report()
    elif processes > 1:
        # What can be refused has been refused above, once and not by every process.
        return _run_in_processes(options, processes)
    else:
        results = audit.run()
    if results:
        from unseg_hf.evaluation.report import summary, terminal_table

        print(f"\n{terminal_table(results)}\n\n{summary(results)}\n\nwrote {options.output / 'report.md'}")
    return 0


def _audit(options: argparse.Namespace):
    from unseg_hf.evaluation.audit import Audit, AuditConfig
    from unseg_hf.evaluation.published_images import TREATMENTS

    chosen: dict[str, Any] = {"victims": DEFAULT_VICTIMS[options.task]}
    limits = {"max_train": options.max_train, "max_test": options.max_test}
    if options.quick:
        chosen |= QUICK | {"victims": chosen["victims"][:1]}
        limits = {name: QUICK_IMAGES[name] if value is None else value for name, value in limits.items()}
    if options.full:
        chosen |= FULL | {"treatments": TREATMENTS}
    names = ("noises", "treatments", "victims", "trainings", "clean_shares", "seeds", "epochs", "size", "batch_size")
    names += ("lr", "preset", "epsilon", "epsilon_background", "tint", "task", "model", "device", "bf16", "examples")
    chosen |= {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    config = AuditConfig(output=options.output, **chosen)

    from unseg_hf.evaluation.labelled_images import CocoImages, LabelledImages, ProposedSegments

    source = _source(options, options.data, options.masks, options.split)
    proposed = isinstance(source, ProposedSegments)

    def check_masks(other, name: str, masks: str) -> None:
        if isinstance(other, ProposedSegments) != proposed:
            if proposed:
                raise ValueError(f"DATA has no masks, and {name} {other.name} has: give --masks")
            raise ValueError(f"{name} {other.name} has no masks, and DATA has: give {masks}")
        if isinstance(source, CocoImages) and isinstance(other, CocoImages):
            source.check_same_categories(other)

    # In COCO's json 0 is no class, but what belongs to none.
    background = options.background_labels or ((0,) if is_json(options.masks) else ())
    labels = {"kind": options.mask_kind, "ignore": options.ignore_labels, "background": background}
    if options.test is None and options.test_split is None:
        train, test = LabelledImages(source, **labels).split(TEST_SHARE)
        train, test = train.first(limits["max_train"]), test.first(limits["max_test"])
    else:
        train = LabelledImages(source, **labels, limit=limits["max_train"])
        location, split = options.test or options.data, options.test_split or options.split
        held_out = _source(options, location, options.test_masks, split)
        check_masks(held_out, "--test", "--test-masks")
        test = LabelledImages(held_out, like=train, limit=limits["max_test"])
    attacker = None
    if options.attacker is not None:
        from unseg_hf.evaluation.published_images import ATTACKER_IMAGES

        theirs = _source(options, options.attacker, options.attacker_masks, options.split)
        check_masks(theirs, "--attacker", "--attacker-masks")
        attacker = LabelledImages(theirs, like=train, limit=ATTACKER_IMAGES)
    notes = [PROPOSED] if proposed else []
    if options.mask_kind == "auto" and len(train.classes) > MANY_CLASSES:
        notes.append(
            f"Masks have {len(train.classes)} values, and each counts as a class. If they are soft edges of one "
            "object, --mask-kind binary takes all but 0 for it."
        )
    return Audit(config, train, test, attacker, notes, options.command_line, say=_say)


def _source(options: argparse.Namespace, location: str, masks: Path | None, split: str):
    """Where raw images come from, by what is at the location."""
    from unseg_hf.evaluation.labelled_images import CocoImages, DatasetRows, ImageFiles, ProposedSegments

    folder = Path(location)
    if not folder.is_dir() or _is_dataset(folder):
        if masks is not None:
            raise ValueError(f"{location} is a data set with a column of masks; --masks is for folders of image files")
        columns = options.image_column, options.mask_column, options.instance_column
        return DatasetRows(location, split, *columns, options.mask_kind, bool(options.ignore_labels))
    if options.instance_column is not None:
        raise ValueError(f"{location} is a folder of image files; --instance-column needs a data set with columns")
    elsewhere = {"-o": options.output, "--masks": masks}
    if same := [
        name
        for name, path in elsewhere.items()
        if path is not None and os.path.realpath(path) == os.path.realpath(folder)
    ]:
        raise ValueError(f"{location} is the folder of the images and that of {same[0]}: keep them apart")
    unreadable: list[str] = []
    others = (options.output, options.masks, options.test_masks, options.attacker_masks)
    inside = [path for path in others if path is not None]
    images = {path: path.relative_to(folder) for path in images_in(folder, unreadable, inside)}
    if unreadable or not images:
        raise ValueError(unreadable[0] if unreadable else f"{location} holds no images")
    if masks is None:
        # Each process has a GPU of its own, which torch is told of only when the audit runs.
        device = options.device
        if device == "cuda" and "LOCAL_RANK" in os.environ:
            import torch

            device = f"cuda:{int(os.environ['LOCAL_RANK']) % max(1, torch.cuda.device_count())}"
        return ProposedSegments(list(images), folder, options.model, device)
    if is_json(masks):
        return CocoImages(masks, images, folder)
    return ImageFiles(list(match_masks(masks, images).items()), folder)


def _is_dataset(folder: Path) -> bool:
    """Whether `datasets` would find more in a folder than image files."""
    marks = ("metadata.csv", "metadata.jsonl", "state.json", "dataset_dict.json", "*.parquet")
    return any(found for mark in marks for found in folder.glob(f"**/{mark}"))


def _processes(options: argparse.Namespace) -> int:
    """How many processes to start: none beside this one where a launcher has started them."""
    if options.processes is not None and options.processes < 1:
        raise ValueError(f"--processes {options.processes}: must be at least 1")
    if "WORLD_SIZE" in os.environ:
        return 1
    if options.processes is not None:
        if options.device == "cuda":
            import torch

            if options.processes > max(1, torch.cuda.device_count()):
                raise ValueError(
                    f"--processes {options.processes}: each needs a GPU of its own, and there are "
                    f"{torch.cuda.device_count()}; run several audits into several folders instead"
                )
        return options.processes
    if options.device == "cpu":
        return min(MOST_PROCESSES, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    return 1


def _run_in_processes(options: argparse.Namespace, processes: int) -> int:
    """Run the command in several processes of this machine, as a launcher would."""
    import torch.multiprocessing

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        torch.multiprocessing.spawn(_process, (options, processes, port), nprocs=processes)
    except torch.multiprocessing.ProcessExitedException as error:
        return error.exit_code
    return 0


def _process(rank: int, options: argparse.Namespace, processes: int, port: int) -> None:
    import torch

    from unseg_hf.cli import run
    from unseg_hf.worker_processes import end_with_parent

    # Torch interrupts a process whose parent dies, which one that was started in the background takes no notice of.
    end_with_parent()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if options.device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    sys.exit(run(options))


def _say(line: str) -> None:
    print(line, flush=True)
