import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import PreTrainedModel, SamConfig, SamModel, Trainer, TrainingArguments

from unseg_hf import UnSegConfig, UnSegImageEmbeddings, UnSegModel, UnSegProcessor

VIT_B = {}
VIT_L = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "global_attn_indexes": [5, 11, 17, 23],
}
VIT_H = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "global_attn_indexes": [7, 15, 23, 31],
}


@pytest.fixture
def pixels():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def masks():
    """Three different prompts an image."""
    masks = torch.zeros(2, 3, 16, 16)
    masks[0, 0, :8] = 1
    masks[0, 1, :, :8] = 1
    masks[0, 2, 4:8, 4:8] = 1
    masks[1] = masks[0].flip(0, 2)
    return masks


@pytest.fixture
def prompts(masks):
    """Every kind of prompt, three of each an image."""
    corners = torch.tensor([[4.0, 8.0, 20.0, 30.0], [32.0, 2.0, 60.0, 50.0], [0.0, 0.0, 63.0, 63.0]])
    return {
        "input_points": torch.stack([corners.view(3, 2, 2), 63 - corners.view(3, 2, 2)]),
        "input_labels": torch.tensor([[[1, 0], [1, 1], [1, -10]]]).expand(2, 3, 2),
        "input_boxes": torch.stack([corners, corners.flip(0)]),
        "input_masks": masks,
    }


def part(prompts: dict, images: slice = slice(None), chosen: slice = slice(None)) -> dict:
    return {name: prompt[images, chosen] for name, prompt in prompts.items()}


def gradients(model: UnSegModel, *args, **kwargs) -> dict[str, torch.Tensor | None]:
    """Of a loss in which every value of the noise has a weight of its own."""
    model.zero_grad()
    noise = model(*args, **kwargs).noise
    (noise * torch.linspace(-1, 1, noise.numel()).view_as(noise)).sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@torch.no_grad()
def test_noise_and_embeddings_have_the_documented_shapes_and_range(generator, pixels, prompts):
    output = generator(pixels, **prompts)
    assert output.noise.shape == (2, 3, 3, 16, 16)
    assert output.noise.abs().max() <= 1
    assert output.image_embeddings.image_embeddings.shape == (2, 32, 4, 4)
    assert output.image_embeddings.noise_features.shape == (2, 4, 16, 16)
    assert generator(pixels).noise.shape == (2, 1, 3, 16, 16)
    # Otherwise nothing below could tell one noise from another.
    assert output.noise.std(dim=(3, 4)).min() > 1e-3
    for dim in (0, 1, 2):
        assert output.noise.std(dim=dim).mean() > 1e-3


@torch.no_grad()
def test_a_code_chooses_its_noise_whatever_the_other_prompts_ask_for(build_generator, pixels, masks):
    coded = build_generator(noise_codes=3)
    codes = torch.tensor([[0, 1, 2], [2, 2, 0]])
    noise = coded(pixels, input_masks=masks, codes=codes).noise
    for code in range(3):
        alone = coded(pixels, input_masks=masks, codes=torch.full((2, 3), code)).noise
        torch.testing.assert_close(noise[codes == code], alone[codes == code])
        assert (noise - alone)[codes != code].abs().mean() > 1e-3
    assert torch.equal(
        coded(pixels, input_masks=masks).noise, coded(pixels, input_masks=masks, codes=torch.zeros_like(codes)).noise
    )


def test_codes_that_a_generator_has_not_are_an_error(build_generator, generator, pixels, masks):
    for model, codes, message in (
        (build_generator(noise_codes=3), torch.tensor([[0, 1, 3], [0, 0, 0]]), "has codes 0 to 2"),
        (generator, torch.ones(2, 3, dtype=torch.int64), "has codes 0 to 0"),
        (generator, torch.zeros(3, dtype=torch.int64), r"needs shape \(2, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model(pixels, input_masks=masks, codes=codes)


@torch.no_grad()
def test_noise_is_deterministic(generator, pixels, prompts):
    assert torch.equal(generator(pixels, **prompts).noise, generator(pixels, **prompts).noise)


@torch.no_grad()
def test_saved_and_loaded_generator_gives_identical_noise(build_generator, pixels, prompts, tmp_path):
    generator = build_generator()
    generator.save_pretrained(tmp_path)
    loaded, info = UnSegModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(loaded(pixels, **prompts).noise, generator(pixels, **prompts).noise)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["input_points", "input_boxes", "input_masks", "all", "none"])
def test_batch_equals_single_images(generator, pixels, prompts, kind):
    prompts = {} if kind == "none" else prompts if kind == "all" else {kind: prompts[kind]}
    batch = generator(pixels, **prompts).noise
    for i in range(2):
        single = slice(i, i + 1)
        torch.testing.assert_close(
            generator(pixels[single], **part(prompts, single)).noise, batch[single], atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_many_prompts_on_one_embedding_equal_prompts_one_by_one_and_in_chunks(generator, pixels, prompts):
    embeddings = generator.get_image_embeddings(pixels)
    together = generator(image_embeddings=embeddings, **prompts).noise
    for chunks in ([slice(0, 1), slice(1, 2), slice(2, 3)], [slice(0, 2), slice(2, 3)]):
        parts = [generator(image_embeddings=embeddings, **part(prompts, chosen=chunk)).noise for chunk in chunks]
        torch.testing.assert_close(torch.cat(parts, dim=1), together, atol=1e-5, rtol=0)


@torch.no_grad()
def test_noise_from_pixels_equals_noise_from_embeddings(generator, pixels, prompts):
    output = generator(pixels, **prompts)
    embeddings = generator.get_image_embeddings(pixels)
    assert torch.equal(generator(image_embeddings=embeddings, **prompts).noise, output.noise)
    assert torch.equal(generator(image_embeddings=output.image_embeddings, **prompts).noise, output.noise)


@torch.no_grad()
def test_a_slice_of_embeddings_is_the_embeddings_of_those_images(generator, pixels, prompts):
    embeddings = generator.get_image_embeddings(pixels)
    second = embeddings.of_image(1)
    assert isinstance(second, UnSegImageEmbeddings)
    noise = generator(image_embeddings=second, **part(prompts, slice(1, 2))).noise
    torch.testing.assert_close(noise, generator(pixels, **prompts).noise[1:], atol=1e-5, rtol=0)
    assert embeddings["noise_features"] is embeddings.noise_features
    assert embeddings[0] is embeddings.image_embeddings


@torch.no_grad()
def test_points_without_labels_are_points_on_the_object(generator, pixels, prompts):
    points = {"input_points": prompts["input_points"]}
    ones = torch.ones(2, 3, 2, dtype=torch.int64)
    assert torch.equal(generator(pixels, **points).noise, generator(pixels, **points, input_labels=ones).noise)
    assert not torch.equal(generator(pixels, **points).noise, generator(pixels, **points, input_labels=0 * ones).noise)


@torch.no_grad()
def test_tuple_holds_what_the_output_class_holds(generator, pixels, prompts):
    output = generator(pixels, **prompts)
    noise, embeddings = generator(pixels, **prompts, return_dict=False)
    assert torch.equal(noise, output.noise)
    assert torch.equal(embeddings.noise_features, output.image_embeddings.noise_features)


@torch.no_grad()
@pytest.mark.parametrize("use_rel_pos", [False, True])
def test_eager_and_sdpa_attention_agree(build_generator, tiny_sam_config, pixels, prompts, tmp_path, use_rel_pos):
    build_generator(tiny_sam_config(use_rel_pos=use_rel_pos)).save_pretrained(tmp_path)
    eager, sdpa = (UnSegModel.from_pretrained(tmp_path, attn_implementation=kind) for kind in ("eager", "sdpa"))
    attention = [type(model.sam.vision_encoder.layers[0].attn) for model in (eager, sdpa)]
    assert attention[0] is not attention[1]
    assert [model.sam.mask_decoder.config._attn_implementation for model in (eager, sdpa)] == ["eager", "sdpa"]
    torch.testing.assert_close(eager(pixels, **prompts).noise, sdpa(pixels, **prompts).noise, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("way", ["weights", "autocast"])
def test_bfloat16_noise_is_near_float32_noise(saved_generator, generator, pixels, prompts, way):
    expected = generator(pixels, **prompts).noise
    if way == "weights":
        noise = UnSegModel.from_pretrained(saved_generator, dtype=torch.bfloat16)(pixels, **prompts).noise
    else:
        with torch.autocast("cpu", torch.bfloat16):
            noise = generator(pixels, **prompts).noise
    assert noise.dtype is torch.bfloat16
    assert noise.isfinite().all()
    assert (noise - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_frozen_sam_stays_frozen_after_loading_and_the_whole_noise_head_learns(saved_generator, pixels, prompts):
    generator = UnSegModel.from_pretrained(saved_generator).train()
    assert generator.config.freeze_sam
    for name, gradient in gradients(generator, pixels, **prompts).items():
        if name.startswith("noise_head."):
            assert gradient is not None, name
            assert gradient.any(), name
        else:
            assert gradient is None, name


def test_sam_that_is_not_frozen_learns_except_for_its_random_fourier_features(
    build_generator, pixels, prompts, tmp_path
):
    build_generator(freeze_sam=False).save_pretrained(tmp_path)
    generator = UnSegModel.from_pretrained(tmp_path).train()
    found = gradients(generator, pixels, **prompts)
    for name, gradient in found.items():
        if name.startswith(("noise_head.", "sam.vision_encoder.", "sam.mask_decoder.transformer.")):
            # A key's bias adds the same to every score, so that the softmax takes it out: rounding errors are left.
            assert gradient is not None, name
            assert gradient.any() or "k_proj.bias" in name, name
    assert found["sam.shared_image_embedding.positional_embedding"] is None


def test_gradients_reach_the_pixels_through_a_frozen_sam(generator, pixels, masks):
    pixels.requires_grad_()
    gradients(generator, pixels, input_masks=masks)
    assert pixels.grad.abs().amax(dim=(1, 2, 3)).min() > 0


def test_gradient_checkpointing_recomputes_the_encoder_and_gives_the_same_gradients(build_generator, pixels, prompts):
    generator = build_generator(freeze_sam=False).train()
    runs = []
    generator.sam.vision_encoder.layers[0].attn.qkv.register_forward_hook(lambda *_: runs.append(1))
    expected = gradients(generator, pixels, **prompts)
    assert len(runs) == 1
    generator.activation_checkpointing_enable()
    found = gradients(generator, pixels, **prompts)
    assert len(runs) == 3
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("use_rel_pos", [False, True])
def test_plain_sam_checkpoint_loads_with_exactly_the_noise_head_missing(tiny_sam_config, tmp_path, use_rel_pos):
    sam = SamModel(tiny_sam_config(use_rel_pos=use_rel_pos))
    sam.save_pretrained(tmp_path)
    generator, info = UnSegModel.from_pretrained(tmp_path, output_loading_info=True, noise_token_offset=-1)
    assert info.pop("missing_keys") == {f"noise_head.{name}" for name in generator.noise_head.state_dict()}
    assert not any(info.values()), info
    for name, weight in sam.state_dict().items():
        assert torch.equal(generator.sam.state_dict()[name], weight), name
    assert generator.config.noise_token_offset == -1
    trained = {name for name, parameter in generator.named_parameters() if parameter.requires_grad}
    assert trained == {f"noise_head.{name}" for name, _ in generator.noise_head.named_parameters()}
    # New weights are drawn, not left as they were in memory.
    for name, weight in generator.noise_head.state_dict().items():
        assert weight.isfinite().all(), name
        assert weight.abs().max() < 2, name
        assert weight.std() > 0 or ".1." in name or ".4." in name, name  # the layer norms' ones and zeros


@pytest.mark.parametrize("vision", [VIT_B, VIT_L, VIT_H], ids=["vit-base", "vit-large", "vit-huge"])
def test_generator_of_each_released_sam_has_exactly_its_parameters(vision):
    def shapes(model):
        return {name: tuple(weight.shape) for name, weight in model.state_dict().items()}

    config = SamConfig(vision_config=vision)
    with torch.device("meta"):
        generator, sam = UnSegModel(UnSegConfig(sam_config=config)), SamModel(config)
    found = shapes(generator)
    assert {n: s for n, s in found.items() if n.startswith("sam.")} == {f"sam.{n}": s for n, s in shapes(sam).items()}
    assert found["noise_head.encoder_fusion.0.weight"][1] == config.vision_config.hidden_size
    assert generator.config.fusion_layer == config.vision_config.global_attn_indexes[0] + 1


def test_generator_of_the_paper_trains_about_seven_and_a_quarter_million_parameters():
    with torch.device("meta"):
        generator = UnSegModel(UnSegConfig())
    trained = sum(parameter.numel() for parameter in generator.parameters() if parameter.requires_grad)
    assert 7.1e6 < trained < 7.4e6


def test_positional_embedding_is_stored_once_and_tied_after_loading(saved_generator):
    with safe_open(saved_generator / "model.safetensors", "pt") as file:
        assert sum("positional_embedding" in name for name in file.keys()) == 1  # noqa: SIM118 (it is no dictionary)
    sam = UnSegModel.from_pretrained(saved_generator).sam
    assert sam.prompt_encoder.shared_embedding.positional_embedding is sam.shared_image_embedding.positional_embedding


@torch.no_grad()
def test_token_offset_of_the_released_weights_reads_other_tokens(generator, pixels, masks):
    tokens = {}
    generator.noise_head.register_forward_pre_hook(lambda _, args: tokens.update(read=args[0]))
    noise = generator(pixels, input_masks=masks).noise
    read = tokens["read"]
    generator.config.noise_token_offset = -1
    assert (generator(pixels, input_masks=masks).noise - noise).abs().max() > 1e-3
    assert torch.equal(tokens["read"][:, 1:], read[:, :2])


@torch.no_grad()
def test_each_noise_token_makes_one_colour_channel(generator):
    tokens, features = torch.randn(1, 3, 32), torch.randn(1, 4, 16, 16)
    noise = generator.noise_head(tokens, features, features)
    for channel in range(3):
        others = [c for c in range(3) if c != channel]
        changed = tokens.clone()
        changed[:, channel] += 1
        result = generator.noise_head(changed, features, features)
        assert not torch.allclose(result[:, channel], noise[:, channel])
        torch.testing.assert_close(result[:, others], noise[:, others])


@torch.no_grad()
def test_fusion_layer_chooses_the_encoder_features_of_the_noise(build_generator, tiny_sam_config, pixels):
    first, second = (build_generator(tiny_sam_config(), fusion_layer=layer) for layer in (1, 2))
    outputs = []
    for layer in second.sam.vision_encoder.layers:
        layer.register_forward_hook(lambda _, __, output: outputs.append(output))
    features = second.get_image_embeddings(pixels)
    expected = second.noise_head.image_features(features.image_embeddings, outputs[1])
    torch.testing.assert_close(features.noise_features, expected)
    assert not torch.allclose(first.get_image_embeddings(pixels).noise_features, features.noise_features)


def test_configuration_survives_saving(tiny_sam_config, tmp_path):
    config = UnSegConfig(
        sam_config=tiny_sam_config(use_rel_pos=True),
        epsilon=0.1,
        epsilon_background=0.0,
        fusion_layer=1,
        noise_token_offset=-1,
        mask_prompt_scale=20.0,
        freeze_sam=False,
        proposal_iou=0.5,
        proposal_stability=0.6,
        object_finder_width=24,
    )
    config.save_pretrained(tmp_path)
    assert UnSegConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "unseg"


def test_default_configuration_is_the_papers():
    config = UnSegConfig()
    assert (config.epsilon, config.epsilon_background) == (8 / 255, 2 / 255)
    assert config.fusion_layer == 3
    assert config.sam_config.vision_config.image_size == 1024


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epsilon": 0.01, "epsilon_background": 0.02}, "epsilon=0.01, epsilon_background=0.02: needs 0 <= epsilon_b"),
        ({"epsilon": 8}, "epsilon=8, .*<= 1, as shares of the pixel range"),
        ({"epsilon_background": -0.01}, "epsilon_background=-0.01: needs 0 <="),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"fusion_layer": 0}, "fusion_layer=0: the vision encoder has layers 1 to 2"),
        ({"fusion_layer": 3}, "fusion_layer=3: the vision encoder has layers 1 to 2"),
        ({"noise_codes": 0}, "noise_codes=0: must be at least 1"),
        ({"noise_codes": 2, "tint_codes": [1, 2]}, r"tint_codes=\[1, 2\]: all must be above 0 and below noise_codes="),
        ({"noise_codes": 2, "faint_code": 2}, "faint_code=2: must be from 0 to below noise_codes=2"),
        ({"epsilon_smooth": 2}, r"epsilon_smooth=2: must be from 0 to 1 \(2 grey levels are 2/255\)"),
        ({"object_finder_width": 0}, "object_finder_width=0: must be at least 1"),
        ({"noise_token_offset": 1}, "noise_token_offset=1: must be from -5 to 0"),
        ({"noise_token_offset": -6}, "noise_token_offset=-6: must be from -5 to 0"),
    ],
)
def test_configuration_errors_name_the_value_and_the_rule(tiny_sam_config, values, message):
    with pytest.raises(Exception, match=message):
        UnSegConfig(sam_config=tiny_sam_config(), **values)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epsilon_smooth": 2}, "epsilon_smooth=2: must be from 0 to 1"),
        ({"fusion_layer": 3}, "fusion_layer=3: the vision encoder has layers 1 to 2"),
        ({"tint_codes": [99]}, r"tint_codes=\[99\]: all must be above 0"),
    ],
)
def test_what_is_set_when_loading_is_checked_too(saved_generator, given, message):
    with pytest.raises(ValueError, match=message):
        UnSegModel.from_pretrained(saved_generator, **given)


def test_a_sam_whose_parts_have_other_sizes_is_refused():
    with pytest.raises(Exception, match=r"image_size=1024 and image_embedding_size=64: by .* they must be 256 and 16"):
        UnSegConfig(sam_config={"vision_config": {"image_size": 256}})


def test_trainers_predictions_are_noise_alone(saved_generator, pixels, tmp_path):
    images = [{"pixel_values": image} for image in pixels]
    trainer = Trainer(UnSegModel.from_pretrained(saved_generator), TrainingArguments(tmp_path, report_to="none"))
    noise = trainer.predict(images).predictions
    np.testing.assert_allclose(noise, trainer.model(pixels).noise.detach().numpy(), atol=1e-5)


def test_an_input_that_patches_do_not_fill_is_refused(tiny_sam_config):
    with pytest.raises(Exception, match="image_size=60 of the vision encoder: must be a multiple of its patches' 16"):
        UnSegConfig(sam_config=tiny_sam_config(image_size=60))


def test_a_budget_that_is_asked_for_in_part_has_the_models_share_for_the_background(tiny_sam_config):
    config = UnSegConfig(sam_config=tiny_sam_config(), epsilon=8 / 255, epsilon_background=2 / 255)
    assert config.budget() == (8 / 255, 2 / 255)
    assert config.budget(0.04) == (0.04, 0.01)
    assert config.budget(0.04, 0.03) == (0.04, 0.03)
    assert config.budget(None, 0) == (8 / 255, 0)
    config.epsilon_background = 0
    assert config.budget(0.04) == (0.04, 0)
    config.epsilon = 0
    assert config.budget(0.04) == (0.04, 0)
    with pytest.raises(ValueError, match=r"epsilon_background=0\.03: needs"):
        config.budget(0.02, 0.03)


def test_all_that_the_processor_says_can_be_passed_on(generator, pixels):
    inputs = UnSegProcessor.for_image_size(64)(Image.new("RGB", (80, 60)), input_boxes=[[[8, 8, 40, 40]]])
    assert {"original_sizes", "reshaped_input_sizes"} <= inputs.keys()
    assert generator(**inputs).noise.shape == (1, 1, 3, 16, 16)


def test_forward_wants_either_pixels_or_embeddings(generator, pixels):
    embeddings = generator.get_image_embeddings(pixels)
    for inputs in ({}, {"pixel_values": pixels, "image_embeddings": embeddings}):
        with pytest.raises(ValueError, match="either pixel_values or image_embeddings"):
            generator(**inputs)


def test_forward_wants_the_same_number_of_each_kind_of_prompt(generator, pixels, prompts):
    prompts["input_boxes"] = prompts["input_boxes"][:, :2]
    with pytest.raises(ValueError, match=r"same number of prompts .*'points': 3, 'boxes': 2, 'masks': 3"):
        generator(pixels, **prompts)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"input_masks": torch.zeros(3, 1, 16, 16)},
            r"input_masks has shape \(3, 1, 16, 16\): needs \(2, 1, 16, 16\)",
        ),
        ({"input_masks": torch.zeros(2, 16, 16)}, r"input_masks has shape \(2, 16, 16\)"),
        ({"input_masks": torch.zeros(2, 1, 64, 64)}, r"needs \(2, 1, 16, 16\)"),
        ({"input_boxes": torch.zeros(2, 4)}, r"input_boxes has shape \(2, 4\): needs \(2, 4, 4\), images first"),
        ({"input_points": torch.zeros(2, 0, 1, 2)}, r"input_points has shape \(2, 0, 1, 2\)"),
        ({"noise_boxes": [(0, 1, 0, 1)]}, "1 noise_boxes: needs one for each of 2 x 1 prompts"),
        ({"codes": torch.zeros(2, 1)}, r"codes are torch.float32: needs whole numbers"),
        (
            {"input_points": torch.zeros(2, 1, 3, 2), "input_labels": torch.ones(2, 3)},
            r"input_labels has shape \(2, 3\): needs \(2, 1, 3\)",
        ),
        ({"input_labels": torch.ones(2, 1, 1)}, "input_labels were given without input_points"),
        (
            {"pixel_values": torch.zeros(3, 64, 64)},
            r"pixel_values has shape \(3, 64, 64\): needs \(batch, 3, 64, 64\)$",
        ),
        ({"pixel_values": torch.zeros(0, 3, 64, 64)}, r"pixel_values has shape \(0, 3, 64, 64\)"),
        ({"pixel_values": np.zeros((1, 3, 64, 64))}, "pixel_values is a ndarray: needs the tensor of UnSegProcessor"),
        ({"pixel_values": None, "image_embeddings": torch.zeros(1)}, "image_embeddings is a Tensor: needs what"),
    ],
)
def test_inputs_of_another_shape_are_refused(generator, pixels, given, message):
    with pytest.raises(ValueError, match=message):
        generator(**{"pixel_values": pixels} | given)


def test_codes_may_be_of_any_whole_number_type(build_generator, pixels):
    generator = build_generator(noise_codes=3).eval()
    expected = generator(pixels, codes=torch.tensor([[2], [1]])).noise
    for codes in (
        [[2], [1]],
        torch.tensor([[2], [1]], dtype=torch.uint8),
        torch.tensor([[2], [1]], dtype=torch.int16),
    ):
        assert torch.equal(generator(pixels, codes=codes).noise, expected)


def test_the_attention_is_chosen_when_loading(generator):
    generator.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r"from_pretrained\(..., attn_implementation='eager'\)"):
        generator.set_attn_implementation("eager")


def test_noise_in_boxes_is_that_of_the_whole_image_and_zero_elsewhere(generator, pixels, masks):
    boxes = [(0, 4, 0, 4), (1, 2, 1, 3), (3, 4, 0, 1), (0, 1, 3, 4), (2, 2, 2, 2), (1, 4, 0, 3)]
    with torch.inference_mode():
        whole = generator(pixels, input_masks=masks).noise.flatten(0, 1)
        parts = generator(pixels, input_masks=masks, noise_boxes=boxes).noise.flatten(0, 1)
    for one, part, (top, bottom, left, right) in zip(whole, parts, boxes, strict=True):
        inside = slice(4 * top, 4 * bottom), slice(4 * left, 4 * right)
        torch.testing.assert_close(part[:, *inside], one[:, *inside], atol=1e-5, rtol=1e-5)
    assert not parts[1, :, 12:].any()
    assert not parts[2, :, :8].any()


@pytest.mark.parametrize(("size", "in_planes"), [(1024, True), (64, False)])
def test_convolutions_that_are_trained_on_large_features_get_them_in_planes(
    build_generator, tiny_sam_config, size, in_planes
):
    head = build_generator(tiny_sam_config(hidden_size=8)).noise_head
    seen = []
    for module in head.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    grid = size // 16
    embeddings, encoded = torch.zeros(1, grid, grid, 32).permute(0, 3, 1, 2), torch.zeros(1, grid, grid, 8)
    features = head.image_features(embeddings, encoded)
    head(torch.zeros(1, 3, 32), features, torch.zeros(1, 4 * grid, 4 * grid, 4).permute(0, 3, 1, 2))
    assert len(seen) == 8
    assert all(seen) == in_planes
    with torch.no_grad():
        seen.clear()
        head.image_features(embeddings, encoded)
    assert not any(seen)


def test_a_generator_that_was_used_can_be_sent_to_another_process(generator, pixels):
    with torch.no_grad():
        noise = generator(pixels).noise
        again = pickle.loads(pickle.dumps(generator))(pixels).noise
    assert torch.equal(again, noise)


def test_sam_itself_still_hands_out_all_its_layers(generator, pixels):
    with torch.no_grad():
        found = generator.sam(pixel_values=pixels, output_hidden_states=True)
    assert len(found.vision_hidden_states) == len(generator.sam.vision_encoder.layers) + 1


def test_embeddings_of_an_image_that_is_not_there_are_an_error(generator, pixels):
    embeddings = generator.get_image_embeddings(pixels)
    assert torch.equal(embeddings.of_image(-1).image_embeddings, embeddings.image_embeddings[-1:])
    with pytest.raises(IndexError):
        embeddings.of_image(len(pixels))


def test_it_is_not_spread_over_devices(saved_generator, monkeypatch):
    given, load = [], PreTrainedModel.from_pretrained.__func__

    def watched(cls, *arguments, **options):
        given.append(options.pop("device_map"))
        return load(cls, *arguments, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(watched))
    for device_map in ("auto", "balanced", "balanced_low_0", {"": "cpu"}):
        UnSegModel.from_pretrained(saved_generator, device_map=device_map)
    assert given == ["sequential", "sequential", "sequential", {"": "cpu"}]


def test_rounded_weights_are_not_saved(generator, tmp_path):
    generator.encode_in_bf16()
    with pytest.raises(ValueError, match="has rounded weights: load it anew, and save that"):
        generator.save_pretrained(tmp_path / "rounded")
    assert not (tmp_path / "rounded").exists()


def test_bfloat16_is_refused_where_the_weights_are_no_float32(generator):
    with pytest.raises(ValueError, match=r"weights are torch\.float16"):
        generator.half().encode_in_bf16()
