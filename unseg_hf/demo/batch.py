"""Several photos at once: each protected by itself, all of them in one zip file."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from unseg_hf import image_files
from unseg_hf.demo.session import Photo, Workbench, file_stem
from unseg_hf.image_files import one_line
from unseg_hf.inputs import Prompt
from unseg_hf.protection import Protected


def protect_to_zip(
    workbench: Workbench,
    uploads: Sequence[tuple[Path, str]],
    target: Path,
    prompt: Prompt,
    epsilon: float | None = None,
    keep_exif: bool = False,
    on_progress: Callable[[int, int, str], None] = lambda done, count, name: None,
    on_protected: Callable[[Photo, Protected], None] = lambda photo, protected: None,
) -> list[dict[str, Any]]:
    """Protect photos into a zip of PNG files and a `report.json`; one bad photo never stops the others.

    Args:
        workbench: with the generator and the limits.
        uploads: path of each file, and the name that its user knows.
        target: the zip file; it is only there if a photo could be protected.
        prompt: the same for all.
        epsilon: in grey levels of 255.
        keep_exif: leave camera, date and place in the files.
        on_progress: called before each photo, and at the end, with the number done, the number of all, and the name.
        on_protected: called with each photo that is in the zip, and what was made of it.

    Returns:
        An entry for each upload: `input`, `status` ("protected" or "failed"), and `output` and `report`, or `error`.

    Raises:
        ValueError: more photos, or more bytes, than the limits allow.
    """
    limits = workbench.limits
    size = sum(path.stat().st_size for path, _ in uploads if path.is_file())  # of others their own errors say more
    if len(uploads) > limits.photos:
        raise ValueError(f"{len(uploads)} photos: at most {limits.photos} at once; the command line takes folders")
    if size > limits.batch_bytes:
        raise ValueError(
            f"{size / 2**20:.0f} MB of photos: at most {limits.batch_bytes / 2**20:.0f} MB at once; the command line "
            "takes folders"
        )
    entries: list[dict[str, Any]] = []
    taken: set[str] = set()
    # PNG is compressed already.
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for done, (path, name) in enumerate(uploads):
            on_progress(done, len(uploads), name)
            try:
                photo = workbench.open(path, name)
                protected = workbench.protect(photo, prompt, epsilon, keep_exif=keep_exif)
                output = _free_name(file_stem(name), taken)
                archive.writestr(output, image_files.encode_verified(protected.picture, "png"))
                on_protected(photo, protected)
                entry = {"status": "protected", "output": output, "report": protected.report}
            # Whatever is wrong with one photo, the others are wanted.
            except Exception as error:
                entry = {"status": "failed", "error": one_line(error)}
            entries.append({"input": name} | entry)
        archive.writestr("report.json", json.dumps({"images": entries}, indent=2))
    on_progress(len(uploads), len(uploads), "")
    if not any(entry["status"] == "protected" for entry in entries):
        target.unlink()
    return entries


def _free_name(stem: str, taken: set[str]) -> str:
    name, number = f"{stem}_protected.png", 2
    # File systems without upper and lower case would unpack A.png over a.png.
    while name.lower() in taken:
        name, number = f"{stem}_protected_{number}.png", number + 1
    taken.add(name.lower())
    return name
