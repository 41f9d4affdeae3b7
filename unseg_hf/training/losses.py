"""Binary cross-entropy and Dice on uncertain points, as in PointRend and Mask2Former."""

import torch
import torch.nn.functional as F

from ..evaluation.victims.base import dice_loss, ious_of, shrunk


def sample_at(values: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Bilinear samples; beyond the outermost pixel centres the outermost pixels go on.

    Args:
        values: `(n, height, width)`.
        points: `(n, count, 2)` as (x, y) in [0, 1] of the whole extent.

    Returns:
        `(n, count)` float32.
    """
    grid = points.unsqueeze(1) * 2 - 1
    return F.grid_sample(values.unsqueeze(1).float(), grid, padding_mode="border", align_corners=False).flatten(1)


def uncertain_points(
    logits: torch.Tensor, count: int, generator: torch.Generator, oversample: float = 3.0, importance: float = 0.75
) -> torch.Tensor:
    """Points where the prediction is least sure, and some at random (PointRend, section 3.1).

    Args:
        logits: `(n, height, width)`.
        count: points a mask.
        generator: the source of randomness; on the CPU it gives the same numbers everywhere.
        oversample: `oversample * count` candidates are drawn uniformly.
        importance: the share of `count` taken from the candidates with the smallest |logit|; the rest is uniform.

    Returns:
        `(n, count, 2)` as (x, y) in [0, 1].
    """
    n, important = len(logits), int(importance * count)
    candidates = torch.rand(n, int(oversample * count), 2, generator=generator, device=generator.device).to(
        logits.device
    )
    doubt = -sample_at(logits, candidates).abs()
    best = doubt.topk(important, dim=1).indices
    chosen = candidates.gather(1, best.unsqueeze(-1).expand(-1, -1, 2))
    uniform = torch.rand(n, count - important, 2, generator=generator, device=generator.device).to(logits.device)
    return torch.cat([chosen, uniform], dim=1)


def point_loss(
    logits: torch.Tensor, targets: torch.Tensor, generator: torch.Generator, count: int = 12_544
) -> torch.Tensor:
    """BCE + Dice of each mask on uncertain points.

    Args:
        logits: `(n, h, w)`, any resolution.
        targets: `(n, height, width)`, 0 or 1, over the same extent.
        generator: the source of randomness; on the CPU it gives the same numbers everywhere.
        count: points a mask.

    Returns:
        `(n,)`, one loss a mask.
    """
    with torch.no_grad():
        points = uncertain_points(logits.detach(), count, generator)
        labels = sample_at(targets, points)
    predictions = sample_at(logits, points)
    bce = F.binary_cross_entropy_with_logits(predictions, labels, reduction="none").mean(1)
    return bce + dice_loss(predictions.sigmoid(), labels)


def interactive_loss(
    logits: torch.Tensor, ious: torch.Tensor, targets: torch.Tensor, generator: torch.Generator, count: int = 12_544
) -> torch.Tensor:
    """SAM's own training loss: the best of several masks, and the error of the predicted IoUs (SAM, appendix A).

    Args:
        logits: `(n, masks, h, w)`.
        ious: `(n, masks)`, the predicted IoU of each mask.
        targets: `(n, height, width)`, 0 or 1.
        generator: the source of randomness; on the CPU it gives the same numbers everywhere.
        count: points a mask.

    Returns:
        A scalar.
    """
    n, masks = logits.shape[:2]
    repeated = targets.repeat_interleave(masks, 0)
    losses = point_loss(logits.flatten(0, 1), repeated, generator, count).view(n, masks)
    with torch.no_grad():
        actual = ious_of(logits > 0, shrunk(targets, logits.shape[-2:]).unsqueeze(1))
    return losses.min(dim=1).values.mean() + F.mse_loss(ious.float(), actual)
