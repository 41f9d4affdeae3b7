"""The model card of the loaded generator, as the demo shows it: its measured results and its limits."""

from __future__ import annotations

import re
from pathlib import Path

SHOWN = ("Does it work?", "Limits")
"""Headings of the sections that are shown, where a card has them."""

NO_CARD = "This generator has no model card: nothing is known of what it does. Measure it with `unseg audit`."


def read_card(checkpoint: str | Path) -> str:
    """The text of a checkpoint's card, from its folder or the Hub, or "" where there is none."""
    folder = Path(checkpoint)
    if folder.is_dir():
        file = folder / "README.md"
        return file.read_text(encoding="utf-8") if file.is_file() else ""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(checkpoint), "README.md")).read_text(encoding="utf-8")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        # Somebody's model without a card, or a cache that holds the weights alone: the demo works without it.
        return ""


def results(card: str) -> str:
    """The sections of a card that say what was measured, in Markdown; all of the card where it has no such sections.

    Commands are left out, with the sentence that announces them: they are for who trains generators.
    """
    body = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL).strip()
    if not body:
        return NO_CARD
    sections = re.split(r"^(?=## )", body, flags=re.MULTILINE)
    wanted = [s for heading in SHOWN for s in sections if s.startswith(f"## {heading}\n")]
    text = "\n\n".join(section.strip() for section in wanted) or body
    return re.sub(r"(\s*\bThe commands?\b[^.:]*:)?\n+```.*?```\n?", "\n", text, flags=re.DOTALL).strip()
