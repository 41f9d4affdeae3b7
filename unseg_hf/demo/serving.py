"""Starting the demo: on a Hugging Face Space from its environment, or by `unseg demo`."""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unseg_hf.worker_processes import when_asked_to_end

if TYPE_CHECKING:
    from unseg_hf.demo.session import Limits

CSS = """
.gradio-container {width: 100% !important; max-width: 1240px !important; margin: 0 auto !important}
#hint p, #state p {margin: 0; font-size: var(--text-md)}
#report table {width: 100%}
#view img {max-height: 80vh}
#card table, #batch-table table {display: block; overflow-x: auto}
#card th, #card td, #batch-table th, #batch-table td {overflow-wrap: normal; word-break: normal; padding: 6px}
#batch-table td:first-child {overflow-wrap: anywhere; min-width: 8em}
"""

LAYER_BYTES = 8 * 2**20
"""Of what a page sends of a drawing."""
OTHER_BYTES = 2**20
"""Of what is posted besides files and drawings."""
SHUT = re.compile(
    r"/(file/|proxy=|process_recording|deep_link|stream/|(undo-)?vibe-|run-history|monitoring|profiling)"
)
"""Routes of Gradio that neither the page nor its API needs."""


def add_demo(commands: Any) -> argparse.ArgumentParser:
    """Add the command to argparse's sub-parsers; its parser still lacks --model and --device."""
    parser = commands.add_parser(
        "demo",
        help="a web page to try it with your photos",
        description="Start the demo page on this machine. It stays here: nothing is sent anywhere.",
    )
    parser.set_defaults(run=run_demo)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=_port, metavar="N", help="default: the first free one from 7860")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    return parser


def run_demo(options: argparse.Namespace) -> int:
    """Run the command; the exit status."""
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError("the demo needs gradio: pip install 'unseg-hf[demo]'") from error
    model = options.model or os.environ.get("UNSEG_MODEL") or None
    with _folder_that_goes():
        page = page_for(model, options.device, examples=checkout_examples())
        place = {"server_name": options.host, "server_port": options.port}
        try:
            page.launch(**launch_options(), **place, inbrowser=options.open)
        except OSError as error:
            where = options.host if options.port is None else f"{options.host}:{options.port}"
            raise ValueError(f"cannot listen at {where}: choose another --port or --host") from error
    return 0


def _port(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is no port: give a number from 0 to {2**16 - 1}")
    return int(text)


@contextlib.contextmanager
def _folder_that_goes() -> Iterator[None]:
    """Makes Gradio keep its files in a folder that is deleted at the end, however it is asked to stop."""
    place = os.environ.get("GRADIO_TEMP_DIR")
    _sweep(Path(place or tempfile.gettempdir()))
    # What stops services, and otherwise ends Python without any clean-up.
    with (
        when_asked_to_end(lambda number, _: sys.exit(128 + number)),
        tempfile.TemporaryDirectory(prefix=f"{_own_folder()}{os.getpid()}-", dir=place) as folder,
    ):
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if place is not None:
                os.environ["GRADIO_TEMP_DIR"] = place


def _own_folder() -> str:
    """How the folders of demos on this machine begin; the number of the process follows."""
    return f"unseg-demo-{re.sub('[^A-Za-z0-9]', '_', platform.node())}-"


def _sweep(place: Path) -> None:
    """Remove the photos that demos left which were killed, or lost their machine."""
    import psutil

    for folder in place.glob(f"{glob.escape(_own_folder())}*"):
        number = folder.name.removeprefix(_own_folder()).partition("-")[0]
        with contextlib.suppress(OSError):  # one of another user
            if number.isdecimal() and not psutil.pid_exists(int(number)) and not folder.is_symlink():
                shutil.rmtree(folder)


def checkout_examples() -> Path | None:
    """The example photos, where the package runs from a checkout of its repository."""
    folder = Path(__file__).parents[2] / "spaces_demo" / "examples"
    return folder if folder.is_dir() else None


def page_for(model: str | None, device: str | None = None, examples: Path | None = None, limits: Limits | None = None):
    """The page around a generator.

    Args:
        model: folder or Hub id; None is the embedded one.
        device: where it runs; None is a GPU where there is one.
        examples: folder of example photos.
        limits: of the server.

    Raises:
        ValueError: a generator that does not load.
    """
    on_accelerator = _accelerator()

    import torch

    from unseg_hf.demo.page import build
    from unseg_hf.demo.session import Limits, Workbench
    from unseg_hf.protect_command import load_protector

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return build(Workbench(load_protector(model, device), limits or Limits(), model, on_accelerator), examples)


def launch_options(limits: Limits | None = None) -> dict[str, Any]:
    """What `launch` needs for a public server."""
    import gradio as gr
    from starlette.middleware import Middleware

    from unseg_hf.demo.session import Limits

    limits = limits or Limits()
    # Fonts that every machine has: the page must not ask another server for its own.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    # Gradio's grey is too faint to read on white.
    theme = theme.set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
    theme = theme.set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300")
    # And white on its orange.
    for mode in ("", "_dark"):
        theme = theme.set(**{f"button_primary_background_fill{mode}": "*primary_700"})
        theme = theme.set(**{f"button_primary_background_fill_hover{mode}": "*primary_800"})
    return {
        "theme": theme,
        "css": CSS,
        # Not that of one file: of several the page would then take none, and say less.
        "max_file_size": limits.batch_bytes,
        "state_session_capacity": limits.visitors,
        "allowed_paths": [],
        "show_error": False,
        "enable_monitoring": False,
        "run_history": False,
        "ssr_mode": False,
        "app_kwargs": {"middleware": [Middleware(_Gate, limits=limits)]},
        "share": False,  # in some notebooks Gradio would open a tunnel by itself
        "footer_links": ["api", "settings"],
    }


class _Gate:
    """Lets in what the page and its API ask for: of Gradio's other routes some write files that stay, start programs
    or fetch links, and what is posted is held in memory before anything of this package sees it.

    Args:
        app: what is behind it.
        limits: of the server.
    """

    def __init__(self, app: Callable, limits: Limits):
        self.app = app
        # Larger than a batch: that one is too large is said best by the page.
        self._most = {"/upload": 2 * limits.batch_bytes, "/component_server": LAYER_BYTES + OTHER_BYTES}

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        from starlette.responses import PlainTextResponse

        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].lower().rstrip("/")
        route, _, file = path.partition("/file=")  # which may be called anything
        if SHUT.search(f"{route}/") or file.startswith("http"):
            return await PlainTextResponse("not available here", 403)(scope, receive, send)
        most = next((most for end, most in self._most.items() if path.endswith(end)), OTHER_BYTES)
        got, begun = 0, False

        async def counted() -> dict:
            nonlocal got
            message = await receive()
            got += len(message.get("body", b""))
            if got > most:
                raise _TooLargeError
            return message

        async def noted(message: dict) -> None:
            nonlocal begun
            if got > most and not begun:
                raise _TooLargeError  # in place of what somebody made of the one above
            begun = True
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except _TooLargeError:
            if not begun:
                await PlainTextResponse(f"at most {most} bytes are accepted here", 413)(scope, receive, send)


class _TooLargeError(Exception):
    """More was sent than `_Gate` lets in."""


def _accelerator() -> Callable[[Callable], Callable]:
    """`spaces.GPU` on a Space that shares GPUs (ZeroGPU); elsewhere functions stay as they are."""
    try:
        import spaces
    except ImportError:
        return lambda function: function
    # A folder of that name is a package, too.
    return getattr(spaces, "GPU", lambda function: function)
