"""Surrogates: pretrained starts against transformers' own modules, and what the phases of the loop need of them."""

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from transformers import SamConfig, SamModel, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from unseg_hf.evaluation.victims.base import normalise
from unseg_hf.evaluation.victims.checkpoints import sam_config_at
from unseg_hf.training.surrogates import (
    SamSurrogate,
    Surrogates,
    UNetSurrogate,
    VictimSurrogate,
    checkpoint_activations,
    frozen,
    load_mae_encoder,
)


def randomise(model, seed=0):
    """Weights that all count: position tables, norms and biases start at 0 or 1."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=source))
    return model


def noise_images(size=64, batch=2):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(7))


def box_prompts(batch=2):
    return {"input_boxes": torch.tensor([[[8.0, 12.0, 40.0, 50.0]]]).repeat(batch, 1, 1)}


@pytest.fixture(scope="module")
def sam_checkpoint(tiny_sam_config, tmp_path_factory):
    """A function: the folder of a SAM with random weights and relative positions, at an input size."""

    def build(image_size):
        folder = tmp_path_factory.mktemp("sam")
        config = sam_config_at(tiny_sam_config(use_rel_pos=True), image_size)
        torch.manual_seed(0)
        randomise(SamModel(config)).save_pretrained(folder)
        return str(folder)

    return build


@pytest.fixture(scope="module")
def mae_checkpoint(tmp_path_factory):
    """A function: the folder of a ViT-MAE with its decoder, as published; keywords change its configuration."""

    def build(**changes):
        folder = tmp_path_factory.mktemp("mae")
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 128,
            "image_size": 64,
            "patch_size": 16,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        }
        randomise(ViTMAEForPreTraining(ViTMAEConfig(**sizes | changes))).save_pretrained(folder)
        return str(folder)

    return build


class TestConfigAtAnotherSize:
    def test_weights_from_scratch_can_train(self):
        vit_b = SamConfig()
        config = sam_config_at(vit_b, 512)
        assert config.vision_config.image_size == config.prompt_encoder_config.image_size == 512
        assert config.prompt_encoder_config.image_embedding_size == 32
        assert config.vision_config.initializer_range == 0.02
        assert config.vision_config.scale == 1
        assert vit_b.vision_config.image_size == 1024

    @pytest.mark.parametrize("size", [0, 8, 100])
    def test_a_size_that_patches_do_not_divide_is_named(self, tiny_sam_config, size):
        with pytest.raises(ValueError, match=f"image_size={size}: must be a multiple of 16"):
            sam_config_at(tiny_sam_config(), size)


class TestFromCheckpoint:
    @pytest.mark.parametrize("kind", ["box", "points", "mask"])
    def test_at_its_own_size_it_is_the_checkpoint(self, sam_checkpoint, kind):
        checkpoint, images = sam_checkpoint(64), noise_images()
        prompts = {
            "box": box_prompts(),
            "points": {"input_points": torch.full((2, 1, 1, 2), 30.0), "input_labels": torch.ones(2, 1, 1)},
            "mask": {"input_masks": torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))},
        }[kind]
        surrogate = SamSurrogate.from_checkpoint(checkpoint, image_size=64, prompt_size=64).eval()
        original = SamModel.from_pretrained(checkpoint).eval()
        # SAM gets masks as 0 to 255, see UnSeg's authors.
        theirs = {k: v * 255 if k == "input_masks" else v for k, v in prompts.items()}
        expected = original(images, multimask_output=False, **theirs).pred_masks[:, 0, 0]
        torch.testing.assert_close(surrogate(images, prompts), expected, atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("size", [32, 128])
    def test_at_another_size_the_positions_alone_are_new(self, sam_checkpoint, size):
        checkpoint = sam_checkpoint(64)
        surrogate = SamSurrogate.from_checkpoint(checkpoint, image_size=size, prompt_size=64)
        old, new = SamModel.from_pretrained(checkpoint).state_dict(), surrogate.sam.state_dict()
        changed = {name for name in old if old[name].shape != new[name].shape or not torch.equal(old[name], new[name])}
        assert changed == {
            "vision_encoder.pos_embed",
            "vision_encoder.layers.1.attn.rel_pos_h",
            "vision_encoder.layers.1.attn.rel_pos_w",
        }
        assert surrogate(noise_images(), box_prompts()).shape == (2, size // 4, size // 4)

    def test_relative_positions_are_what_sam_itself_reads_from_a_table_of_another_size(self, sam_checkpoint):
        checkpoint = sam_checkpoint(64)
        attention = SamModel.from_pretrained(checkpoint).vision_encoder.layers[1].attn
        surrogate = SamSurrogate.from_checkpoint(checkpoint, image_size=128, prompt_size=64)
        resized = surrogate.sam.vision_encoder.layers[1].attn
        for name in ("rel_pos_h", "rel_pos_w"):
            expected = attention.get_rel_pos(8, 8, getattr(attention, name))
            torch.testing.assert_close(resized.get_rel_pos(8, 8, getattr(resized, name)), expected)

    def test_the_position_embedding_keeps_its_directions(self, sam_checkpoint, tmp_path):
        sam = SamModel.from_pretrained(sam_checkpoint(128))
        rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        with torch.no_grad():
            sam.vision_encoder.pos_embed[0, :, :, 0] = rows
            sam.vision_encoder.pos_embed[0, :, :, 1] = columns
        sam.save_pretrained(tmp_path)
        grid = SamSurrogate.from_checkpoint(str(tmp_path), 64, 64).sam.vision_encoder.pos_embed[0, 1:3, 1:3]
        # Cells twice as large have their centres between the old ones.
        torch.testing.assert_close(grid[:, :, 0], torch.tensor([[2.5, 2.5], [4.5, 4.5]]))
        torch.testing.assert_close(grid[:, :, 1], torch.tensor([[2.5, 4.5], [2.5, 4.5]]))

    def test_damaged_weights_are_one_clear_error(self, sam_checkpoint, tmp_path):
        SamModel.from_pretrained(sam_checkpoint(64)).save_pretrained(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-50])
        with pytest.raises(ValueError, match=r"whose weights do not load .*give a checkpoint of sam"):
            SamSurrogate.from_checkpoint(str(tmp_path), image_size=32, prompt_size=64)

    def test_half_precision_is_trained_in_single(self, sam_checkpoint, tmp_path):
        SamModel.from_pretrained(sam_checkpoint(64), dtype=torch.float16).save_pretrained(tmp_path)
        surrogate = SamSurrogate.from_checkpoint(str(tmp_path), image_size=32, prompt_size=64)
        assert {p.dtype for p in surrogate.parameters()} == {torch.float32}

    def test_a_checkpoint_of_another_model_is_named(self, mae_checkpoint):
        checkpoint = mae_checkpoint()
        with pytest.raises(ValueError, match=f"{checkpoint}', a vit_mae; give a checkpoint of sam"):
            SamSurrogate.from_checkpoint(checkpoint, image_size=64, prompt_size=64)


class TestMaeEncoder:
    def test_layers_compute_what_the_autoencoders_do(self, mae_checkpoint, tiny_sam_config):
        checkpoint, images = mae_checkpoint(), noise_images()
        surrogate = SamSurrogate(tiny_sam_config(global_attn_indexes=[0, 1]), prompt_size=64)
        load_mae_encoder(surrogate, checkpoint)
        hidden = surrogate.sam.vision_encoder(images, output_hidden_states=True).hidden_states[-1]

        mae = ViTMAEModel.from_pretrained(checkpoint).eval()
        # As the autoencoder would see the image without masking and without a class token.
        tokens = mae.embeddings.patch_embeddings(images) + mae.embeddings.position_embeddings[:, 1:]
        for layer in mae.layers:
            tokens = layer(tokens)
        torch.testing.assert_close(hidden.flatten(1, 2), tokens, atol=1e-4, rtol=1e-4)

    def test_positions_follow_the_input_size_and_the_rest_stays(self, mae_checkpoint, tiny_sam_config):
        surrogate = SamSurrogate(sam_config_at(tiny_sam_config(use_rel_pos=True), 128), prompt_size=64)
        before = copy.deepcopy(surrogate.sam.state_dict())
        checkpoint = mae_checkpoint()
        load_mae_encoder(surrogate, checkpoint)
        after = surrogate.sam.state_dict()
        for name in before:
            theirs = name.startswith("vision_encoder") and "rel_pos" not in name and ".neck." not in name
            assert torch.equal(before[name], after[name]) != theirs, name
        encoder = surrogate.sam.vision_encoder
        positions = ViTMAEModel.from_pretrained(checkpoint).embeddings.position_embeddings[0, 1:]
        pooled = F.avg_pool2d(encoder.pos_embed[0].permute(2, 0, 1), 2).permute(1, 2, 0).flatten(0, 1)
        similarity = F.cosine_similarity(pooled[:, None], positions[None], dim=-1)
        assert (similarity.argmax(1) == torch.arange(16)).all()
        assert encoder.pos_embed.requires_grad  # fixed in MAE, trained in SAM
        assert surrogate(noise_images(), box_prompts()).shape == (2, 32, 32)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"hidden_size": 48, "intermediate_size": 192}, r"width: 48 in \S+, 32 in the surrogate"),
            ({"num_hidden_layers": 3}, r"number of layers: 3 in \S+, 2 in the surrogate"),
            ({"num_attention_heads": 4}, r"number of attention heads: 4 in \S+, 2 in the surrogate"),
            ({"intermediate_size": 64}, r"MLP width: 64 in \S+, 128 in the surrogate"),
            ({"patch_size": 8}, r"patch size: 8 in \S+, 16 in the surrogate.*choose another MAE"),
        ],
    )
    def test_sizes_that_differ_are_named(self, mae_checkpoint, tiny_sam_config, changes, message):
        surrogate = SamSurrogate(tiny_sam_config(), prompt_size=64)
        with pytest.raises(ValueError, match=message):
            load_mae_encoder(surrogate, mae_checkpoint(**changes))

    def test_a_checkpoint_of_another_model_is_named(self, sam_checkpoint, tiny_sam_config):
        with pytest.raises(ValueError, match="a sam; give a checkpoint of vit_mae"):
            load_mae_encoder(SamSurrogate(tiny_sam_config(), prompt_size=64), sam_checkpoint(64))


@pytest.fixture
def both(tiny_sam_config):
    torch.manual_seed(0)
    builders = [
        partial(SamSurrogate, tiny_sam_config(), prompt_size=64),
        partial(UNetSurrogate, width=4, image_size=32),
    ]
    return Surrogates(builders).train()


class TestSurrogates:
    def test_each_gives_its_own_logits(self, both):
        images, prompts = noise_images(), box_prompts()
        logits = both(images, prompts)
        assert [tuple(values.shape) for values in logits] == [(2, 16, 16), (2, 32, 32)]
        for surrogate, values in zip(both, logits, strict=True):
            torch.testing.assert_close(surrogate(images, prompts), values)

    def test_one_begins_anew_with_the_same_parameters_and_new_values(self, both):
        optimizer = torch.optim.Adam(both.parameters())
        before, kept = copy.deepcopy(both.state_dict()), [id(p) for p in both.parameters()]
        torch.stack([logits.mean() for logits in both(noise_images(), box_prompts())]).sum().backward()
        optimizer.step()
        state = torch.get_rng_state()
        both.restart(1, seed=5, optimizer=optimizer)
        assert torch.equal(torch.get_rng_state(), state)
        assert [id(p) for p in both.parameters()] == kept
        assert optimizer.state.keys() == {p for p in both[0].parameters() if p.grad is not None}
        torch.manual_seed(5)
        fresh = UNetSurrogate(width=4, image_size=32).state_dict()
        assert all(torch.equal(value, fresh[name]) for name, value in both[1].state_dict().items())
        assert not torch.equal(fresh["unet.classify.weight"], before["1.unet.classify.weight"])

    def test_prompts_are_left_as_they_are(self, both):
        prompts = box_prompts() | {"input_masks": torch.rand(2, 1, 16, 16)}
        before = copy.deepcopy(prompts)
        both(noise_images(), prompts)
        assert prompts.keys() == before.keys()
        assert all(torch.equal(prompts[name], before[name]) for name in before)


class TestFrozen:
    def test_outputs_are_the_same_and_nothing_moves(self, both):
        images, prompts = noise_images(), box_prompts()
        reference = copy.deepcopy(both)(images, prompts)
        before = copy.deepcopy(both.state_dict())
        with frozen(both) as held:
            assert held is both
            inside = both(images, prompts)
            assert not any(p.requires_grad for p in both.parameters())
        assert all(torch.equal(a, b) for a, b in zip(inside, reference, strict=True))
        assert all(torch.equal(before[name], value) for name, value in both.state_dict().items())

    def test_gradients_reach_the_images_alone(self, both):
        images = noise_images().requires_grad_()
        with frozen(both):
            sum(values.sum() for values in both(images, box_prompts())).backward()
        assert images.grad.abs().sum() > 0
        assert all(p.grad is None for p in both.parameters())

    def test_everything_is_restored_even_after_an_exception(self, both):
        required = [p.requires_grad for p in both.parameters()]
        assert not all(required)  # the unused parts of SAM stay without gradients
        with pytest.raises(KeyError, match="in the middle"), frozen(both):
            raise KeyError("in the middle")
        assert [p.requires_grad for p in both.parameters()] == required
        before = copy.deepcopy(both.state_dict())
        both(noise_images(), box_prompts())
        moved = {name for name, value in both.state_dict().items() if not torch.equal(before[name], value)}
        assert moved == {name for name in before if "running" in name or "batches_tracked" in name}

    def test_outputs_are_the_same_in_evaluation_too(self, both):
        both(noise_images(), box_prompts())
        both.eval()
        reference = both(noise_images(), box_prompts())
        with frozen(both):
            inside = both(noise_images(), box_prompts())
        assert all(torch.equal(a, b) for a, b in zip(inside, reference, strict=True))


class TestActivationCheckpointing:
    @pytest.mark.parametrize("held", [False, True])
    def test_gradients_are_the_same(self, both, held):
        plain, checkpointed = both, copy.deepcopy(both)
        checkpoint_activations(checkpointed)
        runs = []
        for surrogates in (plain, checkpointed):
            calls = []
            layer = surrogates[0].sam.vision_encoder.layers[0]
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
            images = noise_images().requires_grad_()
            if held:
                with frozen(surrogates):
                    sum(values.square().mean() for values in surrogates(images, box_prompts())).backward()
            else:
                sum(values.square().mean() for values in surrogates(images, box_prompts())).backward()
            runs.append((images.grad, [p.grad for p in surrogates.parameters()], len(calls)))
        (grad, grads, once), (grad_2, grads_2, twice) = runs
        torch.testing.assert_close(grad, grad_2)
        torch.testing.assert_close(grads, grads_2)
        assert (once, twice) == (1, 2)

    def test_images_need_no_gradient(self, both):
        checkpoint_activations(both)
        both[0](noise_images(), box_prompts()).sum().backward()
        assert both[0].sam.vision_encoder.layers[0].mlp.lin1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["unetpp", "segformer", "deeplabv3plus"])
def test_a_victim_as_surrogate_sees_images_as_the_audit_shows_them(name):
    surrogate = VictimSurrogate(name, 64).train()
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    found = []
    with torch.no_grad(), frozen(surrogate):
        for see in (
            lambda: surrogate(normalise(images), {}).sigmoid(),
            lambda: surrogate.victim(images).softmax(1)[:, 1],
        ):
            torch.manual_seed(0)  # of dropout
            found.append(see())
    torch.testing.assert_close(*found, atol=1e-4, rtol=0)
    assert found[0].std() > 1e-2


def test_noise_gets_gradients_through_a_frozen_victim_and_the_victim_none():
    surrogate = VictimSurrogate("segformer", 32).train()
    images = noise_images().requires_grad_()
    with frozen(surrogate):
        surrogate(images, {}).square().mean().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in surrogate.parameters())


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vgg", 64, "'vgg': must be sam, or a victim of unet"),
        ("mask2former", 64, "'mask2former': must be sam"),
        ("upernet", 33, "33: upernet needs a multiple of 32"),
    ],
)
def test_victims_that_cannot_be_surrogates_are_refused(name, size, message):
    with pytest.raises(ValueError, match=message):
        VictimSurrogate(name, size)
