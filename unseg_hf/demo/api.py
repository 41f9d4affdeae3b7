"""The demo's named endpoints, for `gradio_client` and the page's "Use via API"."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import gradio as gr
from PIL import Image

from unseg_hf import image_files
from unseg_hf.demo.components import FileUpload, PhotoUpload, Upload
from unseg_hf.demo.session import Workbench, file_stem
from unseg_hf.inputs import Prompt

PROTECT = """Protect one photo. Say what with one of mask, boxes, points or whole_image; with none of them the objects
that the generator finds are protected; where it finds none, noise is all over the photo and hardly protects. Returns
the protected PNG (lossless; EXIF aside, equal to what `unseg protect` writes), the mask as PNG, and a report:
max_noise and max_noise_background in grey levels of 255, psnr in dB, ssim, protected_share, notes and the settings."""
PROPOSE = "The objects that the generator finds in a photo by itself: a list of mask PNGs (white inside), maybe empty."


def add_api(
    bench: Workbench,
    job: dict,
    new_folder: Callable[[], AbstractContextManager[Path]],
    failures_in_one_line: Callable[[Callable], Callable],
) -> None:
    """Add `/protect` and `/propose_masks` to the page that is being built.

    Args:
        bench: with the generator and the limits.
        job: the queue that they share with the page's own events.
        new_folder: makes a folder for results, which goes if they fail.
        failures_in_one_line: wraps what answers a request.
    """

    @failures_in_one_line
    def protect(
        image: Upload | None,
        mask: Upload | None = None,
        boxes: list | None = None,
        points: list | None = None,
        whole_image: bool = False,
        epsilon: float | None = None,
        epsilon_background: float | None = None,
        keep_exif: bool = False,
    ):
        photo = bench.open(*_given(image))
        for name, values in (("boxes", boxes), ("points", points)):
            if values is not None and (not isinstance(values, list) or len(values) > bench.limits.marks):
                raise ValueError(f"{name}: pass a list of at most {bench.limits.marks}")
        if points is not None and not all(isinstance(point, list) and len(point) in (2, 3) for point in points):
            raise ValueError("points: pass [x, y], or [x, y, 0] for a point that is not on the object")
        prompt = Prompt(
            mask=None if mask is None else bench.read_mask(mask.path, mask.name, photo),
            boxes=boxes or None,
            points=[point[:2] for point in points] if points else None,
            point_labels=[point[2] if len(point) == 3 else 1 for point in points] if points else None,
            whole_image=whole_image,
        )
        protected = bench.protect(photo, prompt, epsilon, epsilon_background, keep_exif)
        stem = file_stem(photo.name)
        with new_folder() as folder:
            target, region = (folder / f"{stem}_{name}.png" for name in ("protected", "mask"))
            image_files.write(protected.picture, target)
            Image.fromarray(protected.region).save(region)
        return str(target), str(region), protected.report

    @failures_in_one_line
    def propose_masks(image: Upload | None):
        photo = bench.open(*_given(image))
        paths = []
        with new_folder() as folder:
            for number, mask in enumerate(bench.propose_masks(photo), 1):
                paths.append(folder / f"{file_stem(photo.name)}_mask_{number}.png")
                Image.fromarray(mask).save(paths[-1])
        return [str(path) for path in paths]

    public = job | {"api_visibility": "public"}
    with gr.Column(visible=False):
        image = PhotoUpload(type="filepath", image_mode=None, label="image: the photo")
        mask = FileUpload(label="mask: image file of the photo's size, 0 is outside; or null")
        boxes = gr.JSON(label="boxes: [[left, top, right, bottom], ...] in pixels of the upright photo; or null")
        points = gr.JSON(label="points on one object: [[x, y], [x, y, 0 if not on it], ...]; or null")
        whole_image = gr.Checkbox(False, label="whole_image: noise all over, which hardly protects")
        epsilon = gr.Number(
            None, label=f"epsilon: largest change in the mask, of 255; null is the model's, {bench.epsilon:g}"
        )
        background = gr.Number(
            None, label="epsilon_background: largest change elsewhere; null is as much smaller as the model's"
        )
        keep_exif = gr.Checkbox(False, label="keep_exif: leave camera, date and place in the file")
        outputs = [
            gr.File(label="protected PNG"),
            gr.File(label="mask PNG"),
            gr.JSON(label="report"),
        ]
        masks = gr.File(label="mask PNGs", file_count="multiple")
        gr.Button().click(
            protect,
            [image, mask, boxes, points, whole_image, epsilon, background, keep_exif],
            outputs,
            api_name="protect",
            api_description=PROTECT,
            **public,
        )
        gr.Button().click(propose_masks, [image], [masks], api_name="propose_masks", api_description=PROPOSE, **public)


def _given(image: Upload | None) -> Upload:
    if image is None:
        raise ValueError("image is missing: upload one")
    return image
