"""What a surrogate makes of held-out images, clean and protected, in figures and in pictures."""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..data.interactive import InteractiveSegmentation
from ..evaluation.victims.base import ious_of, normalise
from ..inspection import captioned
from .prompts import PROMPT_KINDS, make_prompts

PICTURES = 4
"""Images in the sheet of pictures."""


@torch.no_grad()
def validate(
    protect, surrogates, data: InteractiveSegmentation, batch_size: int, kinds: list[str], device: torch.device
) -> tuple[dict[str, float], Image.Image]:
    """Surrogates on held-out images: a gap between clean and protected ones says that they read the noise.

    Args:
        protect: `protect(batch, kinds, random)` gives protected images `(batch, 3, size, size)` in [0, 1].
        surrogates: `surrogates(images, prompts)` gives a list of logits `(batch, h, w)`, one for each.
        data: the held-out images; the samples of their first epoch are used, the same ones at every call.
        batch_size: images at once.
        kinds: of prompts; the generator gets a mask where there is a choice, the surrogates points.
        device: of the networks.

    Returns:
        `surrogate_iou_clean` and `surrogate_iou_protected` (with several surrogates `surrogate_0_iou_clean` and so
        on): the mean IoU over the images, in [0, 1]; and a sheet of the first images: image, protected, noise, and the
        masks that each surrogate finds on the image and on its protected version.
    """
    training = surrogates.training
    surrogates.eval()
    generator_kind = max(kinds, key=PROMPT_KINDS.index)
    surrogate_kind = next(kind for kind in ("points", "box", "mask") if kind in kinds)
    ious: dict[tuple[int, str], list[float]] = {}
    rows = []
    random = torch.Generator().manual_seed(0)
    draws = [draw for (draw,) in data.batches(0, batch_size=1)]
    for start in range(0, len(draws), batch_size):
        batch = torch.utils.data.default_collate(data.__getitems__(draws[start : start + batch_size]))
        batch = {name: value.to(device) for name, value in batch.items() if name != "name"}
        protected = protect(batch, (generator_kind,), random)
        prompts = make_prompts(batch["mask"], (surrogate_kind,), random)
        found = {}
        for state, images in (("clean", batch["image"]), ("protected", protected)):
            for index, logits in enumerate(surrogates(normalise(images), prompts)):
                logits = F.interpolate(logits[:, None].float(), batch["mask"].shape[-2:], mode="bilinear")[:, 0]
                found[index, state] = logits > 0
                ious.setdefault((index, state), []).extend(ious_of(logits > 0, batch["mask"] > 0.5).tolist())
        if len(rows) < PICTURES:
            noise = protected - batch["image"]
            largest = noise.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-6)
            panels = [batch["image"], protected, 0.5 + 0.5 * noise / largest, _grey(batch["mask"])]
            panels += [_grey(masks.float()) for masks in found.values()]
            titles = ["image", "protected", "noise, amplified", "mask"]
            titles += [f"surrogate {index}, {state}" for index, state in found]
            rows += list(torch.stack(panels, dim=1))[: PICTURES - len(rows)]
    surrogates.train(training)
    several = max(index for index, _ in ious) > 0
    figures = {
        f"surrogate{f'_{index}' if several else ''}_iou_{state}": float(np.mean(values))
        for (index, state), values in ious.items()
    }
    return figures, _sheet(rows, titles)


def _grey(masks: torch.Tensor) -> torch.Tensor:
    return masks.unsqueeze(1).expand(-1, 3, -1, -1)


def _sheet(rows: list[torch.Tensor], titles: list[str]) -> Image.Image:
    """Rows of panels `(panels, 3, size, size)` in [0, 1], with a caption over each column."""
    pixels = [(panels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy() for panels in rows]
    pictures = [[Image.fromarray(panel) for panel in panels] for panels in pixels]
    return captioned(pictures, titles, gap=4, caption=16, font_size=11)
