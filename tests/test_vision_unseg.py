"""SAM's vision layers in parts: the stock layers' results and gradients, and parts that stay small."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers.models.sam.modeling_sam import SamVisionLayer

from unseg_hf import UnSegConfig, UnSegModel, vision_unseg
from unseg_hf.vision_unseg import UnSegVisionLayer

GRID = 8


@pytest.fixture(params=[0, 2, 3], ids=["global", "windows", "padded windows"])
def window_size(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["no bias", "bias"])
def layers(request, tiny_sam_config, window_size):
    """A stock layer with random weights, and the same in parts."""
    config = tiny_sam_config(use_rel_pos=request.param, image_size=16 * GRID).vision_config
    config._attn_implementation = "sdpa"
    stock = SamVisionLayer(config, window_size)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.normal_(0, 0.3, generator=random)
    return stock, UnSegVisionLayer(copy.deepcopy(stock))


@pytest.fixture
def hidden_states():
    return torch.randn(2, GRID, GRID, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("parts", ["few", "many"])
def test_results_and_gradients_are_the_stock_layers(layers, hidden_states, monkeypatch, parts):
    if parts == "many":
        monkeypatch.setattr(vision_unseg, "_CPU_TOKENS", 1)
        monkeypatch.setattr(vision_unseg, "_CPU_BIAS", 3 * GRID**3)  # three rows of queries, so that the last are two
    found = []
    for layer in layers:
        given = hidden_states.clone().requires_grad_()
        result = layer(given)
        (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
        found.append({"result": result, "given": given.grad} | {n: p.grad for n, p in layer.named_parameters()})
    expected, found = found
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], atol=1e-4, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}"
        )


@torch.no_grad()
def test_nothing_grows_with_the_image_beyond_its_limit(layers, window_size, hidden_states, monkeypatch):
    limit = 2 * GRID**3
    monkeypatch.setattr(vision_unseg, "_CPU_TOKENS", 2 * GRID)
    monkeypatch.setattr(vision_unseg, "_CPU_BIAS", limit)
    biases, tokens, stock_attention = [], [], F.scaled_dot_product_attention

    def attend(query, key, value, attn_mask=None):
        biases.append(0 if attn_mask is None else attn_mask.numel())
        return stock_attention(query, key, value, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    layer = layers[1]
    layer.mlp.register_forward_pre_hook(lambda _, args: tokens.append(args[0][..., 0].numel()))
    layer(hidden_states)
    assert max(biases) <= limit
    assert (max(biases) > 0) == layer.attn.use_rel_pos
    assert sum(tokens) == 2 * GRID**2
    assert max(tokens) <= 2 * GRID * max(window_size, 1)


@pytest.fixture(params=[False, True], ids=["no tiles", "tiles"])
def has_tiles(request, monkeypatch):
    """The way of each kind of processor, wherever this runs."""
    monkeypatch.setattr(vision_unseg, "_HAS_TILES", request.param)
    return request.param


@torch.no_grad()
@pytest.mark.usefixtures("has_tiles")
@pytest.mark.parametrize("parts", ["few", "many"])
def test_layers_in_bfloat16_give_the_stock_layers_results_but_for_rounding(layers, hidden_states, monkeypatch, parts):
    if parts == "many":
        monkeypatch.setattr(vision_unseg, "_CPU_TOKENS", 1)
        monkeypatch.setattr(vision_unseg, "_CPU_QUERIES", 1)
        monkeypatch.setattr(vision_unseg, "_CPU_LOGITS", 3 * GRID**3)
    stock, layer = layers
    expected = stock(hidden_states)
    layer.attn.to(torch.bfloat16)
    layer.mlp.to(torch.bfloat16)
    difference = (layer(hidden_states) - expected).abs().mean() / expected.abs().mean()
    assert 0 < difference < 0.01


@torch.no_grad()
@pytest.mark.parametrize("scale", [1, 8])
def test_attention_in_bfloat16_rounds_no_more_than_torchs_own(scale, has_tiles):
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, GRID**2, 16, generator=random).bfloat16() for _ in range(3))
    down, across = (torch.randn(GRID, GRID, 16, generator=random).mul(scale / 4).bfloat16() for _ in range(2))
    given = (query, key, value, down, across)
    exact = vision_unseg._with_bias(*(tensor.float() for tensor in given), GRID)
    torchs = vision_unseg._with_bias(*given, 3)
    own = vision_unseg._in_channels(*given, 2) if has_tiles else vision_unseg._written_out(*given, 4, 3)
    assert 0 < (own - exact).norm() < (torchs - exact).norm()


@torch.no_grad()
def test_attention_in_bfloat16_has_no_more_logits_at_a_time_than_its_limit(
    layers, hidden_states, monkeypatch, has_tiles
):
    limit, seen, softmax = 2 * GRID**3, [], torch.softmax
    monkeypatch.setattr(vision_unseg, "_CPU_LOGITS", limit)
    monkeypatch.setattr(torch, "softmax", lambda x, *args, **kw: seen.append(x.numel()) or softmax(x, *args, **kw))
    layer = layers[1].bfloat16()
    layer(hidden_states.bfloat16())
    assert bool(seen) == (layer.attn.use_rel_pos and not has_tiles)
    assert max(seen, default=0) <= limit


def test_layers_in_bfloat16_have_gradients(layers, hidden_states):
    layer = layers[1].bfloat16()
    given = hidden_states.bfloat16().requires_grad_()
    layer(given).sum().backward()
    assert given.grad.isfinite().all()
    assert given.grad.any()


@torch.no_grad()
def test_generator_with_position_biases_gives_the_noise_of_eager_attention(build_generator, tiny_sam_config, tmp_path):
    generator = build_generator(tiny_sam_config(use_rel_pos=True, window_size=3))
    random = torch.Generator().manual_seed(0)
    for name, parameter in generator.named_parameters():
        if "rel_pos" in name:
            parameter.normal_(0, 0.5, generator=random)
    generator.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 64, 64, generator=random)
    stock = UnSegModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert not any(isinstance(module, UnSegVisionLayer) for module in stock.modules())
    torch.testing.assert_close(generator(pixels).noise, stock(pixels).noise, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="sdpa"):
        stock.encode_in_bf16()


def test_a_seed_gives_a_generator_the_weights_that_it_has_with_stock_layers(tiny_sam_config):
    weights = []
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        config = UnSegConfig(sam_config=tiny_sam_config(use_rel_pos=True).to_dict(), attn_implementation=attention)
        model = UnSegModel(config)
        assert isinstance(model.sam.vision_encoder.layers[0], UnSegVisionLayer) == (attention == "sdpa")
        weights.append(model.state_dict())
    parts, stock = weights
    assert parts.keys() == stock.keys()
    assert all(torch.equal(parts[name], stock[name]) for name in stock)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_layers_are_stock_ones(dtype):
    torch.manual_seed(0)
    stock = torch.nn.Linear(24, 40).to(dtype)
    given = torch.randn(2, 5, 3, 24, dtype=dtype)
    expected = stock(given)
    own = vision_unseg._Linear(stock)
    torch.testing.assert_close(own(given), expected)
    torch.testing.assert_close(own(given[:, ::2, :, :]), expected[:, ::2])
    assert own(given[:0]).shape == (0, 5, 3, 40)
    assert own.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_layer_compiles_into_one_graph(layers, hidden_states, dtype, gradients):
    layer = layers[1].to(dtype)
    torch.compiler.reset()  # it compiles a function for so many layers, and no more
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.set_grad_enabled(gradients):
        expected = layer(hidden_states.to(dtype))
        torch.testing.assert_close(whole(hidden_states.to(dtype)), expected)


@torch.no_grad()
def test_bfloat16_is_in_the_products_and_not_between_the_layers(generator):
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    expected = generator(pixels).noise
    seen = set()
    generator.encode_in_bf16()
    for layer in generator.sam.vision_encoder.layers:
        layer.register_forward_hook(lambda _, args, result: seen.add((args[0].dtype, result.dtype)))
        layer.mlp.register_forward_hook(lambda _, args, result: seen.add((args[0].dtype, result.dtype)))
    noise = generator(pixels).noise
    assert seen == {(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)}
    assert noise.dtype is torch.float32
    convolutions = [
        module
        for part in (generator.sam.vision_encoder.neck, generator.noise_head.encoder_fusion)
        for module in part.modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.ConvTranspose2d))
    ]
    assert len(convolutions) == 5
    assert {convolution.weight.dtype for convolution in convolutions} == {torch.bfloat16}
    assert not torch.equal(noise, expected)
    assert (noise - expected).abs().mean() < 0.02 * expected.abs().mean()
