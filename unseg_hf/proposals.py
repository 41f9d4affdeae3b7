"""Masks from the SAM inside a generator: for boxes and points, and proposed for a whole image.

The point grid and its filters follow SAM's automatic mask generation (Segment Anything, section 5 and appendix B).
"""

import torch
import torch.nn.functional as F

from .modeling_unseg import UnSegImageEmbeddings, UnSegModel

TRUSTED_IOU = 0.5  # a mask that SAM itself expects to be worse is no help in finding the object of a prompt
PROMPT_CHUNK = 64  # prompts decoded at once; the decoder repeats the image embedding for each
POINTS_PER_SIDE = 16  # of the grid
OVERLAP = 0.7  # of two masks whose IoU is above this, the worse one goes
SMALLEST, LARGEST = 0.002, 0.9  # area of a mask, as a share of the image
BLOT = 16  # a point is drawn with a standard deviation of a sixteenth of the input's side


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
        Mask logits `(prompts, 4 * grid, 4 * grid)` over the square, positive inside, and the predicted IoU
        `(prompts,)` of each.
    """
    logits, ious = _decode(model, embeddings, prompts)
    best = ious.max(dim=1)
    return logits[torch.arange(len(logits), device=logits.device), best.indices], best.values


@torch.no_grad()
def propose(model: UnSegModel, embeddings: UnSegImageEmbeddings, size: tuple[int, int]) -> torch.Tensor:
    """Segments of an image without any prompt.

    A grid of points is decoded; what remains is predicted to be good (`proposal_iou` of the configuration), does not
    change when the threshold moves by one logit (`proposal_stability`), has a sensible area, and does not repeat a
    better mask.

    Args:
        model: the generator.
        embeddings: of one image.
        size: (height, width) of the image in the square, in pixels of the model's input.

    Returns:
        Mask logits `(segments, 4 * grid, 4 * grid)`, best first; there may be none.
    """
    height, width = size
    steps = (torch.arange(POINTS_PER_SIDE, device=model.device) + 0.5) / POINTS_PER_SIDE
    y, x = torch.meshgrid(steps * height, steps * width, indexing="ij")
    points = torch.stack([x, y], dim=-1).view(1, -1, 1, 2)
    labels = torch.ones_like(points[..., 0], dtype=torch.int64)
    logits, ious = _decode(model, embeddings, {"input_points": points, "input_labels": labels})
    logits, ious = logits.flatten(0, 1), ious.flatten()

    side = model.config.sam_config.vision_config.image_size
    rows, columns = (max(1, round(v * logits.shape[-1] / side)) for v in size)
    inside = torch.zeros_like(logits[0], dtype=torch.bool)
    inside[:rows, :columns] = True
    return logits[good_masks(logits, ious, inside, model.config.proposal_iou, model.config.proposal_stability)]


def good_masks(
    logits: torch.Tensor, ious: torch.Tensor, inside: torch.Tensor, least_iou: float, least_stability: float
) -> list[int]:
    """Which masks of a grid of points are worth keeping, best first.

    Args:
        logits: `(masks, h, w)`.
        ious: `(masks,)`, predicted.
        inside: `(h, w)` bool, where the image is.
        least_iou: a mask that is predicted to have less goes.
        least_stability: and one whose IoU at the thresholds +1 and -1 is less.
    """
    masks = (logits > 0) & inside
    strict, loose = (((logits > t) & inside).flatten(1).sum(1) for t in (1.0, -1.0))
    share = masks.flatten(1).sum(1) / inside.sum()
    keep = (ious > least_iou) & (strict / loose.clamp(min=1) > least_stability)
    keep &= (share > SMALLEST) & (share < LARGEST)
    best_first = keep.nonzero()[:, 0]
    best_first = best_first[ious[best_first].argsort(descending=True, stable=True)]
    masks = masks[best_first].flatten(1).float()
    areas, common = masks.sum(1), masks @ masks.T
    # Compared all at once: a graphics card waits longer for a question than it takes for all answers.
    repeats = (common / (areas[:, None] + areas - common) > OVERLAP).tolist()
    kept: list[int] = []
    for number, repeated in enumerate(repeats):
        if not any(repeated[better] for better in kept):
            kept.append(number)
    return best_first[kept].tolist()


def masks_at(logits: torch.Tensor, square: int, reshaped: tuple[int, int], size: tuple[int, int]):
    """Yields one bool array `(height, width)` a mask, at the image's own size, so that few are in memory at once.

    Args:
        logits: `(masks, h, w)` over the square.
        square: side of the square, in pixels of the model's input.
        reshaped: (height, width) of the image in it.
        size: (height, width) of the image.
    """
    for mask in logits:
        mask = F.interpolate(mask[None, None].float(), (square, square), mode="bilinear", align_corners=False)
        mask = mask[..., : reshaped[0], : reshaped[1]]
        yield (F.interpolate(mask, size, mode="bilinear", align_corners=False)[0, 0] > 0).cpu().numpy()


def draw_prompts(side: int, input_boxes=None, input_points=None, input_labels=None) -> torch.Tensor:
    """Boxes and points as a mask prompt, which tells a small SAM where it is asked about.

    SAM's decoder has to find the place of a prompt by attention. A small one from random weights does not learn that
    in hundreds of steps; that a mask prompt lies where it lies, it sees at once.

    Args:
        side: of the model's input, in pixels; its patches have 16.
        input_boxes: `(n, 1, 4)`; 1 inside, -1 outside.
        input_points: `(n, 1, points, 2)`; blots of 3 where the label is 1, of -3 where it is 0.
        input_labels: `(n, 1, points)`.

    Returns:
        `(n, 1, side / 4, side / 4)`, an `input_masks` of [`SamModel`].
    """
    given = input_boxes if input_boxes is not None else input_points
    places = (torch.arange(side // 4, device=given.device) + 0.5) * 4
    x, y = places.view(1, 1, -1), places.view(1, -1, 1)
    drawn = torch.zeros(len(given), 1, side // 4, side // 4, device=given.device)
    if input_boxes is not None:
        x0, y0, x1, y1 = input_boxes[:, 0, :, None, None].unbind(1)
        drawn[:, 0] = ((x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)).float() * 2 - 1
    if input_points is not None:
        signs = (input_labels == 1).float() - (input_labels == 0).float()
        for point, sign in zip(input_points[:, 0].unbind(1), signs[:, 0].unbind(1), strict=True):
            distances = (x - point[:, 0, None, None]) ** 2 + (y - point[:, 1, None, None]) ** 2
            drawn[:, 0] += 3 * sign[:, None, None] * torch.exp(-distances / (2 * (side / BLOT) ** 2))
    return drawn


def _decode(model: UnSegModel, embeddings: UnSegImageEmbeddings, prompts: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(prompts, masks, h, w)` and predicted IoUs `(prompts, masks)` in float32."""
    logits, ious = [], []
    count = next(iter(prompts.values())).shape[1]
    for start in range(0, count, PROMPT_CHUNK):
        # SAM takes one mask prompt an image: so each prompt has an image of its own.
        some = {name: p[0, start : start + PROMPT_CHUNK, None].to(model.device) for name, p in prompts.items()}
        drawn = None
        if model.config.draw_prompts:
            drawn = draw_prompts(model.config.sam_config.vision_config.image_size, **some).to(model.dtype)
        image = embeddings.image_embeddings.expand(len(next(iter(some.values()))), -1, -1, -1)
        output = model.sam(image_embeddings=image, input_masks=drawn, multimask_output=True, **some)
        logits.append(output.pred_masks[:, 0].float())
        ious.append(output.iou_scores[:, 0].float())
    return torch.cat(logits), torch.cat(ious)
