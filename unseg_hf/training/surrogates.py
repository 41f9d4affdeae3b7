"""Surrogate segmenters: what the generator's noise is trained against."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import SamConfig, SamModel, ViTMAEModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..evaluation.victims import build_victim
from ..evaluation.victims.checkpoints import load_checkpoint, sam_config_at
from ..evaluation.victims.unet import SIZE_MULTIPLE, UNet

VICTIM_SURROGATES = ("unet", "unetpp", "segformer", "upernet", "deeplabv3plus")
"""Victims of the audit with logits for every pixel; the others find segments."""


class SamSurrogate(nn.Module):
    """SAM's architecture from scratch, prompted, as in UnSeg; one mask a prompt.

    Args:
        config: sizes; `image_size` of `vision_config` may differ from the generator's, see `sam_config_at`.
        prompt_size: side of the square whose pixels the prompts count, the generator's input.
    """

    def __init__(self, config: SamConfig, prompt_size: int):
        super().__init__()
        self.prompt_size = prompt_size
        self.sam = SamModel(config)
        # Read, but outside the surrogate's loss: left trainable, they would be unused parameters under DDP.
        self.sam.mask_decoder.iou_prediction_head.requires_grad_(False)
        self.sam.shared_image_embedding.requires_grad_(False)

    @classmethod
    def from_checkpoint(cls, checkpoint: str, image_size: int, prompt_size: int) -> "SamSurrogate":
        """A pretrained SAM at another input size.

        The position embedding and the relative positions of the global layers are interpolated, everything else is
        loaded as it is.

        Args:
            checkpoint: a SAM checkpoint, folder or Hub id.
            image_size: side of the surrogate's input in pixels, a multiple of the patch size.
            prompt_size: side of the square whose pixels the prompts count, the generator's input.

        Raises:
            ValueError: `image_size` is no multiple of the patch size, or the checkpoint is not a SAM.
        """
        original = load_checkpoint(SamModel, checkpoint, ("sam",))
        surrogate = cls(sam_config_at(original.config, image_size), prompt_size)
        load_resized(surrogate.sam, original)
        return surrogate

    def forward(self, images: torch.Tensor, prompts: dict[str, torch.Tensor]) -> torch.Tensor:
        """`(batch, 3, h, w)` normalised images to logits `(batch, h', w')`; prompts in pixels of `prompt_size`."""
        size = self.sam.config.vision_config.image_size
        factor = size / self.prompt_size
        prompts = {k: v * factor if k in ("input_points", "input_boxes") else v for k, v in prompts.items()}
        masks = prompts.pop("input_masks", None)
        if masks is not None:
            side = 4 * self.sam.config.prompt_encoder_config.image_embedding_size
            masks = nn.functional.interpolate(masks, (side, side), mode="area") * 255
        return self.sam(_resized(images, size), input_masks=masks, multimask_output=False, **prompts).pred_masks[
            :, 0, 0
        ]


class UNetSurrogate(nn.Module):
    """A small U-Net that sees no prompt: what it knows of the mask, it reads from the picture or the noise.

    Args:
        width: channels at half resolution.
        image_size: the square that images are resized to, a multiple of 16.

    Raises:
        ValueError: `image_size` is no multiple of 16.
    """

    def __init__(self, width: int, image_size: int):
        super().__init__()
        if image_size % SIZE_MULTIPLE:
            raise ValueError(f"surrogate size {image_size}: a U-Net needs a multiple of {SIZE_MULTIPLE}")
        self.unet, self.image_size = UNet(num_classes=1, width=width), image_size

    def forward(self, images: torch.Tensor, prompts: dict[str, torch.Tensor]) -> torch.Tensor:
        """`(batch, 3, h, w)` normalised images to logits `(batch, h', w')`; the prompts are not looked at."""
        return self.unet(_resized(images, self.image_size))[:, 0]


class VictimSurrogate(nn.Module):
    """One of the audit's semantic victims as a surrogate; it sees no prompt.

    Noise that was trained against one architecture alone need not reach others: several stand side by side.

    Args:
        name: of [`VICTIM_SURROGATES`], alone or as `name@checkpoint`, folder or Hub id.
        image_size: the square that images are resized to.

    Raises:
        ValueError: another victim, a checkpoint that does not load, or a size that the victim cannot take.
    """

    def __init__(self, name: str, image_size: int):
        super().__init__()
        name, _, checkpoint = name.partition("@")
        if name not in VICTIM_SURROGATES:
            raise ValueError(f"surrogate {name!r}: must be sam, or a victim of {', '.join(VICTIM_SURROGATES)}")
        self.victim = build_victim(name, "semantic", 2, pretrained=checkpoint or None, image_size=image_size)
        self.image_size = image_size
        if image_size % self.victim.size_multiple:
            raise ValueError(f"surrogate size {image_size}: {name} needs a multiple of {self.victim.size_multiple}")

    def forward(self, images: torch.Tensor, prompts: dict[str, torch.Tensor]) -> torch.Tensor:
        """`(batch, 3, h, w)` normalised images to logits `(batch, h', w')`; the prompts are not looked at."""
        mean, std = (images.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        logits = self.victim(_resized(images, self.image_size) * std + mean)
        # The logit of a foreground of two classes is the difference of theirs.
        return logits[:, 1] - logits[:, 0]


class Surrogates(nn.ModuleList):
    """Surrogates that see the same images and prompts; a single one is the list of one.

    Args:
        builders: each makes one surrogate, from torch's global random numbers where it makes weights.

    Raises:
        ValueError: a surrogate in place of what makes one.
    """

    def __init__(self, builders: Iterable[Callable[[], nn.Module]]):
        self._builders = list(builders)
        if built := next((one for one in self._builders if isinstance(one, nn.Module)), None):
            kind = type(built).__name__
            raise ValueError(f"a {kind} was given: pass functions that make one, as lambda: {kind}(...)")
        super().__init__(build() for build in self._builders)

    def restart(self, index: int, seed: int, optimizer: torch.optim.Optimizer) -> None:
        """One surrogate begins anew, as its builder makes it with this seed; the optimizer forgets its moments.

        The parameters stay the same objects, so that whoever holds them (optimizer, data-parallel wrapper) goes on.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not those of other devices, which draw dropout
            fresh = self._builders[index]()
        self[index].load_state_dict(fresh.state_dict())
        for parameter in self[index].parameters():
            optimizer.state.pop(parameter, None)

    def forward(self, images: torch.Tensor, prompts: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """`(batch, 3, h, w)` normalised images to logits `(batch, h', w')` of each surrogate, h' and w' its own."""
        return [surrogate(images, prompts) for surrogate in self]


def checkpoint_activations(network: nn.Module) -> None:
    """In training, activations inside the layers of SAM encoders are computed again in the backward pass, not kept."""
    for module in network.modules():
        if isinstance(module, SamModel):
            module.activation_checkpointing_enable({"use_reentrant": False})


@contextmanager
def frozen(surrogate: nn.Module) -> Iterator[nn.Module]:
    """Nothing of the surrogate changes inside: no gradients, no running statistics; outputs are as without it.

    Everything is restored at the end. The backward pass belongs inside too: checkpointed activations are computed in
    it, by the same rules as in the forward pass.
    """
    parameters = [(parameter, parameter.requires_grad) for parameter in surrogate.parameters()]
    norms = [(module, module.track_running_stats) for module in surrogate.modules() if isinstance(module, _BatchNorm)]
    try:
        for parameter, _ in parameters:
            parameter.requires_grad_(False)
        for norm, _ in norms:
            # Not a momentum of 0, with which the count of batches would still go on.
            norm.track_running_stats = False
        yield surrogate
    finally:
        for parameter, required in parameters:
            parameter.requires_grad_(required)
        for norm, tracked in norms:
            norm.track_running_stats = tracked


def load_resized(model: nn.Module, original: nn.Module) -> None:
    """Load the weights of the same model at another input size; tables of positions are interpolated."""
    weights = original.state_dict()
    for name, new in model.state_dict().items():
        if weights[name].shape != new.shape:
            resize = _resized_grid if name.endswith("pos_embed") else _resized_table
            weights[name] = resize(weights[name], new.shape)
    model.load_state_dict(weights)


@torch.no_grad()
def load_mae_encoder(surrogate: SamSurrogate, checkpoint: str) -> None:
    """Start a surrogate's vision encoder from the encoder of a masked autoencoder (MAE), as the authors' code does.

    The grid of position embeddings is interpolated; relative positions and the neck, which MAE has not, stay as they
    are.

    Args:
        surrogate: its encoder is changed in place.
        checkpoint: a ViT-MAE checkpoint such as `facebook/vit-mae-base`, folder or Hub id.

    Raises:
        ValueError: the two encoders differ in size, or the checkpoint is not a ViT-MAE.
    """
    mae, encoder = load_checkpoint(ViTMAEModel, checkpoint, ("vit_mae",)), surrogate.sam.vision_encoder
    theirs, ours = mae.config, encoder.config
    for name, value, needed in (
        ("width", theirs.hidden_size, ours.hidden_size),
        ("number of layers", theirs.num_hidden_layers, ours.num_hidden_layers),
        ("number of attention heads", theirs.num_attention_heads, ours.num_attention_heads),
        ("MLP width", theirs.intermediate_size, ours.mlp_dim),
        ("patch size", theirs.patch_size, ours.patch_size),
        ("bias of queries, keys and values", theirs.qkv_bias, ours.qkv_bias),
        ("absolute position embedding", True, ours.use_abs_pos),
    ):
        if value != needed:
            raise ValueError(
                f"{name}: {value} in {checkpoint}, {needed} in the surrogate's encoder; choose another MAE, or give "
                "the surrogate the sizes of this one"
            )

    encoder.patch_embed.projection.load_state_dict(mae.embeddings.patch_embeddings.projection.state_dict())
    positions = mae.embeddings.position_embeddings[:, 1:]  # without the class token's
    side = round(positions.shape[1] ** 0.5)
    encoder.pos_embed.copy_(_resized_grid(positions.unflatten(1, (side, side)), encoder.pos_embed.shape))
    for layer, source in zip(encoder.layers, mae.layers, strict=True):
        projections = [source.attention.q_proj, source.attention.k_proj, source.attention.v_proj]
        layer.attn.qkv.weight.copy_(torch.cat([projection.weight for projection in projections]))
        if ours.qkv_bias:
            layer.attn.qkv.bias.copy_(torch.cat([projection.bias for projection in projections]))
        for module, other in (
            (layer.attn.proj, source.attention.o_proj),
            (layer.layer_norm1, source.layernorm_before),
            (layer.layer_norm2, source.layernorm_after),
            (layer.mlp.lin1, source.mlp.fc1),
            (layer.mlp.lin2, source.mlp.fc2),
        ):
            module.load_state_dict(other.state_dict())


def _resized_grid(grid: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Position embeddings `(1, height, width, channels)`, interpolated to `shape`."""
    size = shape[1:3]
    return nn.functional.interpolate(grid.permute(0, 3, 1, 2), size, mode="bicubic").permute(0, 2, 3, 1)


def _resized_table(table: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Relative positions `(2 * grid - 1, channels)`, interpolated to `shape` as SAM does where lengths differ."""
    return nn.functional.interpolate(table.T.unsqueeze(0), shape[0], mode="linear")[0].T


def _resized(images: torch.Tensor, size: int) -> torch.Tensor:
    return nn.functional.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)
