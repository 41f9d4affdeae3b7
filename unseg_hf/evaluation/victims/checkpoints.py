"""Pretrained victims and surrogates, and SAMs of other sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import SamConfig, SamHQConfig


def model_type(pretrained: str | Path) -> str:
    """The kind of model in a folder or Hub id, as its configuration names it; ValueError if there is none."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(pretrained)).model_type
    except (OSError, ValueError) as error:
        raise ValueError(
            f"pretrained is {str(pretrained)!r}, which is no transformers checkpoint that loads ({error}); "
            "give its folder or Hub id"
        ) from error


def load_checkpoint(
    model_class: Any,
    pretrained: str | Path,
    model_types: Sequence[str],
    new_parts: tuple[str, ...] = (),
    resized: tuple[str, ...] = ("classifier.",),
    **options: Any,
) -> nn.Module:
    """`model_class.from_pretrained` in float32, which refuses what is not the model.

    Args:
        model_class: class of transformers.
        pretrained: folder or Hub id.
        model_types: types of model that it may be, as their configurations name them.
        new_parts: beginnings of the names of weights that the checkpoint need not have.
        resized: parts of the names of weights that may have another shape there, those of another number of classes.
        options: passed on.

    Raises:
        ValueError: it does not load, is of another type, or misses other weights.
    """
    from safetensors import SafetensorError

    fix = f"give a checkpoint of {' or '.join(model_types)}"
    if (found := model_type(pretrained)) not in model_types:
        raise ValueError(f"pretrained is {str(pretrained)!r}, a {found}; {fix}")
    try:
        model, report = model_class.from_pretrained(
            str(pretrained), dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"pretrained is {str(pretrained)!r}, whose weights do not load ({error}); {fix}") from error
    # Weights of another shape are new as well.
    reshaped = [name for name, *_ in report["mismatched_keys"] if not any(part in name for part in resized)]
    missing = [name for name in report["missing_keys"] if not name.startswith(new_parts)]
    if lacking := sorted(missing + reshaped):
        raise ValueError(f"pretrained is {str(pretrained)!r}, which lacks weights such as {lacking[0]}; {fix}")
    return model


def sam_config_at(config: SamConfig | SamHQConfig, image_size: int) -> SamConfig | SamHQConfig:
    """A SAM's configuration at another input size, from which a model with random weights can be trained.

    Args:
        config: of any SAM or SAM-HQ; it is left as it is.
        image_size: side of the input in pixels, a multiple of the patch size.

    Raises:
        ValueError: `image_size` is no multiple of the patch size.
    """
    patch = config.vision_config.patch_size
    if image_size < patch or image_size % patch:
        raise ValueError(f"image_size={image_size}: must be a multiple of {patch}, the side of SAM's patches")
    values = config.to_dict()
    values["vision_config"] |= {
        "image_size": image_size,
        # SAM's own 1e-10 suits weights that are loaded; nothing would train from it.
        "initializer_range": 0.02,
        # Standard deviation of the random frequencies that encode positions, 1 in SAM. SamVisionConfig derives half
        # the width, with which neighbouring pixels have nothing in common. Loaded frequencies are not scaled by it.
        "scale": 1,
    }
    values["prompt_encoder_config"]["image_size"] = image_size
    del values["prompt_encoder_config"]["image_embedding_size"]  # derived from the image size
    return type(config)(**values)
