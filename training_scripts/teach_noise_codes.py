"""Give a trained generator a noise of its own for each class, by regression to waves that victims learn first.

    python training_scripts/teach_noise_codes.py runs/adjusted --train_data ecssd/train.parquet \\
        bsds500/train.parquet,masks=regions --output runs/unseg-tiny

The bilevel loop finds one noise, and with one noise for all objects a model still learns which class an object is
of. The noise head gets a set of noise tokens for each of `CODES`, and all of it, SAM apart, is trained to make them
from any image and mask: one wave for each patch of the encoder, down or across the image, or none, in a colour. Which
waves and colours keep victims from learning classes is measured by `benchmarks/compare_patterns.py`
(docs/experiments.md).
"""

import argparse
import copy
import itertools
import sys
from pathlib import Path

HUES = [(1, 1, -1), (1, -1, 1), (1, -1, -1), (1, 1, 1)]
"""RGB of the waves: yellow and blue, magenta and green, red and cyan, white and black."""

CODES = [
    *((direction, hue) for hue in HUES for direction in ("down", "across")),
    *(("flat", tuple(sign * channel for channel in hue)) for sign in (1, -1) for hue in HUES),
    *((direction, tuple(-channel for channel in hue)) for hue in HUES for direction in ("down", "across")),
]
"""The codes, in the order in which data sets number their classes: few classes need the first alone."""

SOFTER = 0.1
"""What the last layers of the noise MLPs are multiplied with before they are trained."""


def code_targets(side: int):
    """Noise `(codes, 3, side, side)` of 1 and -1 at the generator's resolution, four cells for each patch."""
    import torch

    wave = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(side // 4)
    flat = {"down": wave[:, None], "across": wave[None, :], "flat": torch.ones(1, 1)}
    return torch.stack(
        [flat[shape].expand(side, side) * torch.tensor(colour).view(3, 1, 1).float() for shape, colour in CODES]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("generator", help="folder or Hub id")
    parser.add_argument(
        "--train_data", nargs="+", required=True, help="[KIND:]LOCATION[,option=value]..., as train_generator.py"
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch_size", type=int, default=4, help="images a step")
    parser.add_argument("--codes_a_step", type=int, default=6, help="codes that each image of a step gets")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    options = parser.parse_args()
    if options.output.exists():
        raise FileExistsError(f"{options.output} is there: choose a new folder")

    import torch
    from torch.utils.data import DataLoader

    from unseg_hf import UnSegModel, UnSegProcessor
    from unseg_hf.data.interactive import InteractiveSegmentation
    from unseg_hf.data.sources import parse_source
    from unseg_hf.training.prompts import make_prompts
    from unseg_hf.training.surrogates import normalise

    torch.manual_seed(options.seed)
    processor = UnSegProcessor.from_pretrained(options.generator)
    model = with_codes(UnSegModel.from_pretrained(options.generator), len(CODES))
    model.sam.requires_grad_(False)
    size = processor.target_size
    data = InteractiveSegmentation(
        [parse_source(text) for text in options.train_data], size, (1, 1), seed=options.seed, stretch=processor.stretch
    )
    targets = code_targets(4 * size // model.config.sam_config.vision_config.patch_size)
    optimizer = torch.optim.Adam(model.noise_head.parameters(), options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    random = torch.Generator().manual_seed(options.seed)
    steps = 0
    for epoch in itertools.count():
        for batch in DataLoader(data, batch_sampler=data.batches(epoch, options.batch_size)):
            codes = torch.stack(
                [torch.randperm(len(CODES), generator=random)[: options.codes_a_step] for _ in batch["image"]]
            )
            prompts = make_prompts(batch["mask"], ("mask",), random)
            masks = prompts["input_masks"].expand(-1, options.codes_a_step, -1, -1)
            noise = model(pixel_values=normalise(batch["image"]), input_masks=masks, codes=codes).noise
            loss = (noise - targets[codes]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            steps += 1
            if steps % 50 == 0:
                print(f"step {steps} of {options.steps}: mean squared error {loss.item():.4f}", flush=True)
            if steps == options.steps:
                model.save_pretrained(options.output)
                processor.save_pretrained(options.output)
                print(f"generator saved to {options.output}")
                return


def with_codes(model, count: int):
    """The same generator with so many codes, each at first the one it has."""
    import torch

    from unseg_hf import UnSegModel

    config = copy.deepcopy(model.config)
    config.noise_codes = count
    weights = model.state_dict()
    tokens = weights["noise_head.noise_tokens.weight"][:3].repeat(count, 1)
    # Far apart: what is as small as SAM's own tokens the decoder's layer norms leave nothing of.
    weights["noise_head.noise_tokens.weight"] = tokens + torch.randn_like(tokens)
    # A trained generator's tanh is saturated: it would pass no gradient on.
    for name in weights:
        if name.startswith("noise_head.noise_mlps.") and ".4." in name:
            weights[name] *= SOFTER
    new = UnSegModel(config)
    new.load_state_dict(weights)
    return new


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"teach_noise_codes: {error}")
