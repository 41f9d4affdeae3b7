"""Train the SAM inside a generator to find what a box or a click means, and with that to propose objects.

A small one, at the input size of the generator whose it is, on a GPU:

    python training_scripts/train_sam.py unseg_hf/checkpoints/unseg-tiny --anew \\
        --train_data "sa1b:tars/*.tar,min_area=0.01" --output runs/sam

As SAM was trained (Segment Anything, section 3 and appendix A), made short: a loose box or a few points of an object
first, then a click where the answer is wrong; of three masks the best one learns, and each learns to say how good it
is. The noise head knows the old SAM's features only: `teach_noise_codes.py` comes after this. An object finder is left
out: it would be asked in SAM's place.

Masks of everything in a photo, which no data set at hand has, come from `teacher_masks.py`.
"""

import argparse
import math
import sys
from pathlib import Path

MOST_POINTS = 4
"""Points of an object that are given at once."""

BOX_SHARE = 0.4
"""Of the steps whose first prompt is a box, not points."""

LOOSE = 0.1
"""Largest shift of a box's sides, as a share of its width or height."""

WARM_UP = 100
"""Steps in which the learning rate grows to its height."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("generator", help="folder or Hub id")
    parser.add_argument("--anew", action="store_true", help="begin with random weights (default: with SAM's own)")
    parser.add_argument(
        "--train_data", nargs="+", required=True, help="[KIND:]LOCATION[,option=value]..., as train_generator.py"
    )
    parser.add_argument("--validation_data", nargs="+", default=[], help="images that say how good it has become")
    parser.add_argument("--validate_every", type=int, default=1000, help="steps")
    parser.add_argument("--max_scale", type=float, default=2.0, help="images are enlarged by 1 to this, and cropped")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=64, help="images a step, a mask of each")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--points", type=int, default=1024, help="of a mask that the loss looks at")
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--mixed_precision", choices=("no", "bf16"), help="(default: as the launcher says)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_code", action=argparse.BooleanOptionalAction, default=True, help="beside the weights")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    options = parser.parse_args()
    if options.output.exists():
        raise FileExistsError(f"{options.output} is there: choose a new folder")

    import torch
    from torch.utils.data import DataLoader

    from unseg_hf import UnSegModel, UnSegProcessor
    from unseg_hf.data.interactive import InteractiveSegmentation
    from unseg_hf.data.sources import parse_source
    from unseg_hf.training.processes import build_accelerator
    from unseg_hf.training.publishing import save_generator

    accelerator = build_accelerator(mixed_precision=options.mixed_precision)
    if accelerator.num_processes > 1:
        raise ValueError(f"{accelerator.num_processes} processes: a SAM small enough for this script needs one")
    torch.manual_seed(options.seed)
    processor = UnSegProcessor.from_pretrained(options.generator)
    model = UnSegModel.from_pretrained(options.generator)
    model.config.draw_prompts = True
    model.object_finder = model.config.object_finder_width = None
    if options.anew:
        begin_anew(model.sam)
    model.sam.requires_grad_(True)
    model.sam.shared_image_embedding.requires_grad_(False)

    def data_of(texts: list[str], scale: float, most: int | None = None) -> InteractiveSegmentation:
        sources = [parse_source(text) for text in texts]
        shape = {"seed": options.seed, "stretch": processor.stretch}
        if any(source.size is None for source in sources):
            shape["epoch_size"] = most  # nobody knows where a stream ends
        return InteractiveSegmentation(sources, processor.target_size, (1, scale), **shape)

    data = data_of(options.train_data, options.max_scale, options.steps * options.batch_size)
    loader = DataLoader(
        Prompted(data, options.seed),
        batch_sampler=data.batches_of_steps(options.steps, options.batch_size),
        num_workers=options.workers,
        pin_memory=accelerator.device.type == "cuda",
    )
    held_out = data_of(options.validation_data, 1) if options.validation_data else None
    optimizer = torch.optim.AdamW(
        (parameter for parameter in model.sam.parameters() if parameter.requires_grad),
        options.learning_rate,
        weight_decay=options.weight_decay,
    )
    sam, optimizer = accelerator.prepare(model.sam, optimizer)
    random = torch.Generator(accelerator.device).manual_seed(options.seed)
    running, pinned = [], accelerator.device.type == "cuda"
    for step, batch in enumerate(loader):
        share = step / options.steps
        rate = min(1, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = options.learning_rate * rate
        batch = {name: value.to(accelerator.device, non_blocking=pinned) for name, value in batch.items()}
        with accelerator.autocast():
            loss = sam_loss(sam, batch, step, options.points, random)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step}: start anew with a lower learning rate"
            )
        optimizer.zero_grad()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(sam.parameters(), 1.0)
        optimizer.step()
        running.append(loss.detach())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {options.steps}: loss {torch.stack(running).mean():.4f}", flush=True)
            running.clear()
        last = step + 1 == options.steps
        due = options.validate_every and (step + 1) % options.validate_every == 0
        if held_out and (last or due):
            found = validate(sam, Prompted(held_out, options.seed), options.batch_size, accelerator)
            print(f"step {step + 1} of {options.steps}: held out, {found}", flush=True)
    save_generator(model.cpu(), processor, options.output, with_code=options.save_code)
    print(
        f"generator saved to {options.output}; its noise is not its own any more: teach it with teach_noise_codes.py"
    )


def begin_anew(sam) -> None:
    """Random weights as torch has them, and positions at 0. SAM's own, with a deviation of 0.02, leave so little of a
    narrow decoder's tokens that hundreds of steps pass before anything is learned. The frequencies of the coordinates,
    which are random and never trained, stay."""
    from torch import nn

    for module in sam.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.LayerNorm)):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
    for name, parameter in sam.vision_encoder.named_parameters():
        if name.split(".")[-1] in ("pos_embed", "rel_pos_h", "rel_pos_w"):
            nn.init.zeros_(parameter)


class Prompted:
    """The samples of `data` with what a user might say of them, drawn where they are loaded.

    `box` `(4,)` as (x0, y0, x1, y1) in pixels of the input and `points` `(MOST_POINTS, 2)` of the object.
    """

    def __init__(self, data, seed: int):
        self.data, self.seed = data, seed

    def __getitems__(self, draws) -> list[dict]:
        import numpy as np
        import torch

        samples = self.data.__getitems__(draws)
        for draw, sample in zip(draws, samples, strict=True):
            random = np.random.default_rng((self.seed, draw.epoch, draw.number, 1))
            rows, columns = np.nonzero(sample["mask"].numpy())
            corners = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], np.float32)
            width, height = corners[2:] - corners[:2]
            shift = random.uniform(-LOOSE, LOOSE, 4) * [width, height, width, height]
            chosen = random.integers(len(rows), size=MOST_POINTS)
            sample["box"] = torch.from_numpy((corners + shift).clip(0, sample["mask"].shape[-1])).float()
            sample["points"] = torch.from_numpy(np.stack([columns[chosen], rows[chosen]], -1) + 0.5).float()
            del sample["name"], sample["inside"]
        return samples


def recoloured(images, random):
    """`(n, 3, h, w)` in [0, 1] with other brightness, contrast and colours; a tenth of them grey."""
    import torch

    def uniform(low: float, high: float, channels: int) -> torch.Tensor:
        values = torch.rand(len(images), channels, 1, 1, generator=random, device=images.device)
        return low + (high - low) * values

    images = images * uniform(0.7, 1.3, 1) * uniform(0.85, 1.15, 3)
    middle = images.mean((1, 2, 3), keepdim=True)
    images = middle + (images - middle) * uniform(0.7, 1.3, 1)
    grey = uniform(0, 1, 1) < 0.1
    return torch.where(grey, images.mean(1, keepdim=True), images).clamp(0, 1)


def sam_loss(sam, batch: dict, step: int, points: int, random):
    """That of a first prompt, and of the click that corrects the answer to it."""
    import torch

    from unseg_hf.evaluation.victims.base import normalise
    from unseg_hf.training.losses import interactive_loss

    choice = torch.rand(2, generator=torch.Generator().manual_seed(step)).tolist()
    if choice[0] < BOX_SHARE:
        prompts = {"input_boxes": batch["box"][:, None]}
    else:
        # One point more often than several: it is what most people give, and what proposals are made from.
        count = max(1, math.ceil(MOST_POINTS * (2 * choice[1] - 1)))
        given = batch["points"][:, None, :count]
        prompts = {"input_points": given, "input_labels": torch.ones_like(given[..., 0], dtype=torch.int64)}
    # Not by `get_image_embeddings`, which transformers runs without gradients.
    embeddings = sam.vision_encoder(normalise(recoloured(batch["image"], random))).last_hidden_state

    def answer():
        logits, ious = ask(sam, embeddings, batch["image"].shape[-1], prompts)
        return interactive_loss(logits, ious, batch["mask"], random, points), logits, ious

    first, logits, ious = answer()
    for name, value in correcting_click(logits, ious, batch["mask"], random).items():
        prompts[name] = torch.cat([prompts[name], value], 2) if name in prompts else value
    second, *_ = answer()
    return (first + second) / 2


def ask(sam, embeddings, side: int, prompts: dict):
    """Logits `(n, masks, h, w)` and predicted IoUs `(n, masks)` for one prompt an image, which is drawn, too."""
    from unseg_hf.proposals import draw_prompts

    drawn = draw_prompts(side, **prompts)
    found = sam(image_embeddings=embeddings, input_masks=drawn, multimask_output=True, **prompts)
    return found.pred_masks[:, 0].float(), found.iou_scores[:, 0].float()


def correcting_click(logits, ious, masks, random):
    """A point where the mask that SAM trusts most is wrong, or of the object where it is right everywhere.

    Returns:
        `input_points` `(n, 1, 1, 2)` in pixels of the input, and `input_labels` `(n, 1, 1)`: 1 in the object, 0
        outside.
    """
    import torch

    from unseg_hf.evaluation.victims.base import shrunk

    best = logits.detach()[torch.arange(len(logits)), ious.detach().argmax(1)] > 0
    true = shrunk(masks, best.shape[-2:])
    wrong = (best != true).flatten(1).float()
    # A cell in a thousand stands in for masks without a wrong cell, or without any.
    weights = wrong + 1e-3 * true.flatten(1) + 1e-9
    cell = torch.multinomial(weights, 1, generator=random)
    width = best.shape[-1]
    place = torch.cat([cell % width, cell // width], 1)
    points = (place + 0.5) * (masks.shape[-1] / width)
    labels = true.flatten(1).gather(1, cell).long()
    return {"input_points": points[:, None, None], "input_labels": labels[:, None]}


def validate(sam, held_out: Prompted, batch_size: int, accelerator) -> str:
    """Mean IoU, at SAM's own resolution, of the masks that it trusts most for a loose box and for one point."""
    import torch

    from unseg_hf.evaluation.victims.base import ious_of, normalise, shrunk

    ious = {"box": [], "point": []}
    sam.eval()
    with torch.no_grad():
        draws = [draw for (draw,) in held_out.data.batches(0, batch_size=1)]
        for start in range(0, len(draws), batch_size):
            samples = held_out.__getitems__(draws[start : start + batch_size])
            batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
            batch = {name: value.to(accelerator.device) for name, value in batch.items()}
            embeddings = sam.get_image_embeddings(normalise(batch["image"]))
            point = batch["points"][:, None, :1]
            for name, prompts in (
                ("box", {"input_boxes": batch["box"][:, None]}),
                ("point", {"input_points": point, "input_labels": torch.ones_like(point[..., 0]).long()}),
            ):
                logits, expected = ask(sam, embeddings, batch["image"].shape[-1], prompts)
                masks = logits[torch.arange(len(point)), expected.argmax(1)] > 0
                ious[name].append(ious_of(masks, shrunk(batch["mask"], masks.shape[-2:])))
    sam.train()
    return ", ".join(f"IoU for a {name} {torch.cat(values).mean():.3f}" for name, values in ious.items())


if __name__ == "__main__":
    try:
        main()
    except (ImportError, ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train_sam: {error}")
