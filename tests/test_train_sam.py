"""A small SAM learns what boxes and points mean, and a teacher's masks become its training data."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_discs import discs, write_discs
from PIL import Image

from unseg_hf import Protector, UnSegModel
from unseg_hf.data.sources import parse_source
from unseg_hf.proposals import draw_prompts, good_masks

SCRIPTS = Path(__file__).parent.parent / "training_scripts"

TEACHER = """
import types

import torch
import torch.nn.functional as F


class Teacher(torch.nn.Module):
    '''For every point: what is as red as the image is there, everything, and nothing.'''

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.image_encoder = lambda image: F.avg_pool2d(image, 4)
        self.image_encoder.img_size = 256
        self.prompt_encoder = lambda points, boxes, masks: (points[0], None)
        self.prompt_encoder.get_dense_pe = lambda: None

    device = property(lambda self: self.weight.device)

    def mask_decoder(self, image_embeddings, sparse_prompt_embeddings, multimask_output, **_):
        red = image_embeddings[0, 0].float()
        x, y = (sparse_prompt_embeddings[:, 0] / 4).long().unbind(-1)
        alike = 20 - 80 * (red - red[y, x, None, None]).abs()
        logits = torch.stack([alike, torch.full_like(alike, 20.0), torch.full_like(alike, -20.0)], 1)
        return logits, torch.full(logits.shape[:2], 0.95)


sam_model_registry = {"vit_t": Teacher}
"""


def run(script: str, *options, **environment):
    command = [sys.executable, SCRIPTS / script, *options]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, **environment)


@pytest.fixture(scope="module")
def trained(saved_generator, tmp_path_factory):
    """The folder of a generator whose SAM has learned discs, and what the run said."""
    folder = tmp_path_factory.mktemp("sam")
    data = write_discs(folder / "train.parquet", 48, seed=0) + ",mask_column=instances,masks=instances"
    options = ("--anew", "--steps", 400, "--batch_size", 12, "--learning_rate", 3e-3, "--max_scale", 1.5)
    held_out = ("--validation_data", write_discs(folder / "held_out.parquet", 8, seed=1), "--validate_every", 400)
    done = run("train_sam.py", saved_generator, "--train_data", data, *options, *held_out, "--output", folder / "sam")
    assert done.returncode == 0, done.stderr
    return folder / "sam", done.stdout


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return np.count_nonzero(one & other) / np.count_nonzero(one | other)


@pytest.mark.parametrize("kind", ["boxes", "points"])
def test_a_box_or_a_click_finds_the_object(trained, kind):
    protector = Protector.from_pretrained(trained[0])
    images, numbers = discs(6, 44, 52, seed=2)
    found = []
    for image, number in zip(images, numbers, strict=True):
        disc = number == 1
        rows, columns = np.nonzero(disc)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        point = [(int(columns.mean()), int(rows.mean()))]
        asked = {"boxes": [list(map(int, box))]} if kind == "boxes" else {"points": point}
        protected = protector.protect(Image.fromarray(image), **asked)
        found.append(overlap(protected.region, disc))
    # A box filled to its corners has 0.78; the whole image, which is what an unsure SAM's points get, 0.06.
    assert np.mean(found) > (0.7 if kind == "boxes" else 0.3), found


def test_the_sam_alone_is_trained_and_its_prompts_are_drawn(trained, saved_generator):
    folder, said = trained
    before, after = UnSegModel.from_pretrained(saved_generator), UnSegModel.from_pretrained(folder)
    head = before.noise_head.state_dict()
    assert all(torch.equal(value, head[name]) for name, value in after.noise_head.state_dict().items())
    # The norms of the image encoder begin as ones: none stays so where it is trained.
    norms = {
        n: v for n, v in after.sam.vision_encoder.named_parameters() if "layers" in n and "norm" in n and "weight" in n
    }
    assert norms
    assert not any(torch.equal(value, torch.ones_like(value)) for value in norms.values())
    assert after.config.draw_prompts
    assert not before.config.draw_prompts
    assert "held out, IoU for a box 0." in said
    assert "choose a new folder" in run("train_sam.py", folder, "--train_data", "x", "--output", folder).stderr


def test_anew_nothing_is_left_but_the_frequencies_of_the_coordinates(saved_generator):
    begin_anew = runpy.run_path(str(SCRIPTS / "train_sam.py"))["begin_anew"]
    sam = UnSegModel.from_pretrained(saved_generator).sam
    with torch.no_grad():
        for parameter in sam.parameters():
            parameter.fill_(7)
    begin_anew(sam)
    kept = {name for name, value in sam.named_parameters() if (value == 7).any()}
    assert {name.split(".")[-1] for name in kept} <= {"positional_embedding"}, kept


def test_fewer_images_than_a_batch_are_refused(saved_generator, tmp_path):
    data = write_discs(tmp_path / "train.parquet", 3, seed=0)
    for script in ("train_sam.py", "teach_noise_codes.py"):
        options = ("--train_data", data, "--batch_size", 4, "--output", tmp_path / "out")
        assert "3 images are less than a batch of 4" in run(script, saved_generator, *options).stderr
    assert not (tmp_path / "out").exists()


def test_drawn_prompts_lie_where_the_prompts_lie():
    boxes = torch.tensor([[[8.0, 16, 40, 32]], [[0.0, 0, 64, 64]]])
    drawn = draw_prompts(64, input_boxes=boxes)
    assert drawn.shape == (2, 1, 16, 16)
    assert (drawn[0, 0, 4:8, 2:10] == 1).all()
    assert drawn[0].sum() == 2 * 4 * 8 - 256
    assert (drawn[1] == 1).all()
    points = torch.tensor([[[[10.0, 50.0], [50, 10], [30, 30]]]])
    drawn = draw_prompts(64, input_points=points, input_labels=torch.tensor([[[1, 0, -10]]]))[0, 0]
    assert drawn.argmax() == 12 * 16 + 2
    assert drawn.argmin() == 2 * 16 + 12
    assert drawn.max() > 2.5
    assert drawn[7, 7].abs() < 0.1  # the third is padding


def test_masks_that_repeat_a_worse_one_are_kept_where_the_better_is_not():
    def rows(first, last):
        logits = torch.full((8, 8), -10.0)
        logits[first:last] = 10
        return logits

    # The second repeats the first, the third the second but not the first.
    logits = torch.stack([rows(0, 3), rows(0, 4), rows(0, 5)])
    inside = torch.ones(8, 8, dtype=torch.bool)
    assert good_masks(logits, torch.tensor([0.95, 0.93, 0.91]), inside, 0.9, 0.9) == [0, 2]
    assert good_masks(logits, torch.tensor([0.5, 0.93, 0.91]), inside, 0.9, 0.9) == [1]
    assert good_masks(logits, torch.tensor([0.5, 0.5, 0.5]), inside, 0.9, 0.9) == []


def test_a_teachers_masks_stand_beside_those_that_images_have(tmp_path):
    package = tmp_path / "ISAT" / "segment_any"
    package.mkdir(parents=True)
    (package / "mobile_sam.py").write_text(TEACHER)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "teacher.pt")
    data = write_discs(tmp_path / "train.parquet", 4, seed=0)
    for part in range(2):
        options = ("--checkpoint", tmp_path / "teacher.pt", "--part", part, 2, "--output", tmp_path / str(part))
        done = run("teacher_masks.py", "--data", data, *options, cwd=tmp_path, env=_environment(tmp_path))
        assert done.returncode == 0, done.stderr
        assert "wrote 2 images" in done.stdout
    source = parse_source(f"sa1b:{tmp_path}/*/*.tar")
    records = [source.load(handle) for handle in source.order(np.random.default_rng(0), 0, 1)]
    assert len(records) == 4
    for record in records:
        given, *found = record.masks
        assert 1 <= len(found) <= 6  # discs and ground; everything is too large, nothing too small
        assert max(overlap(mask, given) for mask in found) > 0.6


def _environment(folder: Path) -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": f"{folder}:{SCRIPTS.parent}"}


def test_larger_images_are_written_smaller_with_their_masks(tmp_path):
    data = write_discs(tmp_path / "train.parquet", 3, seed=0, height=88, width=104)
    done = run("write_sa1b.py", "--data", data, "--longest_side", 52, "--output", tmp_path / "tars")
    assert done.returncode == 0, done.stderr
    original, smaller = parse_source(data), parse_source(f"sa1b:{tmp_path}/tars/*.tar")
    masks = sorted(original.load(index).masks[0].mean() for index in range(3))
    records = [smaller.load(handle) for handle in smaller.order(np.random.default_rng(0), 0, 1)]
    assert {record.image.size for record in records} == {(52, 44)}
    assert all(mask.shape == (44, 52) for record in records for mask in record.masks)
    np.testing.assert_allclose(sorted(record.masks[0].mean() for record in records), masks, rtol=0.2)
    assert "longest_side=0" in run("write_sa1b.py", "--data", data, "--longest_side", 0, "--output", tmp_path).stderr
