"""Checks of an output that was published or copied: against its manifest, and against the originals."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import image_files
from ..fidelity import max_noise
from ..image_files import one_line
from ..inputs import given_masks, mask_of_box, union_of
from ..mapping import boxes_prompt, stored_prompt
from ..protection import whole_levels
from . import manifest
from .opening import open_source
from .outputs import published_images
from .records import Source, SourceError

_SAME = ("split", "name", "revision", "shard_size", "drop_columns")
"""Options of a source that its description holds."""


@dataclass
class Verification:
    """What a check found: a line for each thing that is wrong, and numbers of what was looked at."""

    wrong: list[str] = field(default_factory=list)
    files: int = 0
    images: int = 0
    failed_before: int = 0  # records that could not be protected, as the manifest says
    unchecked: str = ""  # what of the bound could not be checked, and why
    unprotected: list[str] = field(default_factory=list)  # which images were never meant to be protected


def verify(output: Path, originals: list[str] | None = None, masks: Path | None = None) -> Verification:
    """Check every file of an output, and with originals every pixel.

    Args:
        output: folder that `training_scripts/protect_dataset.py` wrote.
        originals: what was protected, as it was named then.
        masks: for folders of images: the masks; without them the bound inside the masks is checked everywhere.

    Returns:
        What is wrong; the list is empty if nothing is.

    Raises:
        FileNotFoundError: the folder is no such output.
        ValueError: the originals are not those that the manifest lists, or the settings are damaged.
    """
    settings = manifest.read_settings(output)
    result, shards = Verification(), settings["output"]["shards"]
    source = _originals(settings, originals, masks, output) if originals else None
    if source is not None:
        result.unchecked = _unchecked(settings, masks)
        if len(source.shards) != shards:
            result.wrong.append(
                f"the originals are {len(source.shards)} shards, and {manifest.SETTINGS} says {shards}"
            )
    for shard in range(shards):
        mark = manifest.read_mark(output, shard)
        if mark is None:
            result.wrong.append(
                f"shard {shard}: it is not complete, or its mark is damaged; run protect_dataset.py again"
            )
            continue
        result.files += len(mark["files"])
        result.failed_before += mark["failed"]
        damage = manifest.damaged_files(output, mark)
        result.wrong += damage
        lines_file = manifest.part_files(output, shard)[0].relative_to(output).as_posix()
        if any(line.startswith(f"{lines_file}:") for line in damage):
            continue
        lines = manifest.read_lines(output, shard)
        result.images += sum(line["status"] == "protected" for line in lines)
        counts = manifest.counts_of(lines)
        if differing := [name for name in counts if mark.get(name, counts[name]) != counts[name]]:
            result.wrong.append(f"shard {shard}: its mark and its lines differ in {', '.join(differing)}")
        if source is not None:
            masks_given = masks is not None or settings["source"]["kind"] != "images"
            result.wrong += _broken_bounds(source, shard, lines, output, settings, masks_given)
    result.unprotected = manifest.unprotected_images(output, manifest.summarize(output, shards))
    result.wrong += [f"{name}: it is not in the manifest" for name in manifest.strange_files(output, shards)]
    return result


def _unchecked(settings: dict[str, Any], masks: Path | None) -> str:
    """Why the bound outside the masks cannot be checked; nothing if it can."""
    if settings["protection"]["whole_image"]:
        return ""
    if not settings["protection"]["masks"]:
        return "the bound outside the masks was NOT checked: the generator found them, and they are not kept"
    if settings["source"]["kind"] == "images" and masks is None:
        return "the bound outside the masks was NOT checked: name them with --masks"
    return ""


def _originals(settings: dict[str, Any], originals: list[str], masks: Path | None, output: Path) -> Source:
    described = settings["source"]
    if described["kind"] == "images":
        columns = {}
    elif described["kind"] == "tars":
        columns = {"image_column": described["image_suffix"], "mask_column": described["mask_column"]}
    else:
        columns = {"image_column": described["image_column"], "mask_column": described["mask_column"]}
    columns |= {key: described[key] for key in _SAME if key in described}
    source = open_source(originals, output, masks=masks, verifying=True, **columns)
    if source.listing != described["listing"] or source.description["kind"] != described["kind"]:
        raise ValueError(
            f"{', '.join(originals)}: these are not the originals of {output}, or files were added, removed or "
            "renamed since: name them as they were named when they were protected"
        )
    return source


def _broken_bounds(
    source: Source, shard: int, lines: list[dict[str, Any]], output: Path, settings: dict[str, Any], masks_given: bool
) -> Iterator[str]:
    """One line for each image of a shard that is further from its original than the budget allows, or has another;
    where masks were given, also for one whose mask is not there."""
    places = [(line["output"], line["at"]) for line in lines if line["status"] == "protected"]
    images = published_images(output, places, settings["source"]["image_column"])
    records = source.read(shard)
    for line in lines:
        try:
            record = next(records, None)
        except SourceError as error:
            if line["status"] == "protected":
                yield f"{line['output']}: its original {line['source']} cannot be read: {error}"
            return
        if line["status"] != "protected":
            continue
        where = line["output"] if line["at"] is None else f"{line['output']}, {line['at']}"
        if record is None or record.key != line["source"]:
            yield f"{where}: its original {line['source']} is not there"
            return
        try:
            image = next(images)
        except Exception as error:  # of whatever reads parquet files and tars that were damaged
            yield f"{where}: it cannot be read ({one_line(error)})"
            return
        if hashlib.sha256(image).hexdigest() != line["output_sha256"]:
            yield f"{where}: its image is not the one in the manifest"
        if record.image is None or hashlib.sha256(record.image).hexdigest() != line["input_sha256"]:
            yield f"{where}: its original {record.key} was changed since, or cannot be read"
        elif record.mask is None and masks_given and "mask_sha256" in line:
            yield f"{where}: its mask is missing, so that the bound cannot be checked"
        elif _is_another(record.mask, line.get("mask_sha256")):
            yield f"{where}: its mask was changed since, so that the bound cannot be checked"
        elif problem := _beyond(record.image, image, record.mask, settings["protection"], line):
            yield f"{where}: {problem}"
    if next(records, None) is not None:
        yield f"{source.shards[shard].name}: it has more images than the manifest lists"


def _is_another(mask: Any, digest: str | None) -> bool:
    """Whether a mask is not the one of the run, where that was a file."""
    return isinstance(mask, bytes) and digest is not None and hashlib.sha256(mask).hexdigest() != digest


def _beyond(original: bytes, published: bytes, mask: Any, protection: dict[str, Any], line: dict[str, Any]) -> str:
    """What is wrong with a pair; nothing if all is as promised."""
    try:
        before, after = image_files.read(original), image_files.read(published)
        if before.pixels.shape != after.pixels.shape or before.pixels.dtype != after.pixels.dtype:
            return "it has another size or another kind of pixels than its original"
        region = _region(mask, (before.height, before.width), protection)
    except ValueError as error:
        return str(error)
    found = max_noise(before.pixels, after.pixels, region)
    allowed = whole_levels(before.max_value, protection["epsilon"], protection["epsilon_background"])
    for where, largest, most in zip(("in", "outside"), found, allowed, strict=True):
        if largest > most:
            return f"it differs from its original by {largest} {where} the mask, where {most} is the most"
    noise, said = max(found) * 255 / before.max_value, max(line["max_noise"], line["max_noise_background"])
    if not math.isclose(noise, said):
        return f"it differs from its original by {noise:g} of 255, and the manifest says {said:g}"
    return ""


def _region(mask: Any, size: tuple[int, int], protection: dict[str, Any]) -> np.ndarray:
    """Where the full budget applied, `(height, width)` bool; everywhere if the mask is not known."""
    if mask is None or not protection["masks"]:
        return np.ones(size, dtype=bool)
    if box_format := protection.get("boxes"):
        prompt = boxes_prompt(mask, box_format)
        masks = [mask_of_box(box, size) for box in prompt.boxes or ()]
        return union_of(masks or [np.zeros(size, dtype=bool)])
    prompt = stored_prompt(mask, protection["label_maps"], ignore_labels=protection["ignore_labels"])
    return union_of(given_masks(prompt, size)[0])
