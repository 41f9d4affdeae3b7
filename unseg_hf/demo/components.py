"""Gradio's upload components, made fit for a public server: bytes as they came, from the upload folder alone.

Gradio's own decode images before the page's code sees them, fetch what a client gives as a link, and leave a file in
the temporary folder for each upload.
"""

from __future__ import annotations

import re
from pathlib import Path
from threading import Lock
from typing import Any, ClassVar, NamedTuple

import gradio as gr
import numpy as np
from fastapi import HTTPException
from gradio.components.base import server
from gradio.data_classes import FileData, ListFiles
from gradio.utils import get_upload_folder

from unseg_hf.demo.serving import LAYER_BYTES
from unseg_hf.demo.session import VIEW_SIDE, file_stem
from unseg_hf.image_files import read

KEPT_BYTES = 64 * 2**20
"""Of layers that were sent by pages and not yet asked for; the oldest go first."""
ID_LENGTH = 64


class Upload(NamedTuple):
    """A file in the upload folder; the name that its user knows, made harmless; and that name itself."""

    path: Path
    name: str
    original: str


class _NoLinks:
    """Refuses links, which the server would fetch without any limit of size, and says so in the API's description."""

    def api_info_as_input(self) -> dict[str, Any]:
        return super().api_info_as_input() | {"additional_description": "a local file"}

    def move_resource_to_block_cache(self, url_or_file_path: Any) -> str | None:
        _refuse_link(url_or_file_path)
        return super().move_resource_to_block_cache(url_or_file_path)

    async def async_move_resource_to_block_cache(self, url_or_file_path: Any) -> str | None:
        _refuse_link(url_or_file_path)
        return await super().async_move_resource_to_block_cache(url_or_file_path)


class _LocalFile(_NoLinks):
    """Names a local file in the snippets of the page's "Use via API"; Gradio's own examples are links."""

    example = "photo.jpg"

    def example_payload(self) -> dict[str, Any]:
        # The page turns into `handle_file` what has a "url".
        return {"path": self.example, "url": self.example, "meta": {"_type": "gradio.FileData"}}

    def example_value(self) -> str:
        return self.example


def _refuse_link(path: Any) -> None:
    if str(path).startswith(("http://", "https://")):
        raise gr.Error("links are not fetched here: upload the file itself", print_exception=False)


def _uploaded(path: str | None) -> Path:
    """The path of an upload; an error for any other file of the server."""
    # Gradio's own check passes over an image whose description lacks the "meta" that marks uploads.
    if not path or not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise gr.Error("upload the image as a file", print_exception=False)
    return Path(path)


def _upload(file: FileData | Any) -> Upload:
    path = _uploaded(file.path)
    name = file.orig_name or path.name
    original = "".join(c for c in re.split(r"[\\/]", name)[-1] if c.isprintable())
    return Upload(path, file_stem(name) + re.sub(r"[^.\w]", "", Path(name).suffix)[:8], original)


class PhotoUpload(_LocalFile, gr.Image):
    """An image that is uploaded, pasted or dropped; gives an [`Upload`]."""

    def get_block_name(self) -> str:
        return "image"

    def preprocess(self, payload: Any) -> Upload | None:
        return None if payload is None else _upload(payload)


class FileUpload(_LocalFile, gr.File):
    """One or several files; gives an [`Upload`], or a list of them."""

    example = "mask.png"

    def get_block_name(self) -> str:
        return "file"

    def preprocess(self, payload: FileData | ListFiles | None) -> Upload | list[Upload] | None:
        if payload is None:
            return [] if self.file_count == "multiple" else None
        files = payload.root if isinstance(payload, ListFiles) else [payload]
        return [_upload(file) for file in files] if self.file_count == "multiple" else _upload(files[0])


class Epsilon(gr.Slider):
    """A slider whose number may be typed: what is out of its range, which the page mends later, becomes its end."""

    def get_block_name(self) -> str:
        return "slider"

    def preprocess(self, payload: float | None) -> float:
        return min(max(self.minimum if payload is None else payload, self.minimum), self.maximum)


class BrushedMask(_NoLinks, gr.ImageEditor):
    """A picture to brush on; gives the brushed part as `(height, width)` bool, or None where nothing was brushed."""

    # Of the class: Gradio makes a component anew for each visitor, and the limit is of the server.
    _layers: ClassVar[dict[str, bytes]] = {}
    _lock: ClassVar[Any] = Lock()

    def get_block_name(self) -> str:
        return "imageeditor"

    def preprocess(self, payload: Any) -> np.ndarray | None:
        if payload is None:
            return None
        if payload.id is not None:
            with self._lock:
                layers = [self._layers.pop(payload.id, None)]
        else:
            layers = payload.layers
        drawn = None
        for layer in layers:
            if layer is None:
                continue
            # The canvas may be a pixel larger than the view, and never much.
            picture = read(layer if isinstance(layer, bytes) else _uploaded(layer.path), max_pixels=4 * VIEW_SIDE**2)
            if picture.alpha is None:
                continue
            one = picture.alpha > 0
            drawn = one if drawn is None or drawn.shape != one.shape else drawn | one
        return drawn if drawn is not None and drawn.any() else None

    @server
    def accept_blobs(self, data: Any) -> None:
        """Keep the layer that a page sends before it asks for it by its id; HTTPException for anything else."""
        sent, files = getattr(data, "data", None), getattr(data, "files", None)
        if not isinstance(sent, dict) or not files:
            raise HTTPException(400, "send a layer as a form with a file")
        # The page sends these too, and waits for the answer; nothing here looks at them.
        if sent.get("type") in ("background", "composite"):
            return
        name, layer = sent.get("id"), files[0][1]
        if sent.get("type") != "layer" or sent.get("index") != "0" or not isinstance(name, str):
            raise HTTPException(400, "a drawing has one layer, 0, and an id")
        if len(layer) > LAYER_BYTES or len(name) > ID_LENGTH:
            raise HTTPException(413, "this drawing is too large")
        with self._lock:
            self._layers[name] = layer
            # A small layer costs something too: its id, and its place.
            while sum(len(kept) + 1024 for kept in self._layers.values()) > KEPT_BYTES:
                self._layers.pop(next(iter(self._layers)))
