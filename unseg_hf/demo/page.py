"""The demo's web page and its API: what a browser or `gradio_client` sends and gets."""

from __future__ import annotations

import html
import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder
from PIL import Image

from unseg_hf import image_files
from unseg_hf.demo import texts
from unseg_hf.demo.api import add_api
from unseg_hf.demo.batch import protect_to_zip
from unseg_hf.demo.card import read_card, results
from unseg_hf.demo.components import BrushedMask, Epsilon, FileUpload, PhotoUpload, Upload
from unseg_hf.demo.pictures import WEB_TREATMENTS, marked, web_treatments
from unseg_hf.demo.session import Marks, Photo, Workbench, file_stem, percent, report_rows
from unseg_hf.demo.sessions import Session, Sessions
from unseg_hf.image_files import one_line
from unseg_hf.inputs import Prompt
from unseg_hf.inspection import amplified_noise
from unseg_hf.protect_command import STRENGTHS
from unseg_hf.protection import Protected

PRESETS = {f"{name} ({epsilon:g})": epsilon for name, epsilon in STRENGTHS.items()}
QUIET = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of events that answer at once."""
GALLERY_SIDE = 480
"""Longest side of the pictures that show what was protected in several photos, in pixels."""
NOT_NOW = '{"__type__": "update", "interactive": false}'
TO_RESULT = """() => {
    const until = Date.now() + 10000;
    const look = () => {
        const picture = document.querySelector("#slider img");
        if (picture && picture.getBoundingClientRect().height > 20)
            picture.scrollIntoView({behavior: "smooth", block: "nearest"});
        else if (Date.now() < until) setTimeout(look, 100);
    };
    look();
}"""
"""Scrolls to the result as soon as it is there to be seen."""

logger = logging.getLogger(__name__)


def failures_in_one_line(function: Callable) -> Callable:
    """What a user can mend reaches them as one line; anything else is logged, and they learn no more than that."""

    @wraps(function)
    def safe(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except gr.Error:
            raise
        except ValueError as error:
            raise gr.Error(one_line(error), print_exception=False) from None
        except Exception:
            logger.exception("%s failed", function.__name__)
            message = "this did not work, and the server's log says why; try another photo"
            raise gr.Error(message, print_exception=False) from None

    return safe


@contextmanager
def new_folder() -> Iterator[Path]:
    """Where results may be written: in Gradio's folder, under a name that nobody can guess; it goes if that fails.

    Gradio deletes what it has shown after a while, and never what it has not seen.
    """
    folder = Path(get_upload_folder()) / uuid.uuid4().hex
    folder.mkdir(parents=True)
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def copied(path: Path) -> str:
    """A copy of an example photo, which Gradio may show wherever the photo lies."""
    with new_folder() as folder:
        return str(shutil.copy(path, folder / path.name))


def build(bench: Workbench, examples: Path | None = None) -> gr.Blocks:
    """The page.

    Args:
        bench: with the generator and the limits.
        examples: folder of example photos; masks in it (`*_mask.png`) are left out.
    """
    limits = bench.limits
    # One job at a time of all that run the model: two would take each other's cores, and twice the memory.
    job = {"concurrency_id": "generator", "concurrency_limit": 1, "api_visibility": "private"}
    with gr.Blocks(
        title="unseg: protect a photo",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(max(1, limits.kept_seconds // 6), limits.kept_seconds),
    ) as page:
        gr.Markdown(texts.HEAD.format(minutes=max(1, limits.kept_seconds // 60)))
        with gr.Tab("One photo"):
            _one_photo(bench, examples, job)
        with gr.Tab("Several photos"):
            _several_photos(bench, job)
        with gr.Tab("About"):
            name = bench.checkpoint or "unseg-tiny, which comes with the package"
            gr.Markdown(texts.ABOUT.format(name=name))
            gr.Markdown(results(read_card(bench.card)), elem_id="card")
        add_api(bench, job, new_folder, failures_in_one_line)
    # Whoever posts to the API's routes would otherwise pass the queue, and its limits, by.
    page.queue(max_size=limits.waiting, default_concurrency_limit=1, api_open=False)
    return page


def _strength(bench: Workbench) -> gr.Slider:
    presets = gr.Radio(list(PRESETS), label="Strength", value=_preset(bench.epsilon), elem_classes="choices")
    epsilon = Epsilon(1, 32, value=bench.epsilon, step=0.5, label="Epsilon, exactly", info=texts.EPSILON)
    # In the browser: whoever presses Protect at once means the strength that they have just chosen.
    presets.input(None, presets, epsilon, js=f"preset => ({json.dumps(PRESETS)})[preset]", **QUIET)
    epsilon.change(_preset, epsilon, presets, **QUIET)
    return epsilon


def _preset(epsilon: float) -> str | None:
    return next((name for name, value in PRESETS.items() if value == epsilon), None)


def _one_photo(bench: Workbench, examples: Path | None, job: dict) -> None:
    limits = bench.limits
    sessions = Sessions(limits.sessions, limits.kept_seconds)
    # The id alone: Gradio keeps the states of far more visitors than photos have room.
    session = gr.State(None, time_to_live=limits.kept_seconds, delete_callback=sessions.drop)
    with gr.Row():
        with gr.Column(min_width=320):
            upload = PhotoUpload(
                type="filepath",
                sources=["upload", "clipboard"],
                image_mode=None,
                height=220,
                label="1. Your photo",
                placeholder=texts.UPLOAD.format(mb=limits.file_bytes // 2**20, megapixels=limits.pixels // 10**6),
                buttons=[],
                alt_text="Your photo",
                elem_id="upload",
            )
            refused = gr.HTML(visible=False, elem_id="refused")
            photos = sorted(p for p in (examples or Path("/nonexistent")).glob("*.png") if "_mask" not in p.stem)
            if photos:
                # Else Gradio copies the icons, and deletes the copies like old results.
                gr.set_static_paths([examples])
            # Not gr.Examples: its pictures have no name for screen readers.
            chosen = [(path, gr.Button(f"Or try: {path.stem}", icon=str(path), size="sm")) for path in photos]
            with gr.Column(visible=False) as marking:
                first = "objects" if bench.finds_objects else "boxes"
                way = gr.Radio(
                    [(texts.WAYS[name], name) for name in texts.WAYS],
                    value=first,
                    label="2. What to protect",
                    elem_classes="choices",
                )
                hint = gr.HTML(_status(texts.HINTS[first]), elem_id="hint")
                label = gr.Radio(
                    [("on the object", 1), ("not on it", 0)], value=1, label="My clicks are", visible=False
                )
                view = gr.Image(
                    type="pil",
                    format="jpeg",
                    interactive=False,
                    label="Click here",
                    alt_text="Your photo with what will be protected coloured",
                    buttons=["fullscreen"],
                    elem_id="view",
                )
                brush = BrushedMask(
                    type="pil",
                    format="png",
                    sources=[],
                    transforms=[],
                    layers=False,
                    brush=gr.Brush(colors=[("#0090f0", 0.7)], default_size=24, color_mode="fixed"),
                    label="Brush over the object",
                    visible=False,
                    elem_id="brush",
                )
                mask_file = FileUpload(
                    label="or a mask file of the photo's size (0 is outside)", height=150, visible=False
                )
                with gr.Row():
                    undo = gr.Button("Undo", size="sm")
                    clear = gr.Button("Clear", size="sm")
                with gr.Accordion("Type coordinates instead of clicking", open=False) as typing:
                    typed = gr.Textbox(label="Pixels of the photo", info=texts.TYPED, submit_btn="Add", max_lines=1)
        with gr.Column(min_width=320):
            with gr.Group():
                epsilon = _strength(bench)
                keep_exif = gr.Checkbox(False, label="Keep EXIF", info=texts.EXIF)
            protect = gr.Button("3. Protect", variant="primary", interactive=False, elem_id="protect")
            state = gr.HTML(_status(""), elem_id="state")
            forgotten, made = gr.Timer(limits.kept_seconds, active=False), gr.State(None)
            with gr.Column(visible=False, elem_id="result") as result:
                gr.HTML(_status(texts.DONE))
                slider = gr.ImageSlider(
                    type="pil",
                    format="png",
                    interactive=False,
                    label="Original (left) and protected (right)",
                    buttons=["fullscreen"],
                    elem_id="slider",
                )
                download = gr.DownloadButton("Download the protected PNG", variant="primary", elem_id="download")
                mask_download = gr.DownloadButton("Download the mask", size="sm", elem_id="mask-download")
                report = gr.Markdown(elem_id="report")
                with gr.Accordion("The noise, amplified", open=False):
                    noise = gr.Image(
                        type="pil",
                        format="png",
                        interactive=False,
                        show_label=False,
                        alt_text="The noise alone, amplified, around grey",
                        buttons=["download", "fullscreen"],
                    )
                with gr.Accordion("What a web site would do", open=True):
                    gr.Markdown(texts.WEB)
                    with gr.Row():
                        web = [_web_image(title) for title in WEB_TREATMENTS.values()]
                with gr.Accordion("The same on the command line", open=False):
                    command = gr.Code(
                        language="shell",
                        interactive=False,
                        label="unseg protect",
                        wrap_lines=True,
                        lines=1,
                        max_lines=4,
                    )
                    gr.Markdown(texts.COMMAND)

    shown = [session, view, brush, hint, label, mask_file, typing, undo, clear, result]
    as_it_is = [gr.skip()] * len(shown)
    results_of = [result, slider, download, mask_download, report, command, state, protect, forgotten, made]
    results_of += [noise, *web]

    def needed(key: str | None) -> Session:
        current = sessions.find(key)
        if current is None:
            raise ValueError(
                "no photo here, or it was forgotten after a while: remove what is there with its cross, and upload it"
            )
        return current

    def refreshed(key: str, current: Session, view_only: bool = False) -> list[Any]:
        """Values for `shown`: the masks found anew for the marks, and the session kept with them."""
        photo, marks = current.photo, current.marks
        prompt = marks.prompt()
        masks, notes = bench.find_masks(photo, prompt) if prompt is not None else ([], [])
        brushing = marks.way == "brush" and marks.drawn is None
        text = texts.found(marks, masks, notes)
        picture = marked(photo, marks, masks)
        sessions.replace(key, current)
        return [
            key,
            gr.update(value=picture, visible=not brushing, label=texts.VIEW_LABELS[marks.way]),
            gr.skip() if view_only else gr.update(visible=brushing, value=None),
            _status(text),
            # The first click is on the object.
            gr.update(visible=marks.way == "points", **({} if marks.points else {"value": 1})),
            gr.skip() if view_only else gr.update(visible=marks.way == "brush"),
            gr.update(visible=marks.way in ("points", "boxes")),
            gr.update(visible=marks.way in ("points", "boxes")),
            gr.update(visible=marks.way in ("points", "boxes", "brush")),
            gr.update(visible=False),
        ]

    def remarked(key: str, current: Session, marks: Marks) -> list[Any]:
        """Values for `shown`; a result stays where no mark was changed."""
        if marks == current.marks:
            return as_it_is
        if max(len(marks.points), len(marks.boxes)) > limits.marks:
            raise ValueError(f"at most {limits.marks} points or boxes on a photo")
        return refreshed(key, replace(current, marks=marks), view_only=True)

    def background(key: str | None):
        """The photo to brush on; the editor takes it only once it is on the page."""
        current = sessions.find(key)
        if current is None or current.marks.way != "brush" or current.marks.drawn is not None:
            return gr.skip()
        return {"background": current.photo.view, "layers": [], "composite": None}

    def emptied(key: str | None) -> list[Any]:
        sessions.drop(key)
        hidden = gr.update(visible=False)
        return [None, hidden, gr.update(interactive=False), hidden, None, None]

    @failures_in_one_line
    def open_photo(key: str | None, uploaded: Upload | None, chosen: str):
        # One may have been opened after `emptied`, which comes before the queue.
        sessions.drop(key)
        closed = [gr.update(visible=False), gr.update(interactive=False)]
        nothing = [None] + [gr.skip()] * (len(shown) - 1)
        if uploaded is None:
            return [*closed, gr.skip(), gr.skip(), *nothing]
        try:
            photo = bench.open(*uploaded)
        except ValueError as error:
            # The photo goes, and what was wrong with it stays.
            gr.Warning(one_line(error))
            return [*closed, gr.update(value=_status(one_line(error)), visible=True), None, *nothing]
        ready = [gr.update(visible=True), gr.update(interactive=True), gr.update(visible=False), gr.skip()]
        current = Session(photo, Marks(way=chosen))
        return ready + refreshed(sessions.add(current), current)

    @failures_in_one_line
    def choose_way(key: str | None, chosen: str, brushed: np.ndarray | None):
        current = needed(key)
        marks = _with_strokes(current.photo, current.marks, brushed)
        return refreshed(key, replace(current, marks=replace(marks, way=chosen)))

    @failures_in_one_line
    def click(key: str | None, point_label: int, event: gr.SelectData):
        current = needed(key)
        x, y = current.photo.from_view(*event.index)
        return remarked(key, current, current.marks.clicked(x, y, point_label))

    @failures_in_one_line
    def type_in(key: str | None, text: str, point_label: int):
        current = needed(key)
        marks = texts.typed_marks(text, current.marks, point_label)
        size = current.photo.picture.height, current.photo.picture.width
        if marks.way == "points":
            Prompt(points=[marks.points[-1][:2]]).check_inside(*size)
        elif marks.boxes:
            Prompt(boxes=marks.boxes).check_inside(*size)
        return ["", *remarked(key, current, marks)]

    @failures_in_one_line
    def use_mask_file(key: str | None, uploaded: Upload | None):
        current = needed(key)
        try:
            drawn = None if uploaded is None else bench.read_mask(uploaded.path, uploaded.name, current.photo)
        except ValueError as error:
            # What was brushed, or in a file before, stays.
            gr.Warning(one_line(error))
            values = list(as_it_is)
            values[shown.index(hint)], values[shown.index(mask_file)] = _status(one_line(error)), gr.update(value=None)
            return values
        return refreshed(key, replace(current, marks=replace(current.marks, drawn=drawn)))

    @failures_in_one_line
    def take_back(key: str | None):
        current = needed(key)
        return remarked(key, current, current.marks.undone())

    @failures_in_one_line
    def clear_marks(key: str | None):
        current = needed(key)
        return [None, *refreshed(key, replace(current, marks=current.marks.cleared()))]

    @failures_in_one_line
    def protect_photo(key: str | None, chosen: str, brushed: np.ndarray | None, level: float, exif: bool):
        current = needed(key)
        photo = current.photo
        # What the page shows as chosen: of two choices made at once, the one with strokes may come last.
        marks = _with_strokes(photo, replace(current.marks, way=chosen), brushed)
        prompt = marks.prompt()
        if prompt is None:
            raise ValueError(texts.nothing_marked(marks))
        protected = bench.protect(photo, prompt, level, keep_exif=exif)
        stem = file_stem(photo.name)
        with new_folder() as folder:
            target, before, mask_path = (folder / f"{stem}_{name}.png" for name in ("protected", "original", "mask"))
            image_files.write(protected.picture, target)
            before.write_bytes(image_files.encode(replace(protected.original, exif=None), "png"))
            Image.fromarray(protected.region).save(mask_path)
            figures = protected.report
            if sessions.settings(key) not in ((level, exif), None):
                raise ValueError("a setting was changed meanwhile: press Protect again")
            # Another photo was opened meanwhile: this result would stand beside it.
            if not sessions.replace(key, replace(current, protected=protected)):
                shutil.rmtree(folder)
                return [_status("") if one is state else gr.skip() for one in results_of]
        rows = [*report_rows(protected, figures), ("File", f"PNG, {target.stat().st_size / 2**20:.1f} MB")]
        return [
            gr.update(visible=True),
            (str(before), str(target)),
            str(target),
            str(mask_path),
            texts.report(rows, figures, photo.picture.exif is not None and not exif),
            bench.command(photo, marks, level),
            _status(""),
            gr.update(interactive=True),
            gr.update(value=limits.kept_seconds, active=True),
            time.monotonic(),
            *[None] * (1 + len(web)),
        ]

    @failures_in_one_line
    def look_closer(key: str | None):
        current = sessions.find(key)
        if current is None or current.protected is None:
            return [gr.skip()] * (1 + len(web))
        protected = current.protected
        with new_folder() as folder:
            noise_path = folder / f"{file_stem(current.photo.name)}_noise.png"
            amplified = image_files.from_pil(amplified_noise(protected.original, protected.picture))
            noise_path.write_bytes(image_files.encode(amplified, "png"))
            treated = web_treatments(protected)
        sessions.replace(key, replace(current, protected=None))
        return [
            str(noise_path),
            *(gr.update(value=image, label=texts.web_caption(title, share)) for image, title, share in treated),
        ]

    light = job | {"show_progress": "minimal", "show_progress_on": [view]}
    for path, button in chosen:
        button.click(lambda path=path: copied(path), None, upload, **QUIET)
    fill = {"fn": background, "inputs": session, "outputs": brush} | QUIET
    upload.change(emptied, session, [session, marking, protect, result, mask_file, made], **QUIET).then(
        open_photo,
        [session, upload, way],
        [marking, protect, refused, upload, *shown],
        **job,
        show_progress_on=[upload],
        trigger_mode="always_last",  # of two photos that are chosen one after the other, that is the one
    ).success(**fill)
    way.input(choose_way, [session, way, brush], shown, **light, trigger_mode="always_last").success(**fill)
    # Every click counts, also one that comes while the last one is being answered.
    view.select(click, [session, label], shown, **light, trigger_mode="multiple")
    typed.submit(type_in, [session, typed, label], [typed, *shown], **light)
    mask_file.upload(use_mask_file, [session, mask_file], shown, **light)
    mask_file.clear(use_mask_file, [session, mask_file], shown, **light).success(**fill)
    undo.click(take_back, session, shown, **light, trigger_mode="multiple")
    clear.click(clear_marks, session, [mask_file, *shown], **light).success(**fill)

    def hide_result(key: str | None, level: float, exif: bool):
        sessions.note(key, (level, exif))
        return gr.update(visible=False)

    # A result stands only beside the settings that gave it. Strokes are told of late, and are in what is protected.
    gr.on([epsilon.change, keep_exif.input], hide_result, [session, epsilon, keep_exif], result, **QUIET)
    brush.input(lambda: gr.update(visible=False), None, result, **QUIET)
    # In the browser, at once: what comes of it may have to wait for other visitors.
    protect.click(None, None, [state, protect], js=f"() => [{json.dumps(_status(texts.WORKING))}, {NOT_NOW}]", **QUIET)
    asked = [session, way, brush, epsilon, keep_exif]
    work = protect.click(protect_photo, asked, results_of, **job, show_progress_on=[state])
    work.failure(
        lambda key: (_status(""), gr.update(interactive=sessions.find(key) is not None)),
        session,
        [state, protect],
        **QUIET,
    )
    # On a phone it lies below what can be seen.
    work.success(None, None, None, js=TO_RESULT, **QUIET)
    work.success(look_closer, session, [noise, *web], **job, show_progress_on=web)

    def expire(at: float | None):
        """Where the result that stands there is deleted by now; a later one gets the rest of its time."""
        rest = 0.0 if at is None else at + limits.kept_seconds - time.monotonic()
        if at is None or rest > 1:
            return gr.skip(), gr.skip(), gr.update(value=max(rest, 1), active=at is not None)
        return gr.update(visible=False), _status(texts.EXPIRED), gr.update(active=False)

    forgotten.tick(expire, made, [result, state, forgotten], **QUIET)


def _web_image(title: str) -> gr.Image:
    return gr.Image(
        type="pil",
        format="png",
        interactive=False,
        label=title,
        alt_text=f"A detail of the protected photo after {title}",
        buttons=["fullscreen"],
        min_width=140,
    )


def _several_photos(bench: Workbench, job: dict) -> None:
    limits = bench.limits
    megabytes = {"mb": limits.batch_bytes // 2**20, "file_mb": limits.file_bytes // 2**20}
    gr.Markdown(texts.BATCH.format(photos=limits.photos, **megabytes))
    with gr.Row():
        with gr.Column(min_width=320):
            uploads = FileUpload(
                file_count="multiple", type="filepath", label="Photos", height=220, elem_id="batch-upload"
            )
            what = gr.Radio(
                [(texts.WAYS[name], name) for name in ("objects", "whole")],
                value="objects" if bench.finds_objects else "whole",
                label="What to protect in each",
                elem_classes="choices",
            )
            epsilon = _strength(bench)
            keep_exif = gr.Checkbox(False, label="Keep EXIF", info=texts.EXIF)
            start = gr.Button("Protect all", variant="primary", elem_id="batch-start")
        with gr.Column(min_width=320):
            archive = gr.File(label="Zip of the protected PNG files", interactive=False, elem_id="batch-zip")
            gallery = gr.Gallery(
                label="What was protected, coloured",
                format="jpeg",
                interactive=False,
                visible=False,
                columns=3,
                height="auto",
                object_fit="contain",
                buttons=["fullscreen"],
                elem_id="batch-gallery",
            )
            table = gr.Markdown(elem_id="batch-table")
    made = gr.State(None, time_to_live=limits.kept_seconds)

    @failures_in_one_line
    def protect_all(files: list[Upload], chosen: str, level: float, exif: bool, progress=gr.Progress()):  # noqa: B008
        if not files:
            raise ValueError("no photos yet: upload some first")
        prompt = Prompt(whole_image=True) if chosen == "whole" else Prompt()
        looks: list[tuple[Image.Image, str]] = []

        def look(photo: Photo, protected: Protected) -> None:
            picture = marked(photo, Marks(way=chosen), [protected.region])
            picture.thumbnail((GALLERY_SIDE, GALLERY_SIDE))
            looks.append((picture, f"{photo.name}: {percent(protected.share)}"))

        with new_folder() as folder:
            target = folder / "protected.zip"
            entries = protect_to_zip(
                bench,
                [(file.path, file.original) for file in files],
                target,
                prompt,
                level,
                exif,
                lambda done, count, name: progress((done, count), desc=name, unit="photos"),
                look if chosen == "objects" else lambda photo, protected: None,
            )
        return target, looks, texts.batch_table(entries), (files, chosen, level, exif)

    @failures_in_one_line
    def show_made(zipped: tuple, *settings: Any):
        target, looks, words, asked_for = zipped
        if asked_for != settings:
            shutil.rmtree(target.parent)
            raise ValueError("photos or a setting were changed meanwhile: press Protect all again")
        return str(target) if target.exists() else None, gr.update(value=looks, visible=bool(looks)), words, None

    # A zip stands only beside the photos and settings that gave it.
    settings = [uploads, what, epsilon, keep_exif]
    changed = [uploads.change, what.input, epsilon.change, keep_exif.input]
    gr.on(
        changed, lambda: (None, gr.update(value=None, visible=False), None), None, [archive, gallery, table], **QUIET
    )
    start.click(protect_all, settings, made, **job, show_progress_on=[archive, table]).success(
        # In the queue: elsewhere errors reach nobody.
        show_made,
        [made, *settings],
        [archive, gallery, table, made],
        show_progress="hidden",
        api_visibility="private",
    )


def _with_strokes(photo: Photo, marks: Marks, brushed: np.ndarray | None) -> Marks:
    """The marks, with what is brushed as the mask: the canvas is empty when it is shown again."""
    if marks.way != "brush" or marks.drawn is not None or brushed is None:
        return marks
    return replace(marks, drawn=photo.mask_from_view(brushed))


def _status(text: str) -> str:
    """Read out by screen readers when it changes."""
    return f'<p role="status">{html.escape(text, quote=False)}</p>'
