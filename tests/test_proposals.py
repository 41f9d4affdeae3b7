"""Filters and suppression of proposed segments, on decoder outputs made by hand."""

import types

import pytest
import torch

from unseg_hf import proposals


def model(side=64, **thresholds):
    vision = types.SimpleNamespace(image_size=side)
    config = types.SimpleNamespace(sam_config=types.SimpleNamespace(vision_config=vision))
    config.proposal_iou, config.proposal_stability = thresholds.get("iou", 0.8), thresholds.get("stability", 0.9)
    return types.SimpleNamespace(config=config, device="cpu")


def segment(rows, columns, logit=10.0, side=16):
    logits = torch.full((side, side), -10.0)
    logits[rows, columns] = logit
    return logits


@pytest.fixture
def decoded(monkeypatch):
    """A function that makes the decoder answer with these masks, one a prompt, and these predicted IoUs."""

    def set_to(masks, ious):
        answer = torch.stack(masks).unsqueeze(1), torch.tensor(ious).unsqueeze(1)
        monkeypatch.setattr(proposals, "_decode", lambda *_: answer)

    return set_to


def test_the_better_of_two_equal_masks_is_kept_and_the_best_comes_first(decoded):
    one, other = segment(slice(0, 5), slice(0, 5)), segment(slice(8, 14), slice(8, 14))
    almost = segment(slice(0, 5), slice(0, 6))
    decoded([one, almost, other], [0.9, 0.95, 0.97])
    kept = proposals.propose(model(), None, (64, 64))
    assert torch.equal(kept, torch.stack([other, almost]))


def test_the_points_that_are_asked_about_lie_all_over_the_image(monkeypatch):
    asked = []

    def decode(model, embeddings, prompts):
        asked.append(prompts["input_points"])
        return torch.full((256, 1, 16, 16), -1.0), torch.zeros(256, 1)

    monkeypatch.setattr(proposals, "_decode", decode)
    proposals.propose(model(), None, (32, 64))
    x, y = asked[0].unbind(-1)
    assert (x.min(), x.max(), y.min(), y.max()) == (2, 62, 1, 31)


def test_masks_that_overlap_little_are_all_kept(decoded):
    left, right = segment(slice(0, 8), slice(0, 8)), segment(slice(0, 8), slice(6, 16))
    decoded([left, right], [0.9, 0.9])
    assert len(proposals.propose(model(), None, (64, 64))) == 2


@pytest.mark.parametrize(
    ("mask", "iou"),
    [
        (segment(slice(0, 5), slice(0, 5)), 0.5),  # not trusted
        (segment(slice(0, 5), slice(0, 5), logit=0.5), 0.95),  # gone at a threshold of 1
        (segment(slice(0, 0), slice(0, 0)), 0.95),  # empty
        (segment(slice(0, 16), slice(0, 16)), 0.95),  # everything
        (segment(slice(9, 16), slice(0, 16)), 0.95),  # in the padding below the image
    ],
)
def test_bad_masks_are_left_out(decoded, mask, iou):
    decoded([mask], [iou])
    assert len(proposals.propose(model(), None, (32, 64))) == 0


def test_masks_come_back_at_the_images_size_and_place():
    # An image of 30 x 60 lies in the upper half of the square; its right half is the object.
    logits = segment(slice(0, 8), slice(8, 16)).unsqueeze(0)
    (mask,) = proposals.masks_at(logits, square=64, reshaped=(32, 64), size=(30, 60))
    assert mask.shape == (30, 60)
    assert mask[5:25, 33:].all()
    assert not mask[:, :27].any()


def test_prompts_are_decoded_in_chunks_with_the_same_result(generator, monkeypatch):
    embeddings = generator.get_image_embeddings(torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    boxes = torch.tensor([[[0.0, 0, 20, 20], [10, 10, 50, 40], [30, 5, 60, 60]]])
    whole = proposals.segment(generator, embeddings, input_boxes=boxes)
    monkeypatch.setattr(proposals, "PROMPT_CHUNK", 2)
    chunked = proposals.segment(generator, embeddings, input_boxes=boxes)
    torch.testing.assert_close(whole, chunked, atol=1e-4, rtol=1e-4)


def test_prompts_are_drawn_in_the_models_precision(build_generator):
    drawing = build_generator(draw_prompts=True).to(torch.bfloat16)
    embeddings = drawing.get_image_embeddings(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16))
    logits, ious = proposals.segment(drawing, embeddings, input_boxes=torch.tensor([[[0.0, 0, 20, 20]]]))
    assert logits.isfinite().all()
    assert ious.isfinite().all()


def test_padding_does_not_make_a_mask_unstable(decoded):
    # Beside the image, in the padding, a mask may be as unstable as it likes.
    mask = segment(slice(0, 5), slice(0, 5))
    mask[9:] = 0.5
    decoded([mask], [0.95])
    assert len(proposals.propose(model(), None, (32, 64))) == 1
