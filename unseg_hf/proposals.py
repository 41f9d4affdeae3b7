"""Masks from the SAM inside a generator: for boxes and points, and proposed for a whole image.

The point grid and its filters follow SAM's automatic mask generation (Segment Anything, section 5 and appendix B).
"""

import torch
import torch.nn.functional as F

from .modeling_unseg import UnSegImageEmbeddings, UnSegModel

TRUSTED_IOU = 0.5  # a mask that SAM itself expects to be worse is no help in finding the object of a prompt
PROMPT_CHUNK = 64  # prompts decoded at once; the decoder repeats the image embedding for each


@torch.no_grad()
def segment(
    model: UnSegModel, embeddings: UnSegImageEmbeddings, **prompts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask that SAM trusts most for each prompt.

    Args:
        model: the generator.
        embeddings: of one image.
        prompts: `input_points` `(1, prompts, points, 2)` with `input_labels`, or `input_boxes` `(1, prompts, 4)`.

    Returns:
        Mask logits `(prompts, 4 * grid, 4 * grid)` over the padded square, positive inside, and the predicted IoU
        `(prompts,)` of each.
    """
    logits, ious = _decode(model, embeddings, prompts)
    best = ious.max(dim=1)
    return logits[torch.arange(len(logits), device=logits.device), best.indices], best.values


@torch.no_grad()
def propose(
    model: UnSegModel,
    embeddings: UnSegImageEmbeddings,
    size: tuple[int, int],
    points_per_side: int = 16,
    overlap: float = 0.7,
    smallest: float = 0.002,
    largest: float = 0.9,
) -> torch.Tensor:
    """Segments of an image without any prompt.

    A grid of points is decoded; what remains is predicted to be good (`proposal_iou` of the configuration), does not
    change when the threshold moves by one logit (`proposal_stability`), has a sensible area, and does not repeat a
    better mask.

    Args:
        model: the generator.
        embeddings: of one image.
        size: (height, width) of the image in the padded square, in pixels of the model's input.
        points_per_side: of the grid.
        overlap: of two masks whose IoU is above this, the worse one goes.
        smallest, largest: area of a mask, as a share of the image.

    Returns:
        Mask logits `(segments, 4 * grid, 4 * grid)`, best first; there may be none.
    """
    height, width = size
    steps = (torch.arange(points_per_side, device=model.device) + 0.5) / points_per_side
    y, x = torch.meshgrid(steps * height, steps * width, indexing="ij")
    points = torch.stack([x, y], dim=-1).view(1, -1, 1, 2)
    logits, ious = _decode(model, embeddings, {"input_points": points})
    logits, ious = logits.flatten(0, 1), ious.flatten()

    side = model.config.sam_config.vision_config.image_size
    rows, columns = (max(1, round(v * logits.shape[-1] / side)) for v in size)
    inside = torch.zeros_like(logits[0], dtype=torch.bool)
    inside[:rows, :columns] = True
    masks = (logits > 0) & inside
    strict, loose = (((logits > t) & inside).flatten(1).sum(1) for t in (1.0, -1.0))
    share = masks.flatten(1).sum(1) / (rows * columns)
    keep = (
        (ious > model.config.proposal_iou)
        & (strict / loose.clamp(min=1) > model.config.proposal_stability)
        & (share > smallest)
        & (share < largest)
    )
    logits, masks, ious = logits[keep], masks[keep].flatten(1).float(), ious[keep]
    best_first = ious.argsort(descending=True, stable=True)
    kept: list[int] = []
    areas = masks.sum(1)
    for i in best_first.tolist():
        if kept:
            common = masks[kept] @ masks[i]
            if (common / (areas[kept] + areas[i] - common)).max() > overlap:
                continue
        kept.append(i)
    return logits[kept]


def masks_at(logits: torch.Tensor, square: int, reshaped: tuple[int, int], size: tuple[int, int]):
    """Yields one bool array `(height, width)` a mask, at the image's own size, so that few are in memory at once.

    Args:
        logits: `(masks, h, w)` over the padded square.
        square: side of the padded square, in pixels of the model's input.
        reshaped: (height, width) of the image in it.
        size: (height, width) of the image.
    """
    for mask in logits:
        mask = F.interpolate(mask[None, None].float(), (square, square), mode="bilinear", align_corners=False)
        mask = mask[..., : reshaped[0], : reshaped[1]]
        yield (F.interpolate(mask, size, mode="bilinear", align_corners=False)[0, 0] > 0).cpu().numpy()


def _decode(model: UnSegModel, embeddings: UnSegImageEmbeddings, prompts: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(prompts, masks, h, w)` and predicted IoUs `(prompts, masks)` in float32."""
    logits, ious = [], []
    count = next(iter(prompts.values())).shape[1]
    for start in range(0, count, PROMPT_CHUNK):
        output = model.sam(
            image_embeddings=embeddings.image_embeddings,
            multimask_output=True,
            **{name: prompt[:, start : start + PROMPT_CHUNK].to(model.device) for name, prompt in prompts.items()},
        )
        logits.append(output.pred_masks[0].float())
        ious.append(output.iou_scores[0].float())
    return torch.cat(logits), torch.cat(ious)
