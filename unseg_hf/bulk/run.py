"""A run over a whole data set, shard by shard, which may be killed at any time and begun again."""

import contextlib
import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from ..fidelity import noise_levels
from ..mapping import Outcome, ProtectImages, RecordError
from . import manifest
from .card import data_card
from .outputs import KINDS, WRITERS, ShardWriter, put_shard_in_place
from .progress import Progress
from .records import Record, Source, SourceError

ON_ERROR = ("mark", "drop", "raise")
"""What may become of a record that cannot be protected: a data set that is published keeps none unprotected."""

LONG_AGO = 24 * 3600
"""Seconds after which nobody goes on with a half-written file."""


def run_settings(source: Source, kind: str, protect: ProtectImages, on_error: str) -> dict[str, Any]:
    """Everything that decides the bytes of an output, for JSON."""
    from ..configuration_unseg import UnSegConfig
    from ..protection import default_checkpoint

    where = default_checkpoint() if protect.model is None else protect.model
    config = UnSegConfig.from_pretrained(where, **({"revision": protect.revision} if protect.revision else {}))
    epsilon, background = config.budget(protect.epsilon, protect.epsilon_background)
    return {
        "source": {**source.description, "image_column": source.image_column, "listing": source.listing},
        "output": {"kind": kind, "shards": len(source.shards), "on_error": on_error},
        "protection": {
            "epsilon": epsilon,
            "epsilon_background": background,
            "masks": protect.mask_column is not None or protect.box_column is not None,
            "boxes": protect.box_format if protect.box_column is not None else None,
            "classes": True if protect.class_column is not None else None,
            "label_maps": protect.label_maps,
            "ignore_labels": list(protect.ignore_labels),
            "mode": protect.mode,
            "tint": protect.tint,
            "whole_image": protect.whole_image,
        },
        "model": {
            "name": Path(protect.model).name if protect.model and os.path.isdir(protect.model) else protect.model,
            "identity": protect.identity,
        },
        "versions": manifest.versions(),
    }


def protect_dataset(
    source: Source,
    output: Path,
    kind: str,
    protect: ProtectImages,
    on_error: str = "mark",
    process: tuple[int, int] = (0, 1),
    rank: int | None = None,
    report: Callable[[str], None] | None = None,
    report_every: float = 10.0,
) -> manifest.Summary:
    """Protect this process's share of the shards that are not complete yet.

    A shard is complete when the mark of the manifest is there and its files have the sha256 that it says; all others
    are made anew from their beginning.

    Args:
        source: the images.
        output: folder for them; new, or one that was begun with the same settings.
        kind: of the output, one of [`unseg_hf.bulk.outputs.KINDS`].
        protect: how they are protected.
        on_error: "mark" (parquet: a row without an image, with the reason; elsewhere as "drop"), "drop" (only the
            manifest lists it), or "raise".
        process: number of this process, and how many there are: shards are dealt in turn.
        rank: of the process on its machine, which picks the GPU.
        report: gets a line on the progress of all processes now and then; None is silent.
        report_every: seconds between two of these lines.

    Raises:
        RecordError: a record failed and `on_error` is "raise".
        SettingsError: the output was begun with other settings.
        FileExistsError: the folder holds something else, or is a file.
        ValueError: the generator does not load, or a name that is none of those above.
    """
    number, processes = process
    for name, value, known in (("kind", kind, KINDS), ("on_error", on_error, ON_ERROR)):
        if value not in known:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(known)}")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file: name a folder")
    if not source.shards:
        raise ValueError(f"{source.description['kind']} without images: there is nothing to protect")
    protect.protector(rank)  # before anything is written: one that does not load must not begin an output
    partial = output / manifest.PARTIAL / f"{where_pids_hold()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    manifest.keep_settings(output, run_settings(source, kind, protect, on_error), partial)
    progress = Progress(output, source, report, report_every)
    missing = []
    for shard in range(number, len(source.shards), processes):
        mark = manifest.read_mark(output, shard)
        if mark is None or manifest.damaged_files(output, mark):
            # Before any work: other processes take what has a mark for complete.
            manifest.part_files(output, shard)[1].unlink(missing_ok=True)
            missing.append(shard)
    for shard in missing:
        writer = WRITERS[kind](source, shard, partial, on_error == "mark")
        _protect_shard(source, shard, output, writer, protect, on_error, rank, progress)
        progress.end_shard()
    summary = manifest.summarize(output, len(source.shards))
    if summary.complete:
        # Whoever else finishes at this moment writes the same card before removing anything.
        with contextlib.suppress(FileNotFoundError):
            manifest.write_in_place(data_card(output, summary).encode(), output / "README.md", partial)
    shutil.rmtree(partial, ignore_errors=True)
    _remove_left_behind(output / manifest.PARTIAL)
    return summary


def where_pids_hold() -> str:
    """This machine, and on Linux its part in which a process number says whether that process lives: containers of one
    host may share its name, and the output, and know nothing of each other's processes."""
    try:
        space = f".{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        space = ""
    return socket.gethostname() + space


def _remove_left_behind(folder: Path) -> None:
    """Remove what processes that were killed left half-written, and the folder itself if nobody else works there."""
    here = where_pids_hold()
    for partial in folder.glob("*"):
        owner, _, process = partial.name.rpartition("-")[0].rpartition("-")
        with contextlib.suppress(OSError, ValueError):
            killed = owner == here and not psutil.pid_exists(int(process))
            # A folder's own time is not that of what is written below it.
            newest = max(path.stat().st_mtime for path in (partial, *partial.rglob("*")))
            if killed or time.time() - newest > LONG_AGO:
                shutil.rmtree(partial, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def wait_for_others(
    output: Path, shards: int, report: Callable[[str], None], seconds: float = 5.0
) -> manifest.Summary:
    """Wait until every shard is complete, whoever makes it."""
    said = 0
    while not (summary := manifest.summarize(output, shards)).complete:
        if summary.finished_shards != said:
            said = summary.finished_shards
            report(f"{said} of {shards} shards are complete; waiting for the other processes")
        time.sleep(seconds)
    return summary


def _protect_shard(
    source: Source,
    shard: int,
    output: Path,
    writer: ShardWriter,
    protect: ProtectImages,
    on_error: str,
    rank: int | None,
    progress: Progress,
) -> None:
    lines = []
    for record, outcome in _outcomes(source, shard, protect, rank):
        line = {
            "source": record.key,
            "input_sha256": None if record.image is None else hashlib.sha256(record.image).hexdigest(),
        }
        if isinstance(record.mask, bytes):
            line["mask_sha256"] = hashlib.sha256(record.mask).hexdigest()
        error = record.error or outcome.error
        if not error:
            try:
                file, at = writer.add(record, outcome.png)
            except ValueError as problem:
                error = str(problem)
            else:
                digest = hashlib.sha256(outcome.png).hexdigest()
                line |= {"status": "protected", "output": file, "at": at, "output_sha256": digest}
                protected = outcome.protected
                line |= noise_levels(protected.original, protected.picture, protected.region)
                line["tinted"] = protected.tinted
                if protected.carried_noise:
                    line["noise_before"] = protected.before.share
                if protected.notes:
                    line["notes"] = list(protected.notes)
                written = True
        if error:
            if on_error == "raise":
                raise RecordError(f"{record.key}: {error}; mend it, or choose --on_error mark or drop")
            written = bool(record.name) and writer.add_failed(record, error)
            line |= {"status": "failed", "error": error}
        if written and (others := source.other_images(record)):
            line["unprotected"] = others
        lines.append(line)
        progress.add()
    writer.close()
    files = put_shard_in_place(writer.partial, output, writer.names)
    manifest.complete_shard(output, shard, lines, files, writer.partial)


def _outcomes(
    source: Source, shard: int, protect: ProtectImages, rank: int | None
) -> Iterator[tuple[Record, Outcome]]:
    """Every record with what became of it; a damaged end of the shard is a record of its own."""
    records: list[Record] = []  # those whose outcome is still to come: a few, where a GPU takes several at once

    def rows():
        try:
            for record in source.read(shard):
                records.append(record)
                yield record.image, record.mask, record.classes
        except SourceError as error:
            records.append(Record(source.shards[shard].name, "", None, error=str(error)))
            yield None, None, None

    for outcome in protect.outcomes(rows(), rank):
        yield records.pop(0), outcome
