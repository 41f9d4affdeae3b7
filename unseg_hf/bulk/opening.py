"""Which kind of source a location is."""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any

from ..image_files import READ_SUFFIXES
from ..image_tasks import files_below
from . import manifest
from .records import Source

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_METADATA = ("metadata.jsonl", "metadata.csv")  # of folders of images, as `datasets` reads them
_SPLIT = re.compile(
    r"(?:(.+)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?|(train|test|validation|valid|val|dev))\.parquet", re.IGNORECASE
)
_TREE_SETTINGS = "unseg-protected.json"  # of `unseg protect-dataset`, which needs packages that this does without


def open_source(
    inputs: Sequence[str],
    output: Path,
    *,
    masks: Path | None = None,
    image_column: str | None = None,
    mask_column: str | None = None,
    box_column: str | None = None,
    class_column: str | None = None,
    drop_columns: Sequence[str] = (),
    split: str | None = None,
    name: str | None = None,
    revision: str | None = None,
    shard_size: int = 500,
    verifying: bool = False,
) -> Source:
    """The source at a location.

    Args:
        inputs: parquet files, tars, images, patterns for them, folders of any of these, a folder that `save_to_disk`
            wrote, or a Hub id.
        output: where the protected images go; nothing below it is taken for an input.
        masks: for images: a folder of masks, matched by name as `unseg protect` does.
        image_column: column of images, or the suffix of images in tars; by default `image`, and in tars the only image
            of a sample.
        mask_column: the same of masks; in tars `json` reads SA-1B's annotations.
        box_column: of tables: column of lists of boxes, in place of masks.
        class_column: of tables: column of lists of the classes of masks or boxes.
        drop_columns: columns, in tars suffixes, that the output does not get.
        split: of a data set on disk or on the Hub, `train` by default, or of parquet files that are named so
            (`test.parquet`, or as on the Hub `test-00000-of-00001.parquet`).
        name: configuration of a data set of the Hub.
        revision: of a data set of the Hub.
        shard_size: images in a shard; tars and files of streamed data sets are shards of their own.
        verifying: the output is there already; what it was made of is not questioned.

    Raises:
        ValueError: nothing is there, or options do not fit; names them.
        OSError: something cannot be read.
    """
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size}: must be at least 1")
    from .images import ImageFolder

    columns = (image_column or "image", mask_column or box_column, class_column, drop_columns)  # of tables
    found = [Path(path) for pattern in inputs for path in (_matches(pattern) or [pattern])]
    for path in found:
        _refuse_protected(path)
    if len(found) == 1 and any((found[0] / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        from .tables import SavedDataset

        _refuse(masks=masks, name=name, revision=revision)
        return SavedDataset(found[0], split or "train", shard_size, *columns)
    if len(found) > 1 and (missing := next((path for path in found if not path.exists()), None)):
        raise ValueError(f"{missing}: no such file or folder; a Hub id stands alone")
    parquet, tars = (_files(found, suffixes, output) for suffixes in ((".parquet",), TAR_SUFFIXES))
    strange = [path for path in found if path.is_file() and path not in parquet + tars]
    if parquet + tars and not strange:
        # A folder with photos beside archives: neither may be left out silently.
        strange = [image for path in found if path.is_dir() for image in _files([path], READ_SUFFIXES, output)]
    if (parquet and tars) or (strange and parquet + tars):
        raise ValueError(f"{', '.join(inputs)}: parquet files, tars and images are not mixed; name those of one kind")
    if parquet:
        from .tables import ParquetFiles

        _refuse(masks=masks, name=name, revision=revision)
        source = ParquetFiles(_of_split(parquet, split, verifying), shard_size, *columns)
        source.description |= {} if split is None else {"split": split}
        return source
    if tars:
        from .tars import TarFiles

        _refuse(masks=masks, box_column=box_column, class_column=class_column)
        _refuse(split=split, name=name, revision=revision)
        return TarFiles(tars, image_column, mask_column, drop_columns)
    if masks is None and not verifying:
        _refuse_masks_among(_files([path for path in found if path.is_dir()], _METADATA, output))
    if all(path.exists() for path in found):
        _refuse(image_column=image_column, mask_column=mask_column, drop_columns=" ".join(drop_columns) or None)
        _refuse(box_column=box_column, class_column=class_column, split=split, name=name, revision=revision)
        return ImageFolder(found, shard_size, masks, output)
    from .tables import StreamedDataset

    _refuse(masks=masks)
    options = {} if name is None else {"name": name}
    return StreamedDataset(inputs[0], split or "train", revision, *columns, **options)


def _matches(pattern: str) -> list[str]:
    """What a pattern fits; nothing for the name of something that is there, whatever is in it."""
    if os.path.exists(pattern) or not any(c in pattern for c in "*?["):
        return []
    return sorted(glob(pattern, recursive=True))


def _files(found: Sequence[Path], suffixes: tuple[str, ...], output: Path) -> list[Path]:
    """The files with one of these suffixes, those in folders included, sorted; none that the output holds."""
    files: list[Path] = []
    unreadable: list[str] = []
    for path in found:
        inside = files_below(path, unreadable) if path.is_dir() else [path]
        wanted = [p for p in inside if p.name.lower().endswith(suffixes) and p.is_file()]
        # What begins with a dot is left behind by systems and editors.
        wanted = [p for p in wanted if p == path or not any(part[0] == "." for part in p.relative_to(path).parts)]
        files += sorted({os.path.realpath(p): p for p in sorted(wanted, key=lambda p: -len(p.parts))}.values())
    if unreadable:
        raise OSError(unreadable[0])
    if twice := [path for path, count in Counter(map(os.path.abspath, files)).items() if count > 1]:
        raise ValueError(f"{os.path.relpath(twice[0])}: this file is named twice; name it once")
    return [path for path in files if output.resolve() not in path.resolve().parents]


def _of_split(files: Sequence[Path], split: str | None, verifying: bool) -> Sequence[Path]:
    """Those of a split, where file names say it as the Hub's do."""
    splits = {path: match[1] or match[2] for path in files if (match := _SPLIT.fullmatch(path.name))}
    there = sorted(set(splits.values()))
    if split is None and len(there) > 1 and not verifying:
        raise ValueError(f"the parquet files are those of several splits, {', '.join(there)}: name one with --split")
    if split is not None and split not in there:
        raise ValueError(f"--split {split}: no parquet file is named so ({split}.parquet)")
    return files if split is None else [path for path, own in splits.items() if own == split]


def _refuse_masks_among(metadata: Sequence[Path]) -> None:
    """ValueError where metadata says that images of a folder are masks, say: they would be protected as photos are."""
    for file in metadata:
        try:
            with file.open(encoding="utf-8") as lines:
                first = next(lines, "")
            names = json.loads(first) if file.suffix == ".jsonl" else next(csv.reader([first]))
        except (OSError, ValueError):
            continue  # of whatever else it is
        if other := [name for name in names if str(name).endswith(("_file_name", "_file_names"))]:
            raise ValueError(
                f"{file}: {other[0]} are images of this folder too, and would be protected as photos are. Name the "
                "photos alone, or their masks with --masks; or make a data set of all, load_dataset('imagefolder', "
                "data_dir=...).save_to_disk(...), for --mask_column"
            )


def _refuse_protected(path: Path) -> None:
    """ValueError for what was protected before: its noise would come on top of what is there, beyond any budget."""
    for folder in (path.absolute(), *path.absolute().parents):
        ours = (folder / manifest.SETTINGS).is_file() and (folder / manifest.FOLDER).is_dir()
        if ours or (folder / _TREE_SETTINGS).is_file():
            raise ValueError(f"{path} is protected already, as {folder} says: name the originals")


def _refuse(**options: Any) -> None:
    kinds = {
        "masks": "folders of images",
        "box_column": "tables",
        "class_column": "tables",
        "split": "data sets with splits",
        "name": "the Hub",
        "revision": "the Hub",
    }
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"--{name} {value} is for {kinds.get(name, 'tables and tars')}: this source is none")
