"""The demo as a Hugging Face Space; `unseg demo` starts the same page on your own machine.

The variable UNSEG_MODEL names another generator, by folder or Hub id; without it the one in the package is used.
"""

import contextlib
import os
from pathlib import Path

# Before torch, where there is one: it prepares torch for GPUs that a Space has for moments only.
with contextlib.suppress(ImportError):
    import spaces  # noqa: F401

from unseg_hf.demo.serving import launch_options, page_for

demo = page_for(os.environ.get("UNSEG_MODEL") or None, examples=Path(__file__).parent / "examples")

if __name__ == "__main__":
    demo.launch(**launch_options())
