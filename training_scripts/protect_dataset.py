"""Protect a whole data set, in as many processes as there are, so that it may be killed and begun again at any time.

A folder of images with masks, on one machine with two processes:

    torchrun --nproc-per-node 2 training_scripts/protect_dataset.py photos --masks masks --output protected

SA-1B's tars with their own masks, on one GPU; eight processes, since reading and writing images take a CPU:

    accelerate launch --num_processes 8 training_scripts/protect_dataset.py "sa1b/*.tar" --mask_column json \\
        --output protected --output_format tars --device cuda

A data set of the Hub, streamed, as one job of an array of 64; the last command pushes when all are done:

    python training_scripts/protect_dataset.py user/name --output /shared/protected --shard 0/64
    python training_scripts/protect_dataset.py user/name --output /shared/protected --push_to_hub user/protected

The same command goes on where a killed run stopped. docs/datasets.md has the rest.
"""

import argparse
import errno
import os
import shlex
import sys
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="Parquet files, tars, images, folders of them, or a Hub id.")
    add("--output", required=True, type=Path, help="Folder of the protected data set.")
    add("--output_format", choices=("parquet", "folder", "tars"), default="parquet", help="Default: parquet.")
    add("--model", help="Generator: folder or Hub id (default: the embedded one).")
    add("--model_revision", help="Of a generator on the Hub.")
    add("--device", default="cpu", help="cpu, cuda, mps; with cuda every process takes the next GPU.")
    add("--batch_size", type=int, default=8, help="Images encoded together on a GPU.")
    add("--image_column", help="Column of images; in tars their suffix (default: the only image of a sample).")
    add("--mask_column", help="Column of masks; in tars their suffix, json for SA-1B's.")
    add("--box_column", help="In tables: column of lists of boxes in place of masks; objects.bbox is a field of one.")
    add(
        "--box_format",
        choices=("xyxy", "xywh"),
        default="xyxy",
        help="Boxes are x0, y0, x1, y1 in pixels (the default), or x, y, width, height, as COCO's.",
    )
    add(
        "--class_column",
        help="In tables: column of lists of their classes, with --per_segment a noise for each class.",
    )
    add("--drop_columns", nargs="+", default=[], metavar="NAME", help="Columns, in tars suffixes, to leave out.")
    add("--masks", type=Path, help="Folder of masks for a folder of images, matched by name.")
    add("--labels", action="store_true", help="The masks are label maps: every label but the ignored is an object.")
    add("--ignore_labels", type=int, nargs="+", default=[0, 255], help="Labels that are no objects.")
    add(
        "--per_segment",
        action="store_true",
        help="A noise for each mask or label, not one for their union.",
    )
    add(
        "--tint",
        choices=("auto", "always", "never"),
        default="auto",
        help="A flat tint in place of waves, for masks without a class (default: for small things, such as cells).",
    )
    add("--whole_image", action="store_true", help="Everything; hardly protects (default: masks, else what is found).")
    add("--epsilon", type=float, help="Largest change in a mask, in grey levels of 255 (default: the model's).")
    add(
        "--epsilon_background",
        type=float,
        help="Elsewhere, with --epsilon (default: as much smaller as the model's is).",
    )
    add("--split", help="Of a data set on disk or the Hub (default: train), or of parquet files named so.")
    add("--name", help="Configuration of a data set of the Hub.")
    add("--revision", help="Of a data set of the Hub.")
    add("--shard_size", type=int, default=500, help="Images in a shard: what a killed process loses at most.")
    add("--shard", default="0/1", metavar="I/N", help="Part I, from 0, of N jobs that share the output folder.")
    add("--on_error", choices=("mark", "drop", "raise"), default="mark", help="What becomes of broken records.")
    add("--push_to_hub", metavar="ID", help="Data set of the Hub that the complete output is pushed to.")
    add("--private", action="store_true", help="A new data set on the Hub is private.")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status.

    It is 0, 1 if not one image could be protected, 2 for a request that makes no sense or a run that had to stop, or
    130 after Ctrl-C.
    """
    options = build_parser().parse_args(arguments)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("protect_dataset.py: stopped; the same command goes on, finished shards are kept", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        # RuntimeError: a GPU that fails, or the Hub. ImportError: an extra that is not installed.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        remedy = f"; make room for {options.output}, and the same command goes on" if full else ""
        print(f"protect_dataset.py: {' '.join(str(error).split())}{remedy}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    job, jobs = parse_shard(options.shard)
    # As torchrun and accelerate set them; nothing is sent between the processes, so none waits for another.
    rank, world, local = (
        _number(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if not 0 <= rank < world:
        raise ValueError(f"RANK={rank} and WORLD_SIZE={world} in the environment: ranks are from 0 to {world - 1}")
    if options.push_to_hub and jobs > 1:
        raise ValueError(
            f"--push_to_hub with --shard {options.shard}: run once more without --shard when all jobs are done; what "
            "is finished is not made again"
        )
    from unseg_hf.protect_command import say_of_tints, shares_of

    names = ("--epsilon", "--epsilon_background")
    epsilon, epsilon_background = shares_of(options.epsilon, options.epsilon_background, names)
    has_masks = bool(options.mask_column or options.masks)
    if has_masks + bool(options.box_column) + options.whole_image > 1:
        raise ValueError("pass one of masks, --box_column and --whole_image")
    if options.box_format != "xyxy" and not options.box_column:
        raise ValueError(f"--box_format {options.box_format} needs --box_column")
    if options.class_column and not (options.per_segment and (options.mask_column or options.box_column)):
        raise ValueError(
            f"--class_column {options.class_column} needs --per_segment, and --mask_column or --box_column"
        )
    if options.labels and not has_masks:
        raise ValueError("--labels needs --masks or --mask_column")
    from transformers.utils import logging

    from unseg_hf import ProtectImages
    from unseg_hf.bulk.card import push_dataset
    from unseg_hf.bulk.manifest import unprotected_images
    from unseg_hf.bulk.opening import open_source
    from unseg_hf.bulk.run import protect_dataset, wait_for_others
    from unseg_hf.image_files import printable
    from unseg_hf.protection import PROTECTED_BEFORE
    from unseg_hf.training.publishing import check_hub

    logging.disable_progress_bar()
    dataset_id = check_hub(options.push_to_hub) if options.push_to_hub else None
    source = open_source(
        options.inputs,
        options.output,
        masks=options.masks,
        image_column=options.image_column,
        mask_column=options.mask_column,
        box_column=options.box_column,
        class_column=options.class_column,
        drop_columns=options.drop_columns,
        split=options.split,
        name=options.name,
        revision=options.revision,
        shard_size=options.shard_size,
    )
    protect = ProtectImages(
        options.model,
        mask_column="masks" if has_masks else None,
        box_column="boxes" if options.box_column else None,
        box_format=options.box_format,
        class_column="classes" if options.class_column else None,
        revision=options.model_revision,
        label_maps=options.labels,
        ignore_labels=tuple(options.ignore_labels),
        mode="per_segment" if options.per_segment else "union",
        tint=options.tint,
        whole_image=options.whole_image,
        epsilon=epsilon,
        epsilon_background=epsilon_background,
        device=options.device,
        batch_size=options.batch_size,
    )

    def say(line: str) -> None:
        print(printable(line), file=sys.stderr, flush=True)

    speaks = rank == 0
    summary = protect_dataset(
        source,
        options.output,
        options.output_format,
        protect,
        on_error=options.on_error,
        process=(job * world + rank, jobs * world),
        rank=local,
        report=say if speaks else None,
    )
    if dataset_id and speaks:
        summary = wait_for_others(options.output, len(source.shards), say)
    protected = summary.records - summary.failed - summary.unchanged
    if summary.complete and not protected:
        say(f"{options.output}: not one of {summary.records} images could be protected; manifest/ says why")
        return 1
    if summary.complete and (unprotected := unprotected_images(options.output, summary)):
        say(f"{options.output}: {'; '.join(unprotected)}")
    if summary.complete and summary.unprotected:
        drop = f"--drop_columns {shlex.join(summary.unprotected)}"
        say(f"To leave out what is beside the images, protect into a new folder with {drop}")
    if dataset_id and speaks:
        print(f"pushed to {push_dataset(options.output, dataset_id, options.private)}")
    if summary.complete:
        print(
            f"{options.output}: {protected} images protected, {summary.failed} failed; largest "
            f"change {summary.max_noise:g} of 255; manifest/ lists all"
        )
        say_of_tints(summary.with_tint, summary.without_tint)
        if summary.protected_before:
            print(f"note: {summary.protected_before} images: {PROTECTED_BEFORE}")
    elif speaks:
        print(
            f"{options.output}: {summary.finished_shards} of {summary.shards} shards are complete; this process has "
            "made its own"
        )
    # Some records that failed are no error here: a launcher would stop the other processes.
    return 0


def _number(name: str, default: int) -> int:
    """A whole number in the environment."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ValueError(f"{name}={value} in the environment: must be a whole number")
    return int(value)


def parse_shard(text: str) -> tuple[int, int]:
    """`"2/8"` as (2, 8)."""
    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise ValueError(f"--shard {text}: write I/N, with I from 0 to N - 1")
    return int(first), int(second)


if __name__ == "__main__":
    sys.exit(main())
