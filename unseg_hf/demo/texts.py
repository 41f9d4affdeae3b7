"""The words of the demo."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from unseg_hf.demo.session import Marks, percent
from unseg_hf.protect_command import decibels
from unseg_hf.protection import WHOLE_BOX

HEAD = """# Protect a photo
Adds noise of a few grey levels, which segmentation models that are trained on such photos learn in place of what is in
them. How far that goes, and where not, says "About". The photo and what is made of it are deleted after {minutes}
minutes."""

ABOUT = """## What this is
The noise generator of UnSeg ([arXiv 2410.09909](https://arxiv.org/abs/2410.09909), NeurIPS 2024) in the package
`unseg-hf`. You publish a photo, somebody scrapes it, labels it correctly and trains a segmentation model on it: the
model should learn the noise instead of the object. No pixel changes by more than epsilon where you protect, nor, with
the generator of the package, at all elsewhere; that is checked before you get the file.

## What it does not do
- It does not stop anybody from segmenting **this** photo, by hand or with a model that exists already.
- It does not hide who or what is in it, and it is no watermark.
- It helps where nearly all photos that a model is trained on are protected: with one in twenty of them clean, a small
  model kept 61 % of what clean ones teach. One among thousands changes nothing.
- It hardly protects where noise is all over a photo, for that does not say where the object is: mark the objects, if
  only by a box around each.
- It hardly helps against models whose training turns, scales and recolours all photos at once: they kept 97 %.
- Who has this generator can tell that a photo has its noise, and with the object's mask subtract it. Filters made for
  it take it out as well.
- Weak noise is found by some models alone, and strong noise can be seen: at 8, too, stripes show where an object is
  smooth.
- It is lost where the noise is lost: see "What a web site would do" for your own photo.

## What was measured
What follows is what the model card of the generator that is loaded here ({name}) says of results and limits.
"""

WAYS = {
    "objects": "Find objects",
    "boxes": "Boxes, by two clicks",
    "brush": "Brush",
    "points": "Click on objects",
    "whole": "Everything",
}
VIEW_LABELS = {
    "points": "Click on the object",
    "boxes": "Click on two opposite corners",
    "brush": "Your mask",
    "objects": "What will be protected",
    "whole": "Everything gets noise",
}
HINTS = {
    "points": "Click on an object; further clicks say what else is on it, or is not.",
    "boxes": "Click on one corner of a box, then on the opposite one.",
    "brush": "Brush over what is to be protected, or upload a mask.",
    "objects": "What the generator takes for objects is protected.",
    "whole": "The whole photo gets noise. That hardly protects: it does not say where the object is.",
}
NOTHING_MARKED = {
    "points": "nothing is marked yet: click on an object first",
    "boxes": "no box yet: click on two opposite corners first",
    "brush": "nothing is brushed yet: brush over the object, or upload a mask",
}
UPLOAD = "Drop a photo, click, or paste one\nat most {mb} MB and {megapixels} megapixels"
EPSILON = "largest change of a pixel in the mask, of 255; measured at 8: below, fewer models fall for it"
WORKING = "Protecting the photo…"
DONE = "Protected. Compare it with the original, and download it below."
EXPIRED = "What was made of this photo is deleted by now: upload it again."
EXIF = "camera, date and place (GPS) are removed from the download unless you tick this"
TYPED = "for clicks: x,y   for boxes: left,top,right,bottom"
WEB = (
    "A detail of the protected photo after what web sites do to photos, and the share of the noise that is left, "
    "measured on the whole photo (half size: enlarged again). What a site made of yours, `unseg inspect original.jpg "
    "protected.png --published downloaded.jpg` says."
)
COMMAND = (
    "The same pixels from a terminal (`pip install unseg-hf`); for a brushed mask, download it above. The command "
    "keeps EXIF."
)
BATCH = (
    "Up to {photos} photos and {mb} MB at once, each at most {file_mb} MB. Each is protected by itself and comes back "
    "as a PNG in a zip, with a report; one that cannot be read does not stop the others. Look at what was taken for "
    "the objects; where that is wrong, mark them, one photo at a time, or use `unseg protect` with masks or boxes. "
    "Noise all over a photo hardly protects it."
)


NOT_ON_IT = "So far there are only clicks on what is not the object: choose “on the object”, and click on it."


def nothing_marked(marks: Marks) -> str:
    """Why there is nothing to protect, and what to do."""
    return NOT_ON_IT if marks.way == "points" and marks.points else NOTHING_MARKED[marks.way]


def found(marks: Marks, masks: Sequence[np.ndarray], notes: Sequence[str]) -> str:
    """What the marks gave, for the line under the choice of ways."""
    if marks.way == "boxes" and marks.corner is not None:
        return "Now click on the opposite corner."
    if marks.way == "points" and marks.points and not masks:
        return NOT_ON_IT
    if notes and not set(notes) <= {WHOLE_BOX}:
        text = "; ".join(dict.fromkeys(notes))
        everything = marks.way in ("points", "objects") and bool(masks) and masks[0].all()
        advice = " That hardly protects: draw a box, or brush over it." if everything else ""
        return f"{text[0].upper()}{text[1:]}.{advice}"
    if not masks or marks.way == "whole":
        return HINTS[marks.way]
    share = float(np.logical_or.reduce(masks).mean())
    if not share:
        return "The mask is empty: nothing would be protected."
    one, several = ("box", "boxes") if notes else ("object", "objects")
    count = f"{len(masks)} {several}" if len(masks) > 1 else f"1 {one}"
    advice = {"brush": " Clear it to brush anew.", "objects": " Not right? Mark boxes, or brush."}
    return f"{count}, {percent(share)} of the photo.{advice.get(marks.way, '')}"


def typed_marks(text: str, marks: Marks, label: int) -> Marks:
    """Marks with a point or box that was typed; ValueError for anything else."""
    wanted = {"points": (2, "x,y"), "boxes": (4, "left,top,right,bottom")}
    if marks.way not in wanted:
        raise ValueError("coordinates are for clicks and boxes: choose one of them first")
    count, form = wanted[marks.way]
    # The page shows messages as HTML.
    quoted = html.escape(text[:40], quote=False)
    try:
        numbers = tuple(round(float(part)) for part in text.split(","))
    except (ValueError, OverflowError):
        numbers = ()
    if len(numbers) != count:
        raise ValueError(f"{quoted!r} is not {form} in pixels, with commas between")
    if marks.way == "points":
        return marks.clicked(*numbers, label)
    if not (numbers[0] < numbers[2] and numbers[1] < numbers[3]):
        raise ValueError(f"box {quoted}: left must be smaller than right, and top smaller than bottom, in pixels")
    return replace(marks, corner=None, boxes=(*marks.boxes, numbers))


def report(rows: Sequence[tuple[str, str]], figures: dict[str, Any], exif_gone: bool) -> str:
    """The report as a Markdown table with notes."""
    notes = list(figures["notes"]) + (["EXIF (camera, date, place) removed"] if exif_gone else [])
    table = "\n".join(f"| {what} | {figure} |" for what, figure in rows)
    return f"| Report | |\n|---|---|\n{table}\n\n" + "".join(f"- {note}\n" for note in notes)


def web_caption(title: str, share: float | None) -> str:
    # A little below 0 is no noise either: what is left then points the other way by chance.
    return f"{title}: no noise" if share is None else f"{title}: {max(share, 0):.0%} left"


def batch_table(entries: Sequence[dict[str, Any]]) -> str:
    """What happened to each photo, as a Markdown table."""
    lines = ["| Photo | Result |", "|---|---|"]
    for entry in entries:
        if entry["status"] == "failed":
            result = f"**failed**: {entry['error']}"
        else:
            figures = entry["report"]
            figure = (
                f"largest change {figures['max_noise']:g}; PSNR {decibels(figures['psnr'])}; noise on "
                f"{percent(figures['protected_share'])}"
            )
            result = "; ".join([figure, *figures["notes"]])
        lines.append(f"| {_cell(entry['input'])} | {_cell(result)} |")
    done = sum(entry["status"] == "protected" for entry in entries)
    return f"{done} of {len(entries)} protected\n\n" + "\n".join(lines)


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|")
