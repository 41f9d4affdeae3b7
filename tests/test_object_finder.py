"""What a photo is of is found and protected without a prompt; clicks choose from it; masks teach the finder."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_discs import discs, encoded, write_discs, write_parquet
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision_mobilenet import torchvision_mobilenet

from unseg_hf import Protector, UnSegModel, UnSegProcessor
from unseg_hf.object_finder import BELOW_MOST, ObjectFinder, above_threshold, find_objects, objects_apart
from unseg_hf.protection import ALL_OVER, UNSURE

SCRIPT = Path(__file__).parent.parent / "training_scripts" / "train_object_finder.py"


class RedFinder(torch.nn.Module):
    """Takes for an object what is redder than blue, as sure as the difference is large."""

    def forward(self, pixel_values):
        return 4 * torch.nn.functional.avg_pool2d(pixel_values[:, :1] - pixel_values[:, 2:], 4)


@pytest.fixture
def finding(protector_of):
    """A protector that finds what is red, with images stretched to its input of 64 pixels."""
    protector = protector_of()
    protector.model.object_finder = RedFinder()
    processor = UnSegProcessor(protector.processor.image_processor, stretch=True)
    return Protector(protector.model, processor)


def scene(*boxes, red=200, size=(128, 192)):
    """A blue photo with red boxes `(top, bottom, left, right)`, and where they are."""
    pixels, mask = np.full((*size, 3), (60, 90, 160), np.uint8), np.zeros(size, bool)
    for top, bottom, left, right in boxes:
        mask[top:bottom, left:right] = True
    pixels[mask] = (red, 90, 60)
    return pixels, mask


def overlap(one, other):
    return np.count_nonzero(one & other) / np.count_nonzero(one | other)


LEFT, RIGHT = (16, 112, 12, 84), (32, 64, 120, 180)


def test_without_a_prompt_the_objects_alone_are_protected(finding):
    pixels, mask = scene(LEFT, RIGHT)
    protected = finding.protect(pixels, epsilon=8 / 255, epsilon_background=0)
    assert overlap(protected.region, mask) > 0.8
    assert protected.report["masks"] == 2
    assert protected.report["max_noise"] > 0
    assert (protected.picture.pixels == pixels)[~protected.region].all()
    assert not {ALL_OVER, UNSURE} & set(protected.notes)
    large, small = finding.propose_masks(pixels)
    assert overlap(large, scene(LEFT)[1]) > 0.8
    assert overlap(small, scene(RIGHT)[1]) > 0.7


def test_a_click_means_the_object_that_it_is_on(finding):
    pixels, _ = scene(LEFT, RIGHT)
    found = {name: finding.protect(pixels, points=points).region for name, points in (
        ("left", [[40, 50]]), ("right", [[150, 50]]), ("both", [[40, 50], [150, 50]]),
    )}  # fmt: skip
    assert overlap(found["left"], scene(LEFT)[1]) > 0.8
    assert overlap(found["right"], scene(RIGHT)[1]) > 0.7
    np.testing.assert_array_equal(found["both"], found["left"] | found["right"])
    without = finding.protect(pixels, points=[[40, 50], [150, 50], [160, 60]], point_labels=[1, 1, 0])
    np.testing.assert_array_equal(without.region, found["left"])
    assert "is left out: give a box" in without.notes[0]
    half = finding.protect(pixels, points=[[40, 50], [100, 10]])
    np.testing.assert_array_equal(half.region, found["left"])
    assert "nothing was found at one of the points" in half.notes[0]
    beside = finding.protect(pixels, points=[[100, 10], [192, 128]])
    assert beside.region.all()
    assert beside.notes == ("no object was found at the points: the whole image gets noise", ALL_OVER)


def test_where_nothing_stands_out_the_likeliest_is_protected_and_that_is_said(finding):
    pixels, mask = scene(LEFT, red=70)
    protected = finding.protect(pixels)
    assert UNSURE in protected.notes
    assert overlap(protected.region, mask) > 0.8
    assert finding.propose_masks(pixels) == []
    assert UNSURE not in finding.protect(pixels, mask=mask).notes


def test_images_of_a_few_pixels_get_noise_all_over_where_what_was_found_vanishes(finding, monkeypatch):
    logits = torch.full((1, 1, 16, 16), -9.0)
    logits[..., 0, 0] = 5
    monkeypatch.setattr(finding.model.object_finder, "forward", lambda pixel_values: logits)
    protected = finding.protect(np.full((1, 3, 3), 90, np.uint8))
    assert protected.region.all()
    assert protected.report["masks"] == 1
    assert UNSURE not in protected.notes
    assert "no object was found: the whole image gets noise" in protected.notes
    assert 0 < finding.protect(scene()[0]).region.mean() < 0.02


def test_what_does_not_fit_is_refused(finding, monkeypatch):
    padding = UnSegProcessor(finding.processor.image_processor)
    with pytest.raises(ValueError, match="looks at stretched images, and the processor pads them"):
        Protector(finding.model, padding)
    monkeypatch.setattr(
        finding.model.object_finder, "forward", lambda pixel_values: torch.full((1, 1, 16, 16), torch.nan)
    )
    with pytest.raises(FloatingPointError, match="object finder says is not finite"):
        finding.protect(scene()[0])


def test_a_mask_holds_what_is_likelier_than_not_and_never_is_empty():
    sure = torch.tensor([[3.0, 0.1, -0.1, -9]])
    assert (above_threshold(sure) > 0).tolist() == [[True, True, False, False]]
    unsure = torch.tensor([[-5.0, -5 - BELOW_MOST + 0.1, -5 - BELOW_MOST - 0.1, -9]])
    assert (above_threshold(unsure) > 0).tolist() == [[True, True, False, False]]


def test_objects_that_touch_at_a_corner_are_one_and_specks_are_none():
    logits = torch.full((48, 48), -2.0)
    logits[2:6, 2:6] = logits[6:10, 6:10] = 3
    logits[20:40, 20:40] = 1
    logits[45:47, 45:47] = 9
    large, small = objects_apart(logits)
    assert (large > 0).nonzero().aminmax(dim=0).min.tolist() == [20, 20]
    assert int((large > 0).sum()) == 400
    assert int((small > 0).sum()) == 32
    assert small[30, 30] == -1  # as sure that it is another's
    (speck,) = objects_apart(torch.where(logits > 3, logits, -2.0))
    assert int((speck > 0).sum()) == 4
    _, sure = find_objects(lambda _: logits[None, None], None)
    assert sure
    _, sure = find_objects(lambda _: torch.where(logits > 3, logits, -2.0)[None, None], None)
    assert not sure


def test_the_finder_has_a_mask_as_fine_as_sams():
    with torch.no_grad():
        assert ObjectFinder(8).eval()(torch.zeros(2, 3, 64, 96)).shape == (2, 1, 16, 24)


@pytest.fixture(scope="module")
def trained(protector_of, tmp_path_factory):
    """A generator's folder, that of the same with a finder that has learned discs, and what training said."""
    folder = tmp_path_factory.mktemp("finder")
    start = protector_of(noise_codes=2)
    start.model.save_pretrained(folder / "start")
    UnSegProcessor(start.processor.image_processor, stretch=True).save_pretrained(folder / "start")
    torch.manual_seed(0)
    torch.save(torchvision_mobilenet()[0], folder / "mobilenet.pth")
    data = write_discs(folder / "train.parquet", 48, seed=0)
    held_out = write_discs(folder / "held_out.parquet", 8, seed=1)
    options = ("--width", 16, "--epochs", 25, "--batch_size", 8, "--learning_rate", 1e-2, "--output", folder / "found")
    sources = ("--train_data", data, "--validation_data", held_out)
    done = train(folder / "start", "--pretrained", folder / "mobilenet.pth", *sources, *options)
    assert done.returncode == 0, done.stderr
    return folder / "start", folder / "found", done.stdout


def train(*options):
    return subprocess.run([sys.executable, SCRIPT, *map(str, options)], capture_output=True, text=True)


def test_it_learns_what_photos_are_of_from_their_masks(trained):
    protector = Protector.from_pretrained(trained[1])
    images, numbers = discs(8, 44, 52, seed=2)
    found = [overlap(protector.protect(Image.fromarray(image)).region, number > 0)
             for image, number in zip(images, numbers, strict=True)]  # fmt: skip
    assert np.mean(found) > 0.6, found  # all of the image has 0.11
    assert "held out: IoU 0." in trained[2]


def test_the_noise_is_what_it_was_and_the_finder_takes_half_the_space(trained):
    start, folder, _ = trained
    before, after = UnSegModel.from_pretrained(start), UnSegModel.from_pretrained(folder)
    kept = after.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in before.state_dict().items())
    stored = load_file(folder / "model.safetensors")
    finder = [value.dtype for name, value in stored.items() if name.startswith("object_finder.")]
    assert set(finder) == {torch.float16, torch.int64}  # batch norm counts in whole numbers
    assert {parameter.dtype for parameter in after.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in after.object_finder.parameters())
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
    mask = np.zeros((40, 60), bool)
    mask[10:30, 10:40] = True
    one, other = (Protector.from_pretrained(f).protect(image, mask=mask).picture.pixels for f in (start, folder))
    np.testing.assert_array_equal(one, other)


def test_a_saved_copy_finds_the_same(trained, tmp_path):
    protector = Protector.from_pretrained(trained[1])
    image = Image.fromarray(discs(1, 44, 52, seed=3)[0][0])
    protector.model.save_pretrained(tmp_path)
    protector.processor.save_pretrained(tmp_path)
    again = Protector.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.protect(image).picture.pixels, protector.protect(image).picture.pixels)


def test_what_cannot_be_trained_is_refused(trained, saved_generator, tmp_path, monkeypatch):
    start, folder, _ = trained
    few = write_discs(tmp_path / "few.parquet", 3, seed=0)
    black, none, narrow = (np.zeros(shape, np.uint8) for shape in ((20, 20, 3), (20, 20), (20, 10)))
    for name, mask in (("empty", none), ("narrow", narrow + 1)):
        write_parquet(tmp_path / f"{name}.parquet", {"image": [encoded(black)], "mask": [encoded(mask)]})
    main = runpy.run_path(str(SCRIPT))["main"]

    def refused(*options, by: type[Exception] = ValueError) -> str:
        options = ("--pretrained", folder.parent / "mobilenet.pth", *options)  # a later one counts
        monkeypatch.setattr(sys, "argv", [SCRIPT.name, *map(str, options)])
        with pytest.raises(by) as raised:
            main()
        return str(raised.value)

    out = ("--output", tmp_path / "out")
    assert "--width 0: must be at least 1" in refused(start, "--train_data", few, "--width", 0, *out)
    assert "pads images to its input" in refused(saved_generator, "--train_data", few, *out)
    assert "3 images are less than a batch of 4" in refused(start, "--train_data", few, "--batch_size", 4, *out)
    missing = tmp_path / "no.pth"
    assert "no.pth cannot be read" in refused(start, "--train_data", few, "--pretrained", missing, *out)
    with pytest.warns(UserWarning, match="left out: .* shows no object"):
        assert "no photo shows an object" in refused(start, "--train_data", tmp_path / "empty.parquet", *out)
    with pytest.warns(UserWarning, match=r"the mask has shape \(20, 10\), the image, upright"):
        assert "no photo shows an object" in refused(start, "--train_data", tmp_path / "narrow.parquet", *out)
    assert not (tmp_path / "out").exists()
    assert "choose a new folder" in refused(start, "--train_data", few, "--output", start, by=FileExistsError)


def test_a_generator_whose_finder_lacks_its_weights_says_how_to_do_without_it(tmp_path):
    Protector.from_pretrained().model.save_pretrained(tmp_path)
    Protector.from_pretrained().processor.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    others = {name: value for name, value in weights.items() if not name.startswith("object_finder.")}
    save_file(others, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"object_finder.* in Python, object_finder_width=None does without"):
        Protector.from_pretrained(tmp_path)
    pixels, mask = scene(LEFT)
    without, embedded = Protector.from_pretrained(tmp_path, object_finder_width=None), Protector.from_pretrained()
    protected = without.protect(pixels, mask=mask)
    np.testing.assert_array_equal(protected.picture.pixels, embedded.protect(pixels, mask=mask).picture.pixels)
    assert UNSURE not in without.protect(pixels).notes  # SAM looks for objects instead


def test_a_generator_that_is_trained_leaves_its_finder_as_it_is(protector_of):
    protector = protector_of(object_finder_width=8)
    pixels, _ = scene(LEFT)
    before = protector.protect(pixels).region
    state = {name: value.clone() for name, value in protector.model.state_dict().items()}
    protector.model.train()
    assert not any(module.training for module in protector.model.object_finder.modules())
    np.testing.assert_array_equal(protector.protect(pixels).region, before)
    assert all(torch.equal(value, state[name]) for name, value in protector.model.state_dict().items())


def test_a_point_beside_the_object_that_nothing_is_at_is_no_trouble(finding):
    pixels, _ = scene(LEFT, RIGHT)
    beside = finding.protect(pixels, points=[[40, 50], [100, 10]], point_labels=[1, 0])
    np.testing.assert_array_equal(beside.region, finding.protect(pixels, points=[[40, 50]]).region)
    assert beside.notes == ()
