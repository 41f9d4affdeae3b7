"""The UnSeg generator: Segment Anything and a noise head (UnSeg, NeurIPS 2024, section 3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, SamModel
from transformers import initialization as init
from transformers.utils import ModelOutput, logging

from .configuration_unseg import UnSegConfig
from .object_finder import ObjectFinder
from .vision_unseg import UnSegVisionEncoder, UnSegVisionLayer

logger = logging.get_logger(__name__)


@dataclass
class UnSegImageEmbeddings(ModelOutput):
    """What the generator knows of images before any prompt; serves any number of prompts.

    Args:
        image_embeddings (`torch.Tensor` of shape `(batch, decoder_hidden, grid, grid)`):
            SAM's image embeddings; `SamModel.forward` takes them too.
        noise_features (`torch.Tensor` of shape `(batch, decoder_hidden // 8, 4 * grid, 4 * grid)`):
            The part of the noise features that no prompt changes.
    """

    image_embeddings: torch.Tensor | None = None
    noise_features: torch.Tensor | None = None

    def of_image(self, index: int) -> "UnSegImageEmbeddings":
        """The embeddings of one image of the batch, as a batch of one. IndexError if there is none of this index."""
        index = range(len(self.image_embeddings))[index]
        one = slice(index, index + 1)
        return UnSegImageEmbeddings(self.image_embeddings[one], self.noise_features[one])


@dataclass
class UnSegOutput(ModelOutput):
    """Output of [`UnSegModel`].

    Args:
        noise (`torch.Tensor` of shape `(batch, prompts, 3, 4 * grid, 4 * grid)`):
            Noise in [-1, 1] in RGB order, over the square the model sees; [`UnSegProcessor`] brings it to the
            image's size and a budget scales it.
        image_embeddings (`UnSegImageEmbeddings`):
            The embeddings of the images, for further prompts.
    """

    noise: torch.Tensor | None = None
    image_embeddings: UnSegImageEmbeddings | None = None


class UnSegLayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of a `(batch, channels, height, width)` tensor."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return _in_planes(super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def _in_planes(features: torch.Tensor) -> torch.Tensor:
    """Features `(batch, channels, height, width)` for a convolution that may be trained."""
    # On a CPU, convolutions of large features find the gradient of their weights two to three times faster where a
    # channel is one block of memory. Without gradients there is nothing to gain, and the results have other last bits.
    trained = torch.is_grad_enabled() and features.device.type == "cpu"
    return features.contiguous() if trained and features.shape[-2:].numel() >= 64 * 64 else features


def _to_its_dtype(module: nn.Module, features: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (features[0].to(module.weight.dtype),)


def _to_float32(_: nn.Module, __: tuple[torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    return features.float()


def _check_shape(name: str, given: torch.Tensor, wanted: tuple[int | str, ...], order: str = "") -> None:
    """ValueError, which ends in `order`, unless a tensor has this shape; a word in it stands for any number, and no
    number is 0."""
    fits = given.ndim == len(wanted) and 0 not in given.shape
    if not fits or any(isinstance(w, int) and w != has for w, has in zip(wanted, given.shape, strict=True)):
        shape = ", ".join(map(str, wanted))
        raise ValueError(f"{name} has shape {tuple(given.shape)}: needs ({shape}){order}")


def _upsampler(channels: int, middle: int, out: int) -> nn.Sequential:
    """From the embedding grid to four times the grid."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        UnSegLayerNorm2d(channels, eps=1e-6),
        nn.GELU(),
        nn.ConvTranspose2d(channels, middle, kernel_size=2, stride=2),
        UnSegLayerNorm2d(middle, eps=1e-6),
        nn.GELU(),
        nn.ConvTranspose2d(middle, out, kernel_size=2, stride=2),
    )


class UnSegNoiseHead(nn.Module):
    """Three noise tokens for each code, an MLP for each of the three, and the features they are multiplied with.

    The features are the sum of three sources at four times the embedding grid, as in HQ-SAM: the image embedding, an
    early layer of the encoder, and the decoder's upscaled embedding.
    """

    def __init__(self, config: UnSegConfig):
        super().__init__()
        hidden = config.sam_config.mask_decoder_config.hidden_size
        out = hidden // 8
        self.noise_tokens = nn.Embedding(3 * config.noise_codes, hidden)
        self.noise_mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, out)
            )
            for _ in range(3)
        )
        self.embedding_fusion = _upsampler(hidden, hidden // 4, out)
        self.encoder_fusion = _upsampler(config.sam_config.vision_config.hidden_size, hidden, out)
        self.decoder_fusion = nn.Sequential(
            nn.Conv2d(out, hidden // 4, kernel_size=3, padding=1),
            UnSegLayerNorm2d(hidden // 4, eps=1e-6),
            nn.GELU(),
            nn.Conv2d(hidden // 4, out, kernel_size=3, padding=1),
        )

    def image_features(self, image_embeddings: torch.Tensor, encoder_features: torch.Tensor) -> torch.Tensor:
        """`(batch, hidden, grid, grid)`, `(batch, grid, grid, vision)` to `(batch, hidden // 8, 4 grid, 4 grid)`."""
        encoder_features = _in_planes(encoder_features.permute(0, 3, 1, 2))
        return self.embedding_fusion(_in_planes(image_embeddings)) + self.encoder_fusion(encoder_features)

    def forward(self, tokens: torch.Tensor, image_features: torch.Tensor, upscaled: torch.Tensor) -> torch.Tensor:
        """`(n, 3, hidden)`, `(n, hidden // 8, h, w)` and the same again to noise `(n, 3, h, w)` in [-1, 1]."""
        features = image_features + self.decoder_fusion(_in_planes(upscaled))
        weights = torch.stack([mlp(tokens[:, i]) for i, mlp in enumerate(self.noise_mlps)], dim=1)
        return torch.tanh((weights @ features.flatten(2)).unflatten(2, features.shape[-2:]))


class UnSegPreTrainedModel(PreTrainedModel):
    config_class = UnSegConfig
    config: UnSegConfig
    base_model_prefix = "sam"  # a plain SAM checkpoint loads into `self.sam`
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["SamVisionLayer", "UnSegVisionLayer"]  # noqa: RUF012
    _supports_sdpa = True
    model_tags = ["unlearnable-examples", "data-protection", "image-segmentation"]  # noqa: RUF012 (in a Hub's card)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        # The convolutions and MLPs keep torch's own initialisation, as the authors' do: a small normal would leave
        # tanh(MLP . features) so close to zero that the first epochs train nothing.
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            bound = nn.init._calculate_fan_in_and_fan_out(module.weight)[0] ** -0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)


class UnSegModel(UnSegPreTrainedModel):
    """One universal generator of unlearnable noise for segmentation.

    `UnSegModel.from_pretrained` loads a trained generator, or a plain SAM checkpoint (`facebook/sam-vit-base`, say),
    in which case the noise head alone is new.

    Example:

    ```python
    >>> import torch
    >>> from unseg_hf import UnSegModel, default_checkpoint

    >>> model = UnSegModel.from_pretrained(default_checkpoint())
    >>> size = model.config.sam_config.vision_config.image_size
    >>> model(torch.zeros(1, 3, size, size)).noise.shape
    torch.Size([1, 1, 3, 48, 48])
    ```
    """

    def __init__(self, config: UnSegConfig):
        config.validate_architecture()  # `from_pretrained` sets what it is given one by one, and unchecked
        super().__init__(config)
        self.sam = SamModel._from_config(config.sam_config)
        self.sam.vision_encoder = UnSegVisionEncoder(self.sam.vision_encoder)
        if self.sam.vision_encoder.config._attn_implementation == "sdpa":
            layers = self.sam.vision_encoder.layers
            for i, layer in enumerate(layers):
                layers[i] = UnSegVisionLayer(layer)
        self.noise_head = UnSegNoiseHead(config)
        width = config.object_finder_width
        self.object_finder = None if width is None else ObjectFinder(width)
        self.post_init()
        self._freeze()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        # It fits on one device; spread over several, the decoder and the noise head would not find each other.
        if kwargs.get("device_map") in ("auto", "balanced", "balanced_low_0"):
            kwargs["device_map"] = "sequential"
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        # Loading replaces the parameters, and with them whether they are trained.
        model._freeze()
        return loaded

    def save_pretrained(self, save_directory, **kwargs):
        if self.dtype == torch.float32 and any(p.dtype == torch.bfloat16 for p in self.parameters()):
            raise ValueError("this model encodes in bfloat16, and so has rounded weights: load it anew, and save that")
        # Where config.json names a pipeline whose .py file is not beside it, loading fails.
        pipelines = self.config.__dict__.pop("custom_pipelines", {})
        files = [Path(save_directory, f"{one['impl'].partition('.')[0]}.py") for one in pipelines.values()]
        named = {"custom_pipelines": pipelines} if pipelines else {}
        if all(file.is_file() for file in files):
            self.config.__dict__ |= named
        else:
            logger.warning(
                "This model is saved without its pipeline: where unseg_hf is not installed, pipeline(...) will not "
                "find it. Save or push the pipeline that has the model, or use save_generator and push_generator of "
                "unseg_hf.training.publishing"
            )
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.config.__dict__ |= named

    def set_attn_implementation(self, attn_implementation, *args, **kwargs) -> None:
        """The attention is chosen when a model is loaded: its layers are made for it.

        Raises:
            ValueError: it is another one.
        """
        present = self.sam.config.vision_config._attn_implementation
        if attn_implementation != present:
            raise ValueError(
                f"this model has attention {present!r}: choose when loading, "
                f"from_pretrained(..., attn_implementation={attn_implementation!r})"
            )

    def train(self, mode: bool = True) -> "UnSegModel":
        super().train(mode)
        if self.object_finder is not None:
            # Nothing here trains it, and what its batch norms count would change it all the same.
            self.object_finder.eval()
        return self

    def _freeze(self) -> None:
        self.sam.requires_grad_(not self.config.freeze_sam)
        # Random Fourier features: a buffer in the authors' SAM, a parameter in transformers; never trained.
        self.sam.shared_image_embedding.requires_grad_(False)
        if self.object_finder is not None:
            self.object_finder.requires_grad_(False)  # `train_object_finder.py` trains it, by itself

    def encode_in_bf16(self) -> None:
        """From now on images are encoded with matrix products and convolutions in bfloat16: nearly all of the work.

        Their weights take half the memory. What goes from layer to layer, and all that follows prompts, stays as it
        is: in bfloat16 too, it would change several times as many pixels. Slow on a processor without bfloat16 units.

        Raises:
            ValueError: another attention than `attn_implementation="sdpa"`, or weights that are not float32.
        """
        if self.dtype != torch.float32:
            raise ValueError(f"the model's weights are {self.dtype}: load it in float32, and leave out dtype")
        for layer in self.sam.vision_encoder.layers:
            if not isinstance(layer, UnSegVisionLayer):
                raise ValueError('bfloat16 needs attn_implementation="sdpa"')
            layer.attn.to(torch.bfloat16)
            layer.mlp.to(torch.bfloat16)
        head = self.noise_head
        for part in (self.sam.vision_encoder.neck, head.embedding_fusion, head.encoder_fusion):
            for module in part.modules():
                if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                    module.to(torch.bfloat16)
                    module.register_forward_pre_hook(_to_its_dtype)
                    module.register_forward_hook(_to_float32)

    def get_input_embeddings(self) -> nn.Module:
        return self.sam.get_input_embeddings()

    def get_image_embeddings(self, pixel_values: torch.Tensor) -> UnSegImageEmbeddings:
        """Encode images once, for any number of prompts.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, image_size, image_size)`):
                Images as [`UnSegProcessor`] prepares them.

        Returns:
            [`UnSegImageEmbeddings`]; gradients flow into the encoder only where it is trained.

        Raises:
            ValueError: no such images.
        """
        side = self.config.sam_config.vision_config.image_size
        if not isinstance(pixel_values, torch.Tensor):
            raise ValueError(f"pixel_values is a {type(pixel_values).__name__}: needs the tensor of UnSegProcessor")
        _check_shape("pixel_values", pixel_values, ("batch", 3, side, side))
        encoder = self.sam.vision_encoder
        trained = pixel_values.requires_grad or any(p.requires_grad for p in encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            encoded = encoder(pixel_values.to(self.dtype), layer=self.config.fusion_layer)
        return UnSegImageEmbeddings(
            image_embeddings=encoded.last_hidden_state,
            noise_features=self.noise_head.image_features(encoded.last_hidden_state, encoded.hidden_states[0]),
        )

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
        image_embeddings: UnSegImageEmbeddings | None = None,
        noise_boxes: Sequence[tuple[int, int, int, int]] | None = None,
        codes: torch.Tensor | None = None,
        return_dict: bool | None = None,
        original_sizes: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
    ) -> UnSegOutput | tuple:
        """Noise for each prompt of each image. Coordinates are (x, y) in pixels of the model's input.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, image_size, image_size)`, *optional*):
                Images as [`UnSegProcessor`] prepares them; this or `image_embeddings`.
            input_points (`torch.Tensor` of shape `(batch, prompts, points, 2)`, *optional*):
                Points.
            input_labels (`torch.Tensor` of shape `(batch, prompts, points)`, *optional*):
                1 for a point in the object, 0 outside, -10 for padding; all ones by default.
            input_boxes (`torch.Tensor` of shape `(batch, prompts, 4)`, *optional*):
                Boxes as (x0, y0, x1, y1).
            input_masks (`torch.Tensor` of shape `(batch, prompts, 4 * grid, 4 * grid)`, *optional*):
                Masks in [0, 1], as [`UnSegProcessor`] prepares them.
            image_embeddings (`UnSegImageEmbeddings`, *optional*):
                What `get_image_embeddings` returned; this or `pixel_values`.
            noise_boxes (*optional*):
                Where each prompt's noise is wanted, image by image in one list, as (top, bottom, left, right) in
                cells of the embedding grid; elsewhere it is not valid, and mostly 0. Half of a prompt's cost is in the
                noise of its last layers.
            codes (`torch.Tensor` of shape `(batch, prompts)`, *optional*):
                Whole numbers from 0 to `config.noise_codes - 1`: which of its noises each prompt gets; 0 by default.
            return_dict (`bool`, *optional*):
                `False` for a tuple.
            original_sizes, reshaped_input_sizes (*optional*):
                Not used: what [`UnSegProcessor`] says beside, so that all of it can be passed on.

        Returns:
            [`UnSegOutput`]. Without any prompt there is one noise an image. Memory grows with `batch * prompts`: pass
            many prompts in chunks.

        Raises:
            ValueError: both or none of pixels and embeddings, others than these, prompts of another shape or whose
                counts differ, labels without points, or codes of another shape or beyond those of the generator.
        """
        if (pixel_values is None) == (image_embeddings is None):
            raise ValueError("Pass either pixel_values or image_embeddings, and not both.")
        if image_embeddings is None:
            image_embeddings = self.get_image_embeddings(pixel_values)
        if not isinstance(image_embeddings, UnSegImageEmbeddings):
            kind = type(image_embeddings).__name__
            raise ValueError(f"image_embeddings is a {kind}: needs what get_image_embeddings of this model returned")
        if input_labels is not None and input_points is None:
            raise ValueError("input_labels were given without input_points: pass both")
        given = {"points": input_points, "boxes": input_boxes, "masks": input_masks}
        given = {name: prompt for name, prompt in given.items() if prompt is not None}
        prompt_counts = {name: prompt.shape[1] if prompt.ndim > 1 else 0 for name, prompt in given.items()}
        if len(set(prompt_counts.values())) > 1:
            raise ValueError(f"Every kind of prompt needs the same number of prompts an image; got {prompt_counts}.")
        batch, _, *grid = image_embeddings.image_embeddings.shape
        prompts = next(iter(prompt_counts.values()), 1)
        shapes = {"points": ("points", 2), "boxes": (4,), "masks": (4 * grid[0], 4 * grid[1])}
        order = ", images first, then prompts"
        for name, prompt in given.items():
            _check_shape(f"input_{name}", prompt, (batch, prompts, *shapes[name]), order)
        if input_labels is not None:
            _check_shape("input_labels", input_labels, tuple(input_points.shape[:-1]), order)
        if noise_boxes is not None and len(noise_boxes) != batch * prompts:
            raise ValueError(f"{len(noise_boxes)} noise_boxes: needs one for each of {batch} x {prompts} prompts")

        noise = self._decode(
            image_embeddings,
            *self._encode_prompts(input_points, input_labels, input_boxes, input_masks),
            self._noise_tokens(codes, batch, prompts),
            noise_boxes,
        )
        output = UnSegOutput(noise=noise.unflatten(0, (batch, prompts)), image_embeddings=image_embeddings)
        return output if return_dict or return_dict is None else output.to_tuple()

    def _encode_prompts(self, points, labels, boxes, masks) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Sparse `(batch, prompts, tokens, hidden)` and dense `(any, hidden, grid, grid)` embeddings."""
        if points is not None and labels is None:
            labels = torch.ones(points.shape[:-1], dtype=torch.int64, device=points.device)
        if masks is not None:
            # SAM takes one mask an image; flattened to the batch it takes one a prompt.
            masks = (masks.flatten(0, 1).unsqueeze(1) * self.config.mask_prompt_scale).to(self.dtype)
        return self.sam.prompt_encoder(input_points=points, input_labels=labels, input_boxes=boxes, input_masks=masks)

    def _noise_tokens(self, codes: torch.Tensor | None, batch: int, prompts: int) -> torch.Tensor:
        """The three noise tokens of each prompt, `(batch, prompts, 3, hidden)`."""
        tokens = self.noise_head.noise_tokens.weight.unflatten(0, (-1, 3))
        if codes is None:
            return tokens[0].expand(batch, prompts, -1, -1)
        codes = torch.as_tensor(codes)  # where it is: to look at it elsewhere would be to wait for the device
        if codes.dtype == torch.bool or codes.is_floating_point():
            raise ValueError(f"codes are {codes.dtype}: needs whole numbers")
        if codes.shape != (batch, prompts) or not 0 <= codes.min() <= codes.max() < len(tokens):
            raise ValueError(
                f"codes of shape {tuple(codes.shape)} from {codes.min()} to {codes.max()}: needs shape "
                f"{(batch, prompts)}, and this generator has codes 0 to {len(tokens) - 1}"
            )
        return tokens[codes.to(tokens.device).long()]

    def _decode(
        self, embeddings: UnSegImageEmbeddings, sparse, dense, noise_tokens: torch.Tensor, boxes
    ) -> torch.Tensor:
        """SAM's mask decoder with the noise tokens behind its own; noise `(batch * prompts, 3, 4 grid, 4 grid)`."""
        decoder = self.sam.mask_decoder
        batch, prompts = noise_tokens.shape[:2]
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        first = len(own) + self.config.noise_token_offset
        tokens = torch.cat([own.expand(batch, prompts, -1, -1), noise_tokens], dim=2)
        if sparse is not None:
            tokens = torch.cat([tokens, sparse.to(tokens.dtype)], dim=2)
        if dense.shape[0] != batch * prompts:  # SAM's "no mask" embedding is one an image
            dense = dense[:1]

        image = embeddings.image_embeddings.repeat_interleave(prompts, 0) + dense
        position = self.sam.get_image_wide_positional_embeddings().to(image.dtype)
        tokens, image_tokens = decoder.transformer(
            point_embeddings=tokens.flatten(0, 1).unsqueeze(1),
            image_embeddings=image,
            image_positional_embeddings=position.expand(batch * prompts, -1, -1, -1),
            attention_similarity=None,
        )
        tokens = tokens[:, 0, first : first + 3]
        decoded = image_tokens.squeeze(1).transpose(1, 2).unflatten(2, image.shape[-2:])
        if boxes is None:
            return self._noise(tokens, embeddings.noise_features.repeat_interleave(prompts, 0), decoded)
        height, width = embeddings.noise_features.shape[-2:]
        noise = decoded.new_zeros(batch * prompts, 3, height, width)
        for i, (top, bottom, left, right) in enumerate(boxes):
            # The noise head's convolutions reach two of its cells further, which is half a cell of the grid.
            top, left = max(top - 1, 0), max(left - 1, 0)
            part = (..., slice(4 * top, 4 * (bottom + 1)), slice(4 * left, 4 * (right + 1)))
            features = embeddings.noise_features[i // prompts, None][part]
            noise[i, None][part] = self._noise(
                tokens[i, None], features, decoded[i, None, :, top : bottom + 1, left : right + 1]
            )
        return noise

    def _noise(self, tokens: torch.Tensor, features: torch.Tensor, decoded: torch.Tensor) -> torch.Tensor:
        """Noise from the noise tokens, the features that no prompt changes, and the decoder's, of an image or a part
        of it: `(n, 3, hidden)`, `(n, hidden // 8, 4 h, 4 w)`, `(n, hidden, h, w)` to `(n, 3, 4 h, 4 w)`."""
        decoder = self.sam.mask_decoder
        upscaled = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(decoded)))
        upscaled = decoder.activation(decoder.upscale_conv2(upscaled))
        return self.noise_head(tokens, features, upscaled)


__all__ = ["UnSegImageEmbeddings", "UnSegModel", "UnSegOutput", "UnSegPreTrainedModel"]
