"""Victims that segment what a box asks for: SAM and SAM-HQ, trained on boxes of the objects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, PreTrainedModel, SamHQModel, SamModel

from unseg_hf.evaluation.victims.base import (
    IGNORED,
    Batch,
    Segments,
    Victim,
    boxes_of,
    dice_loss,
    normalise,
    objects_of,
)
from unseg_hf.evaluation.victims.checkpoints import load_checkpoint, sam_config_at

PROMPTS_AT_ONCE = 16
"""The decoder repeats the image's embedding for each prompt; this bounds its memory."""
BOX_JITTER = 0.1
"""Sides of a training box are moved by up to so much of its width or height, as annotators' boxes are."""
SMALL = {
    "vision_config": {
        "patch_size": 8,
        "hidden_size": 96,
        "output_channels": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        # Windows would cut the grid of a small image, 12 cells a side at 96 pixels, too finely.
        "window_size": 0,
        "global_attn_indexes": [0, 1, 2, 3],
        "num_pos_feats": 32,
    },
    "prompt_encoder_config": {"patch_size": 8, "hidden_size": 64},
    "mask_decoder_config": {"hidden_size": 64, "mlp_dim": 128, "num_attention_heads": 4, "iou_head_hidden_dim": 64},
}
"""Sizes of the preset "small"; those of "full" are transformers' own, ViT-B's."""


def prompted_objects(labels: torch.Tensor, instances: torch.Tensor | None) -> Segments:
    """The objects of one image that are asked for: its instances, or the pixels of class 1 as one object.

    Args:
        labels: `(size, size)` as in `Batch`.
        instances: `(size, size)` as in `Batch`, or None where the data set has no objects.
    """
    return objects_of(labels, (labels == 1).long() if instances is None else instances)


class SamVictim(Victim):
    """SAM (Kirillov et al., ICCV 2023) with box prompts and one mask for each.

    From random weights everything is trained. From a checkpoint only the mask decoder is, on the frozen embeddings,
    as in most fine-tuning of SAM (MedSAM's first version, SAM-HQ's baselines).

    Args:
        task: "interactive".
        num_classes: not looked at, masks have no class.
        pretrained: a SAM checkpoint, folder or Hub id; None: random weights.
        preset: "small", or "full" for ViT-B, the size from random weights; not looked at with `pretrained`.
        image_size: side of the model's input, to which images are resized, a multiple of 8 ("small") or 16 ("full");
            None: 128 or 1024. A checkpoint keeps its own.
        things: not looked at.

    Raises:
        ValueError: `image_size` is no such multiple, or `pretrained` does not load or is of another architecture.
    """

    MODEL: ClassVar[type[PreTrainedModel]] = SamModel
    FINE_TUNED: ClassVar[tuple[str, ...]] = ("mask_decoder.",)
    """Beginnings of the names of the weights that are trained from a checkpoint."""

    size_multiple = 8
    lr = 1e-3
    pretrained_lr = 1e-4
    weight_decay = 0.01
    max_grad_norm = 1.0

    def __init__(
        self,
        *,
        task: str = "interactive",
        num_classes: int,
        pretrained: str | None = None,
        preset: str = "small",
        image_size: int | None = None,
        things: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.task = task
        self.fine_tuned = pretrained is not None
        if pretrained is None:
            self.model = self.MODEL(self._config(preset, image_size))
        else:
            self.model = load_checkpoint(self.MODEL, pretrained, (self.MODEL.config_class.model_type,))
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name.startswith(self.FINE_TUNED))
        # Nothing here asks for the predicted IoU, and the loss does not train it. The frequencies that encode
        # positions are drawn once and kept, as in the authors' code.
        self.model.mask_decoder.iou_prediction_head.requires_grad_(False)
        self.model.shared_image_embedding.requires_grad_(False)

    def loss(self, batch: Batch) -> torch.Tensor:
        """Binary cross-entropy + Dice of one random object of each image, prompted by its jittered box.

        The mean over the images that have an object; 0 if none has. Random numbers come from torch's CPU generator.
        """
        size = batch.labels.shape[-1]
        device = batch.images.device
        targets = torch.zeros_like(batch.labels, dtype=torch.bool)
        boxes = torch.tensor([0.0, 0.0, size, size], device=device).repeat(len(targets), 1)
        asked = torch.zeros(len(targets), device=device)
        for index, labels in enumerate(batch.labels):
            objects = prompted_objects(labels, None if batch.instances is None else batch.instances[index])
            if len(objects.masks):
                chosen = torch.randint(len(objects.masks), ()).item()
                targets[index] = objects.masks[chosen]
                boxes[index] = _jittered(boxes_of(targets[index, None])[0], size)
                asked[index] = 1
        embeddings = self._embeddings(batch.images)
        logits = self._masks(embeddings, boxes[:, None], size, hq_token_only=self.fine_tuned)[:, 0]
        counted = (batch.labels != IGNORED).float().flatten(1)
        logits, wanted = logits.flatten(1), targets.float().flatten(1)
        bce = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        bce = (bce * counted).sum(1) / counted.sum(1).clamp(min=1)
        dice = dice_loss(logits.sigmoid() * counted, wanted * counted)
        return ((bce + dice) * asked).sum() / asked.sum().clamp(min=1)

    def predict(self, batch: Batch) -> list[torch.Tensor]:
        """The masks of the boxes of all objects, as [`Victim.predict`] says."""
        size = batch.labels.shape[-1]
        found = []
        for index, labels in enumerate(batch.labels):
            objects = prompted_objects(labels, None if batch.instances is None else batch.instances[index])
            masks = [torch.zeros(0, size, size, dtype=torch.bool, device=labels.device)]
            if len(objects.masks):
                embeddings = self._embeddings(batch.images[index, None])
                for boxes in boxes_of(objects.masks).split(PROMPTS_AT_ONCE):
                    masks.append(self._masks(embeddings, boxes[None], size)[0] > 0)
            found.append(torch.cat(masks))
        return found

    def _embeddings(self, images: torch.Tensor) -> dict[str, Any]:
        # The models' get_image_embeddings has no gradient.
        side = self.model.config.vision_config.image_size
        if images.shape[-1] != side:
            images = F.interpolate(images, (side, side), mode="bilinear", antialias=True)
        return self._kept(self.model.vision_encoder(normalise(images)))

    def _kept(self, encoded: Any) -> dict[str, Any]:
        """What the decoder needs of the vision encoder's output, as keywords of the model."""
        return {"image_embeddings": encoded.last_hidden_state}

    def _masks(self, embeddings: dict[str, Any], boxes: torch.Tensor, size: int, **options: bool) -> torch.Tensor:
        """Logits `(batch, boxes, size, size)` for boxes `(batch, boxes, 4)` in pixels of a side `size`."""
        boxes = boxes * (self.model.config.vision_config.image_size / size)
        masks = self.model(
            input_boxes=boxes, multimask_output=False, **embeddings, **self._options(**options)
        ).pred_masks
        return F.interpolate(masks[:, :, 0].float(), (size, size), mode="bilinear")

    def _options(self, hq_token_only: bool = False) -> dict[str, bool]:
        return {}

    def _config(self, preset: str, image_size: int | None) -> PreTrainedConfig:
        sizes = {} if preset == "full" else SMALL
        config = self.MODEL.config_class(**{part: dict(values) for part, values in sizes.items()})
        side, patch = image_size or (1024 if preset == "full" else 128), config.vision_config.patch_size
        if side % patch:
            raise ValueError(f"image_size is {side}; give a multiple of {patch} to a {preset} {type(self).__name__}")
        if self.MODEL is SamHQModel:
            config.mask_decoder_config.vit_dim = config.vision_config.hidden_size
        return sam_config_at(config, side)


class SamHQVictim(SamVictim):
    """SAM-HQ (Ke et al., NeurIPS 2023): SAM with a token and fused features for finer masks.

    From random weights the sum of SAM's mask and the HQ mask is trained and predicted. From a checkpoint all of SAM
    is frozen and the HQ mask alone is trained, then added to SAM's, as in section 3 of the paper.
    """

    MODEL = SamHQModel
    FINE_TUNED = tuple(
        f"mask_decoder.{part}"
        for part in (
            "hq_token",
            "hq_mask_mlp",
            "compress_vit_",
            "encoder_conv",
            "encoder_norm",
            "mask_conv",
            "mask_norm",
        )
    )

    def _kept(self, encoded: Any) -> dict[str, Any]:
        return super()._kept(encoded) | {"intermediate_embeddings": encoded.intermediate_embeddings}

    def _options(self, hq_token_only: bool = False) -> dict[str, bool]:
        return {"hq_token_only": hq_token_only}


def _jittered(box: torch.Tensor, size: int) -> torch.Tensor:
    """A box whose four sides moved, at random, by up to `BOX_JITTER` of its width or height, inside the image."""
    sides = (box[2:] - box[:2]).repeat(2)
    shift = (torch.rand(4) * 2 - 1).to(box.device)
    return (box + BOX_JITTER * shift * sides).clamp(0, size)
