"""Random prompts for training: boxes, points and noisy masks (UnSeg, section 3; HQ-SAM's training)."""

import torch
import torch.nn.functional as F

from unseg_hf.evaluation.victims.base import boxes_of

PROMPT_KINDS = ("box", "points", "mask")
POINTS_PER_MASK = 10


def choose_kinds(kinds: tuple[str, ...], several: bool, generator: torch.Generator) -> tuple[str, ...]:
    """A random non-empty subset of `kinds`, or one of them."""
    if not several:
        return (kinds[_randint(len(kinds), generator)],)
    chosen = _randint(2 ** len(kinds) - 1, generator) + 1
    return tuple(kind for bit, kind in enumerate(kinds) if chosen >> bit & 1)


def make_prompts(
    masks: torch.Tensor, kinds: tuple[str, ...], generator: torch.Generator, points: int = POINTS_PER_MASK
) -> dict[str, torch.Tensor]:
    """Prompts of the given kinds for one mask an image, as keyword arguments of `UnSegModel.forward`.

    Args:
        masks: `(batch, size, size)`, 0 or 1, none empty.
        kinds: from `PROMPT_KINDS`.
        generator: the source of randomness, on the CPU.
        points: points a mask.

    Returns:
        `input_boxes` `(batch, 1, 4)`, `input_points` `(batch, 1, points, 2)` with `input_labels`, and `input_masks`
        `(batch, 1, size / 4, size / 4)` in [0, 1], those that were asked for.
    """
    prompts = {}
    if "box" in kinds:
        prompts["input_boxes"] = boxes_around(masks).unsqueeze(1)
    if "points" in kinds:
        prompts["input_points"] = points_in(masks, points, generator).unsqueeze(1)
        prompts["input_labels"] = torch.ones(len(masks), 1, points, dtype=torch.int64, device=masks.device)
    if "mask" in kinds:
        prompts["input_masks"] = noisy_masks(masks, generator).unsqueeze(1)
    return prompts


def boxes_around(masks: torch.Tensor) -> torch.Tensor:
    """`(batch, height, width)` masks to `(batch, 4)` boxes (x0, y0, x1, y1) in pixels; x1, y1 are inside the mask."""
    return boxes_of(masks > 0.5) - masks.new_tensor([0, 0, 1, 1])


def points_in(masks: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """`(batch, count, 2)` (x, y) pixels drawn from each of the `(batch, height, width)` masks, with replacement."""
    chosen = torch.multinomial(masks.flatten(1).cpu(), count, replacement=True, generator=generator)
    width = masks.shape[-1]
    return torch.stack([chosen % width, chosen // width], dim=-1).float().to(masks.device)


def noisy_masks(masks: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Masks at a quarter of the size, with Gaussian noise on a band around their boundary.

    Args:
        masks: `(batch, size, size)`, 0 or 1.
        generator: the source of randomness, on the CPU.

    Returns:
        `(batch, size / 4, size / 4)` in [0, 1].
    """
    small = F.avg_pool2d(masks.unsqueeze(1), 4)
    thick = F.max_pool2d(small, 5, 1, 2)
    thin = -F.max_pool2d(-small, 5, 1, 2)
    noise = torch.randn(small.shape, generator=generator).to(small.device)
    return torch.where(thick > thin, (small + noise).clamp(0, 1), small).squeeze(1)


def _randint(high: int, generator: torch.Generator) -> int:
    return int(torch.randint(high, (), generator=generator))
