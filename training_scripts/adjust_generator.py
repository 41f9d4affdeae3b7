"""Changes of a trained generator that need no training: colours and waves of its noise, how images fill its input.

    python training_scripts/adjust_generator.py runs/unseg-tiny --signs 1 -1 -1 --stretch --image_size 192 \\
        --output runs/adjusted

Noise is tanh(MLP(token) . feature), one MLP a channel, and tanh is odd: with the last layer of an MLP negated the
noise of its channel is its negative, exactly. So magenta and green waves, which greyscale takes away, become yellow
and blue ones, of which it leaves three quarters. With images stretched to the input, not padded, the waves lie alike
in images of all shapes, see `UnSegProcessor`. And at another input size there are more or fewer of them, one for each
patch of 16 pixels: position embeddings are interpolated.
"""

import argparse
import copy
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("generator", help="folder or Hub id")
    parser.add_argument(
        "--signs", type=int, nargs=3, choices=(1, -1), default=(1, 1, 1), help="of red, green and blue noise"
    )
    parser.add_argument("--stretch", action="store_true", help="stretch images to the input (default: as they were)")
    parser.add_argument("--image_size", type=int, help="side of the input in pixels (default: as it was)")
    parser.add_argument("--output", type=Path, required=True, help="new folder")
    options = parser.parse_args()
    if options.output.exists():
        raise FileExistsError(f"{options.output} is there: choose a new folder")

    import torch

    from unseg_hf import UnSegModel, UnSegProcessor
    from unseg_hf.training.surrogates import load_resized, sam_config_at

    model = UnSegModel.from_pretrained(options.generator)
    processor = UnSegProcessor.from_pretrained(options.generator)
    stretch = processor.stretch or options.stretch
    if options.image_size:
        config, original = copy.deepcopy(model.config), model
        config.sam_config = sam_config_at(config.sam_config, options.image_size)
        model = UnSegModel(config)
        load_resized(model, original)
        processor = UnSegProcessor.for_image_size(options.image_size)
    with torch.no_grad():
        for sign, mlp in zip(options.signs, model.noise_head.noise_mlps, strict=True):
            mlp[-1].weight *= sign
            mlp[-1].bias *= sign
    processor.stretch = stretch
    model.save_pretrained(options.output)
    processor.save_pretrained(options.output)
    print(f"generator saved to {options.output}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"adjust_generator: {error}")
