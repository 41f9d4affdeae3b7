"""Teach a generator chosen noises, one for each class, by regression to waves that victims learn first.

The embedded default's noise, from what `train_generator.py` left (`train_object_finder.py` comes next):

    python training_scripts/teach_noise_codes.py runs/trained --stretch --image_size 192 --sharpness 6 \\
        --epsilon_background 0 --epsilon_smooth 2 --no-save_code --output runs/taught \\
        --train_data ecssd/train.parquet bsds500/train.parquet,masks=regions

The bilevel loop finds one noise, and with one noise for all objects a model still learns which class an object is
of. The noise head gets a set of noise tokens for each code, and all of it, SAM apart, is trained to make them from any
image and mask: one wave for each patch of the encoder, down the image or across it, or none. Masks without a class
have a code of their own, and at small budgets, or where waves say little, one of the classes'. Which codes keep
victims from learning objects and classes is measured by `benchmarks/compare_patterns.py` (docs/experiments.md).

With images stretched to the input, not padded, waves lie alike in images of all shapes, see `UnSegProcessor`; and at
another input size there are more or fewer of them: position embeddings are interpolated.
"""

import argparse
import copy
import sys
from pathlib import Path

SOFTER = 0.1
"""What the last layers of the noise MLPs are multiplied with before they are trained."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("generator", help="folder or Hub id")
    parser.add_argument("--stretch", action="store_true", help="stretch images to the input (default: as they were)")
    parser.add_argument("--image_size", type=int, help="side of the input in pixels (default: as it was)")
    parser.add_argument("--sharpness", type=float, help="of the enlarged noise (default: as it was)")
    parser.add_argument(
        "--epsilon_background", type=float, help="outside the mask, in grey levels of 255 (default: as it was)"
    )
    parser.add_argument("--mask_code", help="noise of masks, see unseg_hf/noise_codes.py (default: its MASK)")
    parser.add_argument("--class_codes", nargs="+", help="noises of classes (default: its CLASSES)")
    parser.add_argument(
        "--tint_codes",
        nargs="+",
        help="those of them for masks that waves say little in (default: its TINTS; of other classes none)",
    )
    parser.add_argument(
        "--faint_code",
        help="that for masks at small budgets (default: its FAINT; with other classes the mask's)",
    )
    parser.add_argument(
        "--epsilon_smooth", type=float, help="where images are smooth, in grey levels of 255 (default: as it was)"
    )
    parser.add_argument(
        "--train_data", nargs="+", required=True, help="[KIND:]LOCATION[,option=value]..., as train_generator.py"
    )
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=4, help="images a step")
    parser.add_argument("--codes_a_step", type=int, default=5, help="that an image of a step gets besides its mask's")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save_code", action=argparse.BooleanOptionalAction, default=True, help="beside the weights")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    options = parser.parse_args()
    if options.output.exists():
        raise FileExistsError(f"{options.output} is there: choose a new folder")

    import numpy as np
    import torch
    from torch.utils.data import DataLoader

    from unseg_hf import UnSegModel, UnSegProcessor
    from unseg_hf.data.interactive import InteractiveSegmentation
    from unseg_hf.data.sources import parse_source
    from unseg_hf.evaluation.victims.base import normalise
    from unseg_hf.noise_codes import CLASSES, FAINT, MASK, TINTS, code_noise
    from unseg_hf.training.prompts import make_prompts
    from unseg_hf.training.publishing import save_generator

    torch.manual_seed(options.seed)
    codes = [options.mask_code or MASK, *(options.class_codes or CLASSES)]
    tints = options.tint_codes or ([] if options.class_codes else TINTS)
    faint = options.faint_code or (codes[0] if options.class_codes else FAINT)
    for name, unknown in (("tint_codes", set(tints) - set(codes[1:])), ("faint_code", {faint} - set(codes))):
        if unknown:
            raise ValueError(f"--{name} {' '.join(sorted(unknown))}: must be among the codes {' '.join(codes)}")
    processor = UnSegProcessor.from_pretrained(options.generator)
    stretch = processor.stretch or options.stretch
    sharpness = processor.sharpness if options.sharpness is None else options.sharpness
    size = options.image_size or processor.target_size
    if size != processor.target_size:
        processor = UnSegProcessor.for_image_size(size)
    processor = UnSegProcessor(processor.image_processor, stretch, sharpness)
    model = with_codes(UnSegModel.from_pretrained(options.generator), len(codes), size)
    model.config.tint_codes = [codes.index(tint, 1) for tint in tints]
    model.config.faint_code = codes.index(faint)
    if options.epsilon_smooth is not None:
        model.config.epsilon_smooth = options.epsilon_smooth / 255
    model.config.validate_architecture()
    if options.epsilon_background is not None:
        _, model.config.epsilon_background = model.config.budget(None, options.epsilon_background / 255)
    model.sam.requires_grad_(False)
    sources = [parse_source(text) for text in options.train_data]
    streamed = any(source.size is None for source in sources)  # nobody knows where that ends
    whole = options.steps * options.batch_size if streamed else None
    data = InteractiveSegmentation(sources, size, (1, 1), epoch_size=whole, seed=options.seed, stretch=stretch)
    # The noise has four cells for each patch.
    places = (np.arange(4 * size // model.config.sam_config.vision_config.patch_size) + 0.5) / 4
    targets = np.stack([code_noise(code, places[:, None], places) for code in codes])
    targets = torch.from_numpy(targets).permute(0, 3, 1, 2)
    optimizer = torch.optim.Adam(model.noise_head.parameters(), options.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    random = torch.Generator().manual_seed(options.seed)
    loader = DataLoader(data, batch_sampler=data.batches_of_steps(options.steps, options.batch_size))
    for step, batch in enumerate(loader, 1):
        orders = torch.stack([torch.randperm(len(codes) - 1, generator=random) for _ in batch["image"]])
        # The first, and some of the others.
        chosen = torch.nn.functional.pad(1 + orders[:, : options.codes_a_step], (1, 0))
        masks = make_prompts(batch["mask"], ("mask",), random)["input_masks"].expand(-1, chosen.shape[1], -1, -1)
        noise = model(pixel_values=normalise(batch["image"]), input_masks=masks, codes=chosen).noise
        loss = (noise - targets[chosen]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} of {options.steps}: mean squared error {loss.item():.4f}", flush=True)
    save_generator(model, processor, options.output, with_code=options.save_code)
    print(f"generator saved to {options.output}")


def with_codes(model, count: int, image_size: int):
    """The same SAM at an input size, with a noise head for so many codes, to be trained."""
    import torch

    from unseg_hf import UnSegModel
    from unseg_hf.evaluation.victims.checkpoints import sam_config_at
    from unseg_hf.training.surrogates import load_resized

    config = copy.deepcopy(model.config)
    config.noise_codes, config.tint_codes, config.faint_code = count, None, None
    model.object_finder = config.object_finder_width = None  # it comes last, and knows one input size
    config.sam_config = sam_config_at(config.sam_config, image_size)
    head = model.noise_head
    with torch.no_grad():
        # Far apart: tokens as small as SAM's own would vanish in the decoder's layer norms.
        tokens = torch.randn(3 * count, head.noise_tokens.embedding_dim)
        head.noise_tokens = torch.nn.Embedding.from_pretrained(tokens, freeze=False)
        # A trained generator's tanh is saturated: it would pass no gradient on.
        for mlp in head.noise_mlps:
            mlp[-1].weight *= SOFTER
            mlp[-1].bias *= SOFTER
    new = UnSegModel(config)
    load_resized(new, model)
    return new


if __name__ == "__main__":
    try:
        main()
    except (ImportError, ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"teach_noise_codes: {error}")
