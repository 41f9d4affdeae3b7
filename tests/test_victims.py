import pytest
import torch
from torchmetrics.classification import BinaryJaccardIndex

from unseg_hf.evaluation.victims import foreground_iou, train_victim

pytestmark = pytest.mark.usefixtures("one_thread")


def discs(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reddish discs in the left half of a bluish ground: (count, 3, 32, 32) uint8 and (count, 32, 32) int64."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    row = torch.randint(8, 24, (count, 1, 1), generator=generator)
    column = torch.randint(8, 10, (count, 1, 1), generator=generator)
    radius = torch.randint(5, 8, (count, 1, 1), generator=generator)
    masks = ((rows - row) ** 2 + (columns - column) ** 2 < radius**2).long()
    images = torch.randint(90, 130, (count, 3, 32, 32), generator=generator)
    images[:, 0] += 60 * masks
    images[:, 2] += 60 * (1 - masks)
    return images.to(torch.uint8), masks


def test_foreground_iou_is_the_data_set_level_jaccard_index():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8, generator=generator)
    masks = torch.randint(0, 2, (7, 32, 32), generator=generator)
    masks[0] = 1
    masks[1:, 4:] = 0
    masks[3, :8] = 255

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(3, 2, 1)
    prediction = model(images.float() / 127.5 - 1).argmax(1)
    jaccard = BinaryJaccardIndex(ignore_index=255)
    expected = jaccard(prediction, masks).item()
    by_image = sum(jaccard(*pair).item() for pair in zip(prediction, masks, strict=True)) / 7

    measured = foreground_iou(model, images, masks, batch_size=3)
    assert measured == pytest.approx(expected, abs=1e-6)
    assert abs(measured - by_image) > 0.01


def test_victim_learns_a_coloured_disc_and_repeats_itself_without_touching_the_global_rng():
    images, masks = discs(24, seed=0)
    settings = {"epochs": 20, "batch_size": 8, "lr": 1e-2, "width": 8}
    torch.manual_seed(123)
    state = torch.get_rng_state()
    victim = train_victim(images, masks, seed=0, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    mirrored = [part.flip(-1) for part in discs(12, seed=1)]
    assert foreground_iou(victim, *mirrored) > 0.8

    settings["epochs"] = 2
    first = train_victim(images, masks, seed=0, **settings)
    torch.manual_seed(456)
    again = train_victim(images, masks, seed=0, **settings)
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name]), name
    other = train_victim(images, masks, seed=1, **settings)
    assert not torch.equal(other.classify.weight, first.classify.weight)


def test_victim_takes_many_classes_ignored_pixels_and_bfloat16():
    images, masks = discs(4, seed=0)
    masks[:, :4] = 4
    masks[:, -4:] = 255
    settings = {"epochs": 1, "batch_size": 3, "lr": 1e-3, "seed": 0, "num_classes": 5, "width": 8}
    for bf16 in (False, True):
        victim = train_victim(images, masks, bf16=bf16, **settings)
        assert all(weight.isfinite().all() for weight in victim.state_dict().values())
        assert victim(torch.zeros(2, 3, 48, 64)).shape == (2, 5, 48, 64)


def test_victim_and_its_test_refuse_what_does_not_fit():
    images, masks = torch.zeros(2, 3, 48, 32, dtype=torch.uint8), torch.zeros(2, 48, 32).long()
    for pair, message in (
        ((images[:, :, :40], masks[:, :40]), r"\(40, 32\) pixels; resize them to a multiple of 16"),
        ((images, masks[:1]), "one mask for each image"),
        ((images.float(), masks), "pass uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            train_victim(*pair, epochs=1, batch_size=2, lr=1e-3, seed=0)
    with pytest.raises(ValueError, match="no test mask has a foreground pixel"):
        foreground_iou(torch.nn.Conv2d(3, 2, 1), images, masks)
