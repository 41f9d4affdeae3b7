"""A MobileNetV2 as torchvision stores it, with random weights."""

import torch


def torchvision_mobilenet() -> tuple[dict[str, torch.Tensor], list[tuple[int, int, int, int]]]:
    """Random weights under torchvision's names, and (channels in, expansion, channels out, stride) of its blocks."""
    weights = {}

    def layer(convolution: str, norm: str, inputs: int, outputs: int, kernel: int, groups: int = 1) -> None:
        fan_in = inputs // groups * kernel**2
        weights[f"{convolution}.weight"] = torch.randn(outputs, inputs // groups, kernel, kernel) * (2 / fan_in) ** 0.5
        weights[f"{norm}.weight"], weights[f"{norm}.running_var"] = torch.rand(2, outputs) + 0.5
        weights[f"{norm}.bias"], weights[f"{norm}.running_mean"] = torch.randn(2, outputs) * 0.2
        weights[f"{norm}.num_batches_tracked"] = torch.tensor(7)

    layer("features.0.0", "features.0.1", 3, 32, 3)
    blocks, channels = [], 32
    for expansion, outputs, repeats, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for repeat in range(repeats):
            blocks.append((channels, expansion, outputs, stride if repeat == 0 else 1))
            name, hidden = f"features.{len(blocks)}.conv", channels * expansion
            if expansion > 1:
                layer(f"{name}.0.0", f"{name}.0.1", channels, hidden, 1)
            depthwise = int(expansion > 1)
            layer(f"{name}.{depthwise}.0", f"{name}.{depthwise}.1", hidden, hidden, 3, groups=hidden)
            layer(f"{name}.{depthwise + 1}", f"{name}.{depthwise + 2}", hidden, outputs, 1)
            channels = outputs
    layer("features.18.0", "features.18.1", 320, 1280, 1)
    weights["classifier.1.weight"], weights["classifier.1.bias"] = torch.randn(10, 1280), torch.randn(10)
    return weights, blocks
