"""What a photo is of, found without a prompt, for generators whose SAM is too small to propose anything."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import MobileNetV2Config, MobileNetV2Model

OUTPUT_STRIDE = 16  # of the backbone's last features
LAYERS = 11  # of MobileNetV2's 16 blocks: the rest has three quarters of the weights
SKIPS = (1, 4)  # the last blocks at a quarter and at an eighth of the input's size
BELOW_MOST = 1.0  # where no cell is likely: those up to so much below the likeliest, so that something is found
SURE = 3.0  # logit that the likeliest cell of photos of something has, and of what the finder does not know often not
SMALLEST = 0.002  # share of the image: what is smaller, and apart, is no object


def mobilenet(depth_multiplier: float = 1.0) -> MobileNetV2Model:
    """MobileNetV2 (Sandler et al., CVPR 2018) with new weights, padded and normalised as torchvision's."""
    config = MobileNetV2Config(
        depth_multiplier=depth_multiplier, output_stride=OUTPUT_STRIDE, tf_padding=False, layer_norm_eps=1e-5
    )
    return MobileNetV2Model(config, add_pooling_layer=False)


class ObjectFinder(nn.Module):
    """Says of each pixel whether it belongs to what a photo is of: the first blocks of MobileNetV2 and a decoder.

    MobileNetV2: Sandler et al., CVPR 2018; the decoder adds features of a sixteenth, an eighth and a quarter of the
    input's size, as in feature pyramids (Lin et al., CVPR 2017).

    Args:
        width: channels of the decoder.
    """

    def __init__(self, width: int):
        super().__init__()
        self.backbone = mobilenet()
        self.backbone.layer = self.backbone.layer[:LAYERS]
        self.backbone.conv_1x1 = nn.Identity()
        *skips, last = (self.backbone.layer[i].reduce_1x1.convolution.out_channels for i in (*SKIPS, LAYERS - 1))
        self.whole = nn.Linear(last, width)
        self.lateral = nn.ModuleList(_convolution(channels, width) for channels in (last, *reversed(skips)))
        self.smooth = nn.ModuleList(
            nn.Sequential(_convolution(width, width, 5, groups=width), _convolution(width, width))
            for _ in self.lateral
        )
        self.logits = nn.Conv2d(width, 1, 1)
        for module in self.backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # torch's; transformers has TensorFlow's 0.997, which here keeps the last batch

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`(batch, 3, height, width)` to logits `(batch, 1, height / 4, width / 4)`, above 0 where an object is
        likelier than not."""
        features = self.backbone(pixel_values, output_hidden_states=True).hidden_states
        decoded = self.whole(features[-1].mean((2, 3)))[:, :, None, None]
        for skip, lateral, smooth in zip((-1, *reversed(SKIPS)), self.lateral, self.smooth, strict=True):
            size = features[skip].shape[2:]
            decoded = smooth(lateral(features[skip]) + F.interpolate(decoded, size, mode="bilinear"))
        return self.logits(decoded)


@torch.no_grad()
def find_objects(finder: ObjectFinder, pixel_values: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """What one image is of.

    Args:
        finder: in evaluation mode.
        pixel_values: `(1, 3, side, side)`, as `UnSegProcessor` prepares it, stretched.

    Returns:
        Logits `(objects, side / 4, side / 4)`, one object or more, largest first, above 0 inside, on the CPU; and
        whether it is sure that this is what the image is of.

    Raises:
        FloatingPointError: the logits are not finite.
    """
    # On a graphics card each of the many small questions below would wait for the answer to the one before.
    logits = finder(pixel_values)[0, 0].float().cpu()
    if not torch.isfinite(logits).all():
        raise FloatingPointError("what the object finder says is not finite: its weights are damaged")
    objects = objects_apart(above_threshold(logits))
    return objects, bool(logits.max() >= SURE and (objects[0] > 0).float().mean() >= SMALLEST)


def above_threshold(logits: torch.Tensor) -> torch.Tensor:
    """Logits `(..., height, width)` moved so that what is to be protected is above 0; of each image something is."""
    return logits - (logits.amax((-2, -1), keepdim=True) - BELOW_MOST).clamp(max=0)


def objects_apart(logits: torch.Tensor) -> torch.Tensor:
    """What an image shows, one by one.

    Args:
        logits: `(height, width)`, above 0 in all objects.

    Returns:
        `(objects, height, width)`, largest first: above 0 in the cells of one object that touch each other.
    """
    left, objects = logits > 0, []
    while left.any():
        one = torch.zeros_like(left)
        one.view(-1)[left.view(-1).nonzero()[0]] = True
        while (grown := _grown(one) & left).sum() > one.sum():
            one = grown
        objects.append(one)
        left = left & ~one
    objects.sort(key=lambda one: -int(one.sum()))
    objects = [one for one in objects if one.float().mean() >= SMALLEST] or objects[:1]
    # Beside the object everything keeps its value, on which the outline depends when it is enlarged.
    return torch.stack([torch.where((logits > 0) & ~one, -logits, logits) for one in objects])


def _grown(cells: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(cells[None].float(), 3, stride=1, padding=1)[0] > 0


def _convolution(channels: int, out: int, kernel: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, kernel, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU(inplace=True))
