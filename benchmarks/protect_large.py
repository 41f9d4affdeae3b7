"""One image through a generator of the paper's size, for `speed.py large`: prints seconds, those of the second time.

python benchmarks/protect_large.py make FOLDER
python benchmarks/protect_large.py stock FOLDER photo.jpg OUT.png --threads 2
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from transformers import SamModel
from transformers.models.sam.modeling_sam import SamVisionEncoderOutput

from unseg_hf import Protector, UnSegConfig, UnSegModel, UnSegProcessor, image_files


def make(folder: Path) -> None:
    """SAM ViT-B at 1024 px with random weights, whose noise has all levels, as a trained one's may."""
    torch.manual_seed(0)
    generator = UnSegModel(UnSegConfig())
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                parameter.normal_(0, 0.1)
            elif "vision_encoder" in name and parameter.ndim > 1:
                parameter.normal_(0, 0.02)  # SAM's own 1e-10 would make every image look the same
        for mlp in generator.noise_head.noise_mlps:
            mlp[-1].weight *= 10
    generator.save_pretrained(folder)
    UnSegProcessor.for_image_size(1024).save_pretrained(folder)


class OneLayerKept(nn.Module):
    """An encoder as it is, which hands out what one of its layers makes, as the generator asks for it."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: torch.Tensor, layer: int) -> SamVisionEncoderOutput:
        kept = []
        hook = self.encoder.layers[layer - 1].register_forward_hook(lambda *call: kept.append(call[-1]))
        encoded = self.encoder(pixel_values)
        hook.remove()
        return SamVisionEncoderOutput(last_hidden_state=encoded.last_hidden_state, hidden_states=tuple(kept))


def take_stock_sam(generator: UnSegModel) -> None:
    """Transformers' own SAM, with the same weights, in place of the package's."""
    with torch.device("meta"):
        sam = SamModel._from_config(generator.config.sam_config)
    sam.load_state_dict(generator.sam.state_dict(), assign=True)
    sam.vision_encoder = OneLayerKept(sam.vision_encoder)
    generator.sam = sam.eval()


def protect(way: str, folder: Path, photo: Path, output: Path) -> float:
    """Seconds for one image. `stock` has transformers' own SAM, `bf16` products in bfloat16."""
    protector = Protector.from_pretrained(folder, bf16=way == "bf16")
    if way == "stock":
        take_stock_sam(protector.model)
    protector.protect(photo, whole_image=True)
    start = time.perf_counter()
    protected = protector.protect(photo, whole_image=True)
    seconds = time.perf_counter() - start
    image_files.write(protected.picture, output)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("way", choices=("make", "stock", "parts", "bf16"))
    parser.add_argument("folder", type=Path, help="of the generator")
    parser.add_argument("photo", type=Path, nargs="?")
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way == "make":
        make(options.folder)
    else:
        print(protect(options.way, options.folder, options.photo, options.output))


if __name__ == "__main__":
    main()
