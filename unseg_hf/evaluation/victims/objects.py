"""Victims that find objects: mask classification (Mask2Former, MaskFormer) and detection (RT-DETR v2, D-FINE)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from transformers import (
    DetrConfig,
    DFineForObjectDetection,
    HGNetV2Config,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    PreTrainedConfig,
    PreTrainedModel,
    RTDetrResNetConfig,
    RTDetrV2ForObjectDetection,
    SwinConfig,
)
from transformers.utils import ModelOutput

from unseg_hf.evaluation.victims.base import (
    FOUR_STAGES,
    IGNORED,
    Batch,
    Segments,
    Victim,
    boxes_of,
    normalise,
    objects_of,
    segments_of,
)
from unseg_hf.evaluation.victims.checkpoints import load_checkpoint

MAX_OBJECTS = 100
"""Most objects predicted in an image, as COCO counts no more."""
SURE = 0.5
"""Segments of a panoptic map have at least this class probability, and their pixels this mask probability."""
VISIBLE = 0.8
"""Segments of a panoptic map of which less than this share is left by better ones are dropped."""
VOID_LOGIT = -10.0


class _ObjectVictim(Victim):
    """A transformers model whose outputs are numbered by the classes that it tells apart.

    Args:
        task: what it does, of those that `victims_for` lists it for.
        num_classes: classes of the labels.
        pretrained: checkpoint, folder or Hub id; its class layer is made anew where its size differs. None: random
            weights.
        preset: "small" or "full", the size from random weights; not looked at with `pretrained`.
        image_size: not looked at; any size that `size_multiple` divides will do.
        things: ids of the classes that have objects.

    Raises:
        ValueError: no `things` in a task of objects, or `pretrained` does not load or is of another architecture.
        ImportError: scipy, which the models' losses need, is not installed.
    """

    MODEL: ClassVar[type[PreTrainedModel]]

    def __init__(
        self,
        *,
        task: str,
        num_classes: int,
        pretrained: str | None = None,
        preset: str = "small",
        image_size: int | None = None,
        things: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if task in ("instance", "detection") and not len(things):
            raise ValueError(
                f"things is {things}, but {task} needs classes with objects; give their ids, such as (1,)"
            )
        self.task = task
        told_apart = list(things) if task in ("instance", "detection") else list(range(num_classes))
        self.register_buffer("class_ids", torch.tensor(told_apart), persistent=False)
        self.register_buffer("things", torch.tensor(list(things), dtype=torch.int64), persistent=False)
        if pretrained is None:
            self.model = self.MODEL(self._config(preset, len(told_apart)))
        else:
            self.model = _loaded(self.MODEL, pretrained, len(told_apart))

    @staticmethod
    def _config(preset: str, num_labels: int) -> PreTrainedConfig:
        raise NotImplementedError

    def _numbers(self, classes: torch.Tensor) -> torch.Tensor:
        """The model's numbers of class ids."""
        same = classes[:, None] == self.class_ids
        unknown = classes[~same.any(1)]
        if len(unknown):
            raise ValueError(
                f"an object has class {unknown[0].item()}, the victim was made for {self.class_ids.tolist()}; name "
                "the classes of all objects in things"
            )
        return same.int().argmax(1)

    def _instances(self, batch: Batch) -> torch.Tensor:
        if batch.instances is None:
            raise ValueError(f"the images have no instances, which {self.task} needs; give a map of object numbers")
        return batch.instances


class _MaskClassifier(_ObjectVictim):
    weight_decay = 0.05

    def __init__(self, **arguments) -> None:
        super().__init__(**arguments)
        # The models' own count is a mean over the processes of accelerate, each of which trains its own victim here
        # and would wait for the others.
        self.model.criterion.get_num_masks = _count_masks

    def loss(self, batch: Batch) -> torch.Tensor:
        """The model's own loss: cross-entropy, mask and Dice loss of the queries that match segments.

        Pixels without a class, and those of a thing class in no object (crowds), are left out to within a cell of the
        mask logits, 4 x 4 pixels: no segment has them, and the logits there are a constant that says so.
        """
        masks, classes, void = [], [], []
        instances = torch.zeros_like(batch.labels) if self.task == "semantic" else self._instances(batch)
        for labels, numbers in zip(batch.labels, instances, strict=True):
            segments = segments_of(labels, numbers)
            if self.task != "semantic":
                segments = _chosen(segments, segments.is_thing | ~torch.isin(segments.classes, self.things))
            void.append(~segments.masks.any(0))
            if self.task == "instance":
                segments = _chosen(segments, segments.is_thing)
            masks.append(segments.masks.float())
            classes.append(self._numbers(segments.classes))
        outputs = self._outputs(batch)

        height, width = outputs.masks_queries_logits.shape[-2:]
        void_cells = F.adaptive_max_pool2d(torch.stack(void)[:, None].float(), (height, width))
        void = F.interpolate(void_cells, batch.labels.shape[-2:])
        for index, empty in enumerate(void):
            masks[index] = masks[index] * (1 - empty)
            # Of a small object beside pixels without a class nothing may be left to learn from.
            left = masks[index].flatten(1).any(1)
            masks[index], classes[index] = masks[index][left], classes[index][left]

        def counted(logits: torch.Tensor) -> torch.Tensor:
            return logits.float().masked_fill(void_cells.bool(), VOID_LOGIT)

        layers = [
            {
                "masks_queries_logits": counted(layer["masks_queries_logits"]),
                "class_queries_logits": layer["class_queries_logits"].float(),
            }
            for layer in outputs.auxiliary_logits or []
        ]
        # The losses sample masks at float32 points, which a 16-bit context would make the logits unfit for.
        with torch.autocast(batch.images.device.type, enabled=False):
            losses = self.model.get_loss_dict(
                counted(outputs.masks_queries_logits), outputs.class_queries_logits.float(), masks, classes, layers
            )
        return sum(losses.values())

    def predict(self, batch: Batch) -> list:
        """As [`Victim.predict`] says; see the functions of the tasks for how."""
        outputs = self._outputs(batch)
        size = batch.labels.shape[-2:]
        found = {"semantic": self._class_map, "instance": self._objects, "panoptic": self._panoptic_map}[self.task]
        return [
            found(classes.float().softmax(-1)[:, :-1], F.interpolate(masks[None].float(), size, mode="bilinear")[0])
            for classes, masks in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True)
        ]

    def _outputs(self, batch: Batch) -> ModelOutput:
        # MaskFormer makes its auxiliary logits from hidden states, and fails without them.
        return self.model(normalise(batch.images), output_hidden_states=True, output_auxiliary_logits=True)

    def _class_map(self, probabilities: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Masks weighted by their class probabilities (MaskFormer, section 3.4)."""
        return torch.einsum("qc,qhw->chw", probabilities, logits.sigmoid()).argmax(0)

    def _objects(self, probabilities: torch.Tensor, logits: torch.Tensor) -> dict[str, torch.Tensor]:
        """The surest pairs of a query and a class; score: class probability x mean probability inside the mask."""
        scores, best = probabilities.flatten().topk(min(MAX_OBJECTS, probabilities.numel()))
        logits = logits[best // probabilities.shape[1]]
        masks = logits > 0
        area = masks.sum((1, 2))
        scores = scores * (logits.sigmoid() * masks).sum((1, 2)) / area.clamp(min=1)
        there = area > 0
        labels = self.class_ids[best % probabilities.shape[1]]
        return {"masks": masks[there], "labels": labels[there], "scores": scores[there]}

    def _panoptic_map(self, probabilities: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Each pixel goes to the query with the best class x mask probability (MaskFormer, section 3.4)."""
        scores, classes = probabilities.max(1)
        sure = scores > SURE
        scores, classes, masks = scores[sure], classes[sure], logits[sure].sigmoid()
        result = torch.zeros(*logits.shape[1:], 2, dtype=torch.int64, device=logits.device)
        result[..., 0] = IGNORED
        if not len(scores):
            return result
        owner = (scores[:, None, None] * masks).argmax(0)
        stuff: dict[int, int] = {}
        for query, label in enumerate(classes.tolist()):
            whole = masks[query] >= SURE
            left = whole & (owner == query)
            if left.any() and left.sum() >= VISIBLE * whole.sum():
                number = query + 1 if label in self.things else stuff.setdefault(label, query + 1)
                result[left] = torch.tensor([label, number], device=result.device)
        return result


class Mask2FormerVictim(_MaskClassifier):
    """Mask2Former (Cheng et al., CVPR 2022); "full" has the published sizes with Swin-T."""

    MODEL = Mask2FormerForUniversalSegmentation
    lr = 5e-4
    pretrained_lr = 1e-4
    max_grad_norm = 1.0

    @staticmethod
    def _config(preset: str, num_labels: int) -> Mask2FormerConfig:
        if preset == "full":
            return Mask2FormerConfig(backbone_config=_swin_tiny(), num_labels=num_labels)
        return Mask2FormerConfig(
            backbone_config=_small_swin(),
            num_labels=num_labels,
            feature_size=64,
            mask_feature_size=64,
            hidden_dim=64,
            encoder_feedforward_dim=128,
            encoder_layers=2,
            decoder_layers=4,
            num_attention_heads=4,
            dim_feedforward=128,
            num_queries=30,
            # At 128 pixels the mask logits have 1024 cells.
            train_num_points=1024,
        )


class MaskFormerVictim(_MaskClassifier):
    """MaskFormer (Cheng et al., NeurIPS 2021); "full" has the published sizes with Swin-T.

    From random weights it needs ten times the steps of Mask2Former.
    """

    MODEL = MaskFormerForInstanceSegmentation
    lr = 3e-4
    pretrained_lr = 1e-4
    max_grad_norm = 1.0

    @staticmethod
    def _config(preset: str, num_labels: int) -> MaskFormerConfig:
        if preset == "full":
            return MaskFormerConfig(
                backbone_config=_swin_tiny(),
                decoder_config=DetrConfig(),
                num_labels=num_labels,
                use_auxiliary_loss=True,
            )
        return MaskFormerConfig(
            backbone_config=_small_swin(),
            decoder_config=DetrConfig(
                d_model=64,
                decoder_layers=3,
                decoder_ffn_dim=128,
                decoder_attention_heads=4,
                num_queries=30,
                dropout=0.0,
            ),
            num_labels=num_labels,
            use_auxiliary_loss=True,
            fpn_feature_size=64,
            mask_feature_size=64,
        )


class _Detector(_ObjectVictim):
    """A detector whose small preset is `SMALL_DETECTOR` on a small backbone, and whose full one has `FULL`."""

    FULL: ClassVar[dict[str, list[int]]] = {}
    weight_decay = 1e-4
    max_grad_norm = 0.1

    @classmethod
    def _config(cls, preset: str, num_labels: int) -> PreTrainedConfig:
        return cls.MODEL.config_class(
            backbone_config=cls._backbone(preset),
            num_labels=num_labels,
            freeze_backbone_batch_norms=False,  # which suits a pretrained backbone alone
            **(cls.FULL if preset == "full" else SMALL_DETECTOR),
        )

    @staticmethod
    def _backbone(preset: str) -> PreTrainedConfig:
        raise NotImplementedError

    def loss(self, batch: Batch) -> torch.Tensor:
        """The model's own loss, contrastive denoising included.

        Pixels without a class have no part in it, as an object without any other is left out; what a query finds
        among them counts as false.
        """
        size = batch.labels.shape[-1]
        targets = []
        for labels, instances in zip(batch.labels, self._instances(batch), strict=True):
            objects = objects_of(labels, instances)
            x0, y0, x1, y1 = (boxes_of(objects.masks) / size).unbind(1)
            boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], dim=1)
            targets.append({"class_labels": self._numbers(objects.classes), "boxes": boxes})
        return self.model(batch.images, labels=targets).loss

    def predict(self, batch: Batch) -> list[dict[str, torch.Tensor]]:
        """The surest pairs of a query and a class; boxes are cut at the edges of the image."""
        outputs = self.model(batch.images)
        size = batch.labels.shape[-1]
        found = []
        for logits, boxes in zip(outputs.logits.float(), outputs.pred_boxes.float(), strict=True):
            scores, best = logits.sigmoid().flatten().topk(min(MAX_OBJECTS, logits.numel()))
            centre, sides = boxes[best // logits.shape[1]].split(2, dim=1)
            corners = torch.cat([centre - sides / 2, centre + sides / 2], dim=1).clamp(0, 1) * size
            found.append({"boxes": corners, "labels": self.class_ids[best % logits.shape[1]], "scores": scores})
        return found


class RTDetrVictim(_Detector):
    """RT-DETR v2 (Lv et al., 2024); "full" has the published sizes with ResNet-50."""

    MODEL = RTDetrV2ForObjectDetection
    lr = 1e-3
    pretrained_lr = 1e-4

    @staticmethod
    def _backbone(preset: str) -> RTDetrResNetConfig:
        if preset == "full":
            return RTDetrResNetConfig(out_features=FOUR_STAGES[1:])
        return RTDetrResNetConfig(
            embedding_size=32,  # the basic layers of the first stage keep the width
            hidden_sizes=[32, 64, 96, 128],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            out_features=FOUR_STAGES[1:],
        )


class DFineVictim(_Detector):
    """D-FINE (Peng et al., ICLR 2025); "full" has the published sizes of D-FINE-L."""

    MODEL = DFineForObjectDetection
    lr = 1e-3
    pretrained_lr = 1e-4

    FULL: ClassVar[dict[str, list[int]]] = {"decoder_n_points": [3, 6, 3]}

    @staticmethod
    def _backbone(preset: str) -> HGNetV2Config:
        if preset == "full":
            return HGNetV2Config(out_features=FOUR_STAGES[1:])
        return HGNetV2Config(
            stem_channels=[3, 16, 16],
            stage_in_channels=[16, 32, 64, 96],
            stage_mid_channels=[16, 32, 32, 48],
            stage_out_channels=[32, 64, 96, 128],
            hidden_sizes=[32, 64, 96, 128],
            stage_num_blocks=[1, 1, 1, 1],
            stage_numb_of_layers=[3, 3, 3, 3],
            stage_kernel_size=[3, 3, 3, 3],
            use_learnable_affine_block=True,
            out_features=FOUR_STAGES[1:],
        )


SMALL_DETECTOR = {
    "encoder_in_channels": [64, 96, 128],
    "encoder_hidden_dim": 64,
    "encoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "hidden_expansion": 0.5,
    "d_model": 64,
    "num_queries": 60,
    "decoder_in_channels": [64, 64, 64],
    "decoder_ffn_dim": 128,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "num_denoising": 40,
}


def _loaded(model_class: type[PreTrainedModel], pretrained: str, num_labels: int) -> PreTrainedModel:
    """A checkpoint in float32, with new class layers where it has other classes."""
    model = load_checkpoint(
        model_class,
        pretrained,
        (model_class.config_class.model_type,),
        resized=("",),  # any of them
        num_labels=num_labels,
        ignore_mismatched_sizes=True,
    )
    if hasattr(model, "criterion"):
        # transformers leaves a buffer of another size as it finds it in memory.
        weight = torch.ones(num_labels + 1)
        weight[-1] = model.config.no_object_weight
        model.criterion.empty_weight = weight
    return model


def _swin_tiny() -> SwinConfig:
    return SwinConfig(drop_path_rate=0.3, out_features=FOUR_STAGES)


def _small_swin() -> SwinConfig:
    return SwinConfig(
        embed_dim=32, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], window_size=6, drop_path_rate=0.0,
        out_features=FOUR_STAGES,
    )  # fmt: skip


def _chosen(segments: Segments, keep: torch.Tensor) -> Segments:
    return Segments(segments.masks[keep], segments.classes[keep], segments.is_thing[keep])


def _count_masks(class_labels: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.tensor(max(1.0, sum(map(len, class_labels))), device=device)
