"""The card of a protected data set, and the data set on the Hugging Face Hub."""

import glob
import json
import re
import shlex
from pathlib import Path
from typing import Any

from ..image_files import printable
from .manifest import PARTIAL, Summary, read_settings, strange_files, unprotected_images

TEMPLATE = """# Protected images

The images of this data set are **protected**: they carry noise that is meant to spoil segmentation models trained on
them. They are not the original images. The noise was made with unseg-hf {version}, by a generator of
unlearnable noise after UnSeg (NeurIPS 2024).
{unprotected}
| | |
|---|---|
| images | {protected} protected, {failed} that could not be read and are left out{marked} |
| generator | {model} (`{identity}`) |
| budget | at most {inside:g} grey levels of 255 {region}, {outside:g} elsewhere |
| largest change in any image | {largest:g} grey levels of 255 |
| what was protected | {what} |
| format | PNG, whatever the originals were{beside} |

`{settings}` has all settings and versions; `manifest/` has a line for every record, with the sha256 of its original
and of its protected image. `unseg verify FOLDER` checks a copy of this data set against it, and with
`--originals` also that no pixel of any image changed by more than the budget.

## What this does not promise

- That every model trained on these images fails. How far the noise protects depends on the data, the model and the
  training; what has been measured is in the README of unseg-hf.
- That the noise survives. JPEG, resizing, blurring or greyscale take part of it or all of it, and whoever knows the
  generator can try to remove it.
- Anything for copies of the originals that are published elsewhere.
- Privacy: people and places can be recognised as before.
"""


def data_card(output: Path, summary: Summary) -> str:
    """README.md of a complete output: front matter for the Hub, and what was done to the images."""
    from huggingface_hub import DatasetCardData

    settings = read_settings(output)
    protection, kind = settings["protection"], settings["output"]["kind"]
    paths = {"parquet": "data/*.parquet", "tars": "data/**/*.tar", "folder": "data/**/*.png"}
    config = {"config_name": "default", "data_files": [{"split": "train", "path": paths[kind]}]}
    if kind == "folder" and settings["source"]["kind"] != "images":
        config["drop_labels"] = True  # folders that are called after files of the source are no classes
    front = DatasetCardData(
        tags=["protected-images", "unlearnable-examples", "unseg"],
        task_categories=["image-segmentation"],
        configs=[config],
    )
    marked = kind == "parquet" and settings["output"]["on_error"] == "mark" and summary.failed
    text = TEMPLATE.format(
        version=settings["versions"]["unseg_hf"],
        unprotected="".join(
            f"\n**{_literally(sentence)}**, but as in the source.\n"
            for sentence in unprotected_images(output, summary)
        ),
        protected=summary.records - summary.failed - summary.unchanged,
        failed=summary.failed,
        marked=" (rows without an image; `protection_error` says why)" if marked else "",
        model=settings["model"]["name"] or "the one in the package",
        identity=settings["model"]["identity"],
        inside=protection["epsilon"] * 255,
        outside=protection["epsilon_background"] * 255,
        region=_where(protection),
        largest=summary.max_noise,
        what=_what(protection),
        beside="; what lay beside them is in `beside/`, under their names" if kind == "folder" else "",
        settings="settings.json",
    )
    return f"---\n{front.to_yaml()}\n---\n\n{text}"


def _literally(text: str) -> str:
    """Text that holds names out of the source, as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", printable(text))


def _where(protection: dict[str, Any]) -> str:
    if protection["whole_image"]:
        return "everywhere"
    if protection.get("boxes"):
        return "in the boxes"
    return "in the masks" if protection["masks"] else "in what was found"


def _what(protection: dict[str, Any]) -> str:
    if protection["whole_image"]:
        return "the whole image, which hardly protects: it does not say where objects are"
    each = "each with noise of its own" if protection["mode"] == "per_segment" else "together"
    each = "each with the noise of its class" if protection.get("classes") else each
    if not protection["masks"]:
        return f"the objects that the generator found by itself, {each}"
    if protection["label_maps"]:
        ignored = ", ".join(map(str, protection["ignore_labels"]))
        return f"every label of the label maps but {ignored}, {each}"
    return f"the {'boxes' if protection.get('boxes') else 'masks'} of the data set, {each}"


def push_dataset(output: Path, dataset_id: str, private: bool = False) -> str:
    """Upload a complete output and nothing else in its folder; what the Hub has already is not sent again.

    Args:
        output: folder of the data set.
        dataset_id: `"namespace/name"`.
        private: whether a new repository is private; one that exists stays as it is.

    Returns:
        The address of the data set.

    Raises:
        HubError: the Hub cannot be reached or refuses; says why, and how to push later.
    """
    from huggingface_hub import HfApi

    from ..training.publishing import HubError, reason

    api = HfApi()
    strange = strange_files(output, read_settings(output)["output"]["shards"])
    try:
        url = api.create_repo(dataset_id, repo_type="dataset", private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            repo_type="dataset",
            folder_path=output,
            ignore_patterns=[f"{PARTIAL}/**", *map(glob.escape, strange)],
            commit_message="Upload protected images",
        )
    except Exception as error:  # of any of the client's layers
        left_out = [part for name in (f"{PARTIAL}/**", *map(glob.escape, strange)) for part in ("--exclude", name)]
        later = shlex.join(["hf", "upload", dataset_id, str(output), "--repo-type", "dataset", *left_out])
        raise HubError(
            f"could not push to {dataset_id} at {api.endpoint}: {reason(error)}. The images are safe in "
            f"{json.dumps(str(output))}; push them later with: {later}"
        ) from error
    return str(url)
