"""Convert the authors' released UnSeg weights (a .pth file) into a generator folder of this package.

    python training_scripts/convert_unseg_checkpoint.py --checkpoint unseg_vitb.pth --output_dir unseg-vit-base

The folder loads with `UnSegModel.from_pretrained`, `Protector.from_pretrained` and `pipeline("image-protection")`.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# From this package's parameter names to the released ones; every rule that matches is applied, in this order.
RENAMES = (
    (
        r"^sam\.shared_image_embedding\.positional_embedding$",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (r"^sam\.vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^sam\.vision_encoder\.", "image_encoder."),
    (r"\.patch_embed\.projection\.", ".patch_embed.proj."),
    (r"\.neck\.conv1\.", ".neck.0."),
    (r"\.neck\.layer_norm1\.", ".neck.1."),
    (r"\.neck\.conv2\.", ".neck.2."),
    (r"\.neck\.layer_norm2\.", ".neck.3."),
    (r"^sam\.prompt_encoder\.", "prompt_encoder."),
    (r"\.point_embed\.", ".point_embeddings."),
    (r"\.mask_embed\.conv1\.", ".mask_downscaling.0."),
    (r"\.mask_embed\.layer_norm1\.", ".mask_downscaling.1."),
    (r"\.mask_embed\.conv2\.", ".mask_downscaling.3."),
    (r"\.mask_embed\.layer_norm2\.", ".mask_downscaling.4."),
    (r"\.mask_embed\.conv3\.", ".mask_downscaling.6."),
    (r"^sam\.mask_decoder\.", "mask_decoder."),
    (r"\.upscale_conv1\.", ".output_upscaling.0."),
    (r"\.upscale_layer_norm\.", ".output_upscaling.1."),
    (r"\.upscale_conv2\.", ".output_upscaling.3."),
    (r"(_mlps\.\d+|_head)\.layers\.0\.", r"\1.layers.1."),
    (r"(_mlps\.\d+|_head)\.proj_in\.", r"\1.layers.0."),
    (r"(_mlps\.\d+|_head)\.proj_out\.", r"\1.layers.2."),
    (r"\.layer_norm", ".norm"),
    (r"^noise_head\.noise_tokens\.", "mask_decoder.noise_token."),
    (r"^noise_head\.noise_mlps\.(\d+)\.0\.", r"mask_decoder.noise_mlp.\1.layers.0."),
    (r"^noise_head\.noise_mlps\.(\d+)\.2\.", r"mask_decoder.noise_mlp.\1.layers.1."),
    (r"^noise_head\.noise_mlps\.(\d+)\.4\.", r"mask_decoder.noise_mlp.\1.layers.2."),
    (r"^noise_head\.encoder_fusion\.", "mask_decoder.noise_compress_vit_feat."),
    (r"^noise_head\.embedding_fusion\.", "mask_decoder.noise_embedding_encoder."),
    (r"^noise_head\.decoder_fusion\.", "mask_decoder.noise_embedding_maskfeature."),
)
NESTINGS = ("model", "state_dict")
SHOWN = 5  # names of each kind in an error


@dataclass
class ConversionArguments:
    checkpoint: str = field(
        metadata={"help": "The released .pth file: a state dict, alone or under 'model' or 'state_dict'."}
    )
    output_dir: str = field(metadata={"help": "Gets the generator and its processor; must be new or empty."})


def released_name(name: str) -> str:
    """The released checkpoint's name of one of `UnSegModel`'s parameters."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def released_config():
    """The configuration that gives the released weights the noise they give in the authors' code."""
    from unseg_hf import UnSegConfig

    return UnSegConfig(
        # SAM's two-way transformer has torch's epsilon; SamConfig's default is another one.
        sam_config={"mask_decoder_config": {"layer_norm_eps": 1e-5}},
        epsilon=8 / 255,
        epsilon_background=2 / 255,
        noise_token_offset=-1,
    )


def convert(state_dict: Mapping):
    """The generator with the released weights.

    Args:
        state_dict: the released names to tensors.

    Returns:
        `UnSegModel` in float32.

    Raises:
        ValueError: missing, unexpected or mis-shaped entries, naming the first of each.
    """
    import torch

    from unseg_hf import UnSegModel

    config = released_config()
    with torch.device("meta"):
        parameters = UnSegModel(config).state_dict()
    # The prompt encoder shares this one with the image embedding, and the released file has it once.
    del parameters["sam.prompt_encoder.shared_embedding.positional_embedding"]
    names = {released_name(name): name for name in parameters}
    problems = {
        "missing": [name for name in names if name not in state_dict],
        "unexpected": [str(name) for name in state_dict if name not in names],
        "of another shape": [
            f"{name} {_shape(state_dict[name])} instead of {_shape(parameters[new])}"
            for name, new in names.items()
            if name in state_dict and _shape(state_dict[name]) != _shape(parameters[new])
        ],
    }
    if any(problems.values()):
        raise ValueError(
            f"not the released UnSeg weights ({len(names)} tensors, SAM ViT-B): "
            + "; ".join(_listed(kind, found) for kind, found in problems.items() if found)
        )
    weights = {new: state_dict[name].float() for name, new in names.items()}
    return UnSegModel.from_pretrained(None, config=config, state_dict=weights)


def read_state_dict(path: str | Path) -> Mapping:
    """The state dict in a .pth file; no code in the file is run.

    Raises:
        ValueError: a file that is missing, is no PyTorch file of plain tensors, or holds no state dict.
    """
    from pickle import UnpicklingError

    import torch

    try:
        state_dict = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, EOFError, RuntimeError, UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as a PyTorch file of tensors: {reason}") from error
    for key in NESTINGS:
        if isinstance(state_dict, Mapping) and isinstance(state_dict.get(key), Mapping):
            state_dict = state_dict[key]
            break
    if not isinstance(state_dict, Mapping) or not all(
        isinstance(value, torch.Tensor) for value in state_dict.values()
    ):
        raise ValueError(
            f"{path} holds no state dict: pass a file with one of tensors alone, by itself or under "
            f"{' or '.join(map(repr, NESTINGS))}"
        )
    return state_dict


def _shape(tensor) -> list[int]:
    return list(tensor.shape)


def _listed(kind: str, found: list[str]) -> str:
    return f"{len(found)} {kind} ({', '.join(found[:SHOWN])}{', ...' if len(found) > SHOWN else ''})"


def main(arguments: list[str] | None = None) -> None:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(ConversionArguments, description=__doc__.splitlines()[0])
    (args,) = parser.parse_args_into_dataclasses(sys.argv[1:] if arguments is None else arguments)
    output_dir = Path(args.output_dir)
    # What a killed run left half-written may stay: saving removes it.
    if output_dir.exists() and not (
        output_dir.is_dir() and all(path.name == ".generator.partial" for path in output_dir.iterdir())
    ):
        raise SystemExit(f"--output_dir {output_dir} is not an empty folder: pass a new one")
    try:
        model = convert(read_state_dict(args.checkpoint))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    from unseg_hf import UnSegProcessor
    from unseg_hf.training.publishing import save_generator

    save_generator(model, UnSegProcessor.for_image_size(model.config.sam_config.vision_config.image_size), output_dir)
    print(f"generator saved to {output_dir}")


if __name__ == "__main__":
    main()
