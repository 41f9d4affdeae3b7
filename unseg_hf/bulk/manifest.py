"""What lies beside the images of an output: its settings, and for every shard a line a record and a mark that it is
complete."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..image_files import sha256_of
from ..image_tasks import stays_inside

SETTINGS = "settings.json"
FOLDER = "manifest"
PARTIAL = ".partial"
_OF_FILES = ("source.listing", "source.sizes_and_times", "output.shards")  # what the source's files decide
SETTINGS_KEYS = {
    "source": ("kind", "image_column", "listing"),
    "output": ("kind", "shards", "on_error"),
    "protection": (
        "epsilon",
        "epsilon_background",
        "masks",
        "label_maps",
        "ignore_labels",
        "mode",
        "whole_image",
    ),
    "model": ("name", "identity"),
    "versions": ("unseg_hf",),
}
"""What [`unseg_hf.bulk.run.run_settings`] writes for every kind of source, but for what was not there from the
beginning (`tint`): outputs that are older can be verified, and not be gone on with."""


TINTED = {"with_tint": True, "without_tint": False}
"""Counts of a mark, and what lines say of the images that they count (`tinted`; None where there is no choice)."""


class SettingsError(ValueError):
    """An output was made with other settings than those asked for; names them."""


def versions() -> dict[str, str]:
    """Versions of what decides the bytes of an output."""
    import PIL
    import pyarrow
    import torch
    import transformers

    from .. import __version__

    return {
        "unseg_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pillow": PIL.__version__,
        "pyarrow": pyarrow.__version__,
    }


def keep_settings(output: Path, settings: Mapping[str, Any], partial: Path) -> None:
    """Write the settings of a new output, or compare them with those of one that was begun.

    Raises:
        SettingsError: they differ.
        FileExistsError: the folder holds something else.
    """
    file = output / SETTINGS
    if not file.is_file():
        others = [path for path in output.glob("*") if path.name not in (PARTIAL, SETTINGS)]
        # Asked once more: another process may have begun meanwhile.
        if others and not file.is_file():
            raise FileExistsError(f"{output} holds files and no {SETTINGS}: choose a new folder")
        write_in_place(json.dumps(settings, indent=2).encode() + b"\n", file, partial)
    there, wanted = (dict(_flat(values)) for values in (read_settings(output), json.loads(json.dumps(settings))))
    different = [key for key in sorted(there.keys() | wanted.keys()) if there.get(key) != wanted.get(key)]
    if different and all(key in _OF_FILES for key in different):
        raise SettingsError(
            f"{output} was begun with other images or masks: files were added, removed, renamed or changed since; "
            "choose another folder, or give the files back the times that they had"
        )
    if different:
        said = ", ".join(f"{key} {there.get(key)!r} and not {wanted.get(key)!r}" for key in different)
        raise SettingsError(f"{output} was begun with {said}: go on with the same, or choose another folder")


def read_settings(output: Path) -> dict[str, Any]:
    """The settings of an output; FileNotFoundError if there are none, ValueError if they are damaged."""
    damaged = f"{output / SETTINGS} is damaged: take it from another copy, or protect into a new folder"
    try:
        settings = json.loads((output / SETTINGS).read_text())
    except ValueError as error:
        raise ValueError(damaged) from error
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{output} has no {SETTINGS}: it is no output of training_scripts/protect_dataset.py"
        ) from None
    if not _has(settings, SETTINGS_KEYS) or not all(
        _has(settings[part], keys) for part, keys in SETTINGS_KEYS.items()
    ):
        raise ValueError(damaged)
    return settings


def _has(value: Any, keys: Iterable[str]) -> bool:
    return isinstance(value, dict) and value.keys() >= set(keys)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def write_in_place(data: bytes, target: Path, partial: Path) -> None:
    """Write a file that is there whole or not at all; what a killed process leaves is below `partial`."""
    partial.mkdir(parents=True, exist_ok=True)
    temporary = partial / target.name
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(temporary, target)


def complete_shard(
    output: Path, shard: int, lines: list[dict[str, Any]], files: Mapping[str, str], partial: Path
) -> dict[str, Any]:
    """Write a shard's lines, and then the mark that says it is complete, which is returned.

    Args:
        output: folder of the data set.
        shard: its number.
        lines: one for each record.
        files: sha256 of the shard's files by name.
        partial: as for [`write_in_place`].
    """
    data = b"".join(json.dumps(line, sort_keys=True).encode() + b"\n" for line in lines)
    lines_file, mark_file = part_files(output, shard)
    write_in_place(data, lines_file, partial)
    names = f"{FOLDER}/{lines_file.name}"
    mark = {"shard": shard, **counts_of(lines), "files": {**files, names: hashlib.sha256(data).hexdigest()}}
    write_in_place(json.dumps(mark, indent=1).encode() + b"\n", mark_file, partial)
    return mark


def counts_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a mark says of a shard's lines."""
    return {
        "records": len(lines),
        "failed": sum(line["status"] != "protected" for line in lines),
        "max_noise": max((line["max_noise"] for line in lines if line["status"] == "protected"), default=0),
        **{name: sum(line.get("tinted") is tinted for line in lines) for name, tinted in TINTED.items()},
        "unchanged": sum(line["status"] == "protected" and _is_unchanged(line) for line in lines),
        "protected_before": sum("noise_before" in line for line in lines),
        "unprotected": _sum(line.get("unprotected", {}) for line in lines),
    }


def _is_unchanged(line: Mapping[str, Any]) -> bool:
    return not line["max_noise"] and not line["max_noise_background"]


def part_files(output: Path, shard: int) -> tuple[Path, Path]:
    """The file of a shard's lines, and that of its mark."""
    return tuple(output / FOLDER / f"{shard:06d}.{suffix}" for suffix in ("jsonl", "json"))


def read_mark(output: Path, shard: int) -> dict[str, Any] | None:
    """The mark of a shard; None if it is not complete, or the mark is damaged."""
    try:
        mark = json.loads(part_files(output, shard)[1].read_text())
    except (FileNotFoundError, ValueError):
        return None
    whole = _has(mark, ("records", "failed", "max_noise", "unprotected", "files"))
    return mark if whole and _has(mark["files"], ()) and _has(mark["unprotected"], ()) else None


def read_lines(output: Path, shard: int) -> list[dict[str, Any]]:
    """One dictionary for each record of a complete shard."""
    return [json.loads(line) for line in part_files(output, shard)[0].read_text().splitlines()]


def strange_files(output: Path, shards: int) -> list[str]:
    """Files of an output that no run wrote: they are not checked, and may be unprotected images."""
    known = {SETTINGS, "README.md", ".gitattributes"}  # the last is the Hub's
    for shard in range(shards):
        known |= {path.relative_to(output).as_posix() for path in part_files(output, shard)}
        known |= (read_mark(output, shard) or {"files": {}})["files"].keys()
    present = {path.relative_to(output).as_posix() for path in output.rglob("*") if _is_something(path)}
    passing = (f"{PARTIAL}/", ".cache/huggingface/")  # of runs, and of downloads from the Hub
    return sorted(name for name in present - known if not name.startswith(passing))


def _is_something(path: Path) -> bool:
    """Whether it is no plain folder: a link to one holds files, too."""
    return path.is_file() or path.is_symlink()


def damaged_files(output: Path, mark: Mapping[str, Any]) -> list[str]:
    """What is wrong with the files of a complete shard, one line each."""
    wrong = []
    for name, digest in mark["files"].items():
        file = output / name
        if not stays_inside(name) or (file.exists() and not file.is_file()):
            wrong.append(f"{name}: this is no file of the output")
            continue
        try:
            if sha256_of(file) != digest:
                wrong.append(f"{name}: its sha256 is not the manifest's: it was changed")
        except OSError as error:
            wrong.append(f"{name}: it cannot be read ({error.strerror})")
    return wrong


@dataclass(frozen=True)
class Summary:
    """What is in an output: `complete` once all shards are; `failed` records are listed in the manifest.

    `with_tint` and `without_tint` count images, but for those in which nothing is protected or each class has a noise,
    `unchanged` those of which not one pixel was changed, because there was nothing in them to protect,
    `protected_before` those that carried the noise already, and `unprotected`, by column or suffix of the source,
    those that lay beside the ones that were protected.
    """

    shards: int
    finished_shards: int
    records: int
    failed: int
    max_noise: int
    with_tint: int
    without_tint: int
    unchanged: int
    protected_before: int
    unprotected: dict[str, int]

    @property
    def complete(self) -> bool:
        return self.finished_shards == self.shards


def summarize(output: Path, shards: int) -> Summary:
    """What the marks of all processes say."""
    marks = [mark for mark in (read_mark(output, shard) for shard in range(shards)) if mark is not None]
    return Summary(
        shards=shards,
        finished_shards=len(marks),
        records=sum(mark["records"] for mark in marks),
        failed=sum(mark["failed"] for mark in marks),
        max_noise=max((mark["max_noise"] for mark in marks), default=0),
        **{name: sum(mark.get(name, 0) for mark in marks) for name in TINTED},
        **{name: sum(mark.get(name, 0) for mark in marks) for name in ("unchanged", "protected_before")},
        unprotected=_sum(mark["unprotected"] for mark in marks),
    )


def unprotected_images(output: Path, summary: Summary) -> list[str]:
    """Which images of an output are clean copies out of its source, in a few words for each column or suffix, and for
    those that there was nothing to protect in."""
    where = "with the suffix" if read_settings(output)["source"]["kind"] == "tars" else "in the column"
    counts = {f"{where} {name}": count for name, count in summary.unprotected.items()}
    if summary.unchanged:
        counts["with nothing to protect (an empty mask, say; see manifest/)"] = summary.unchanged
    return [
        f"{count} {'images' if count > 1 else 'image'} {which} {'are' if count > 1 else 'is'} not protected"
        for which, count in counts.items()
    ]


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    return dict(sorted(sum(map(Counter, counts), Counter()).items()))
