"""Configuration of the UnSeg noise generator."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, SamConfig


@strict
class UnSegConfig(PreTrainedConfig):
    r"""Configuration of [`UnSegModel`]: a SAM and the noise head on top of it.

    The defaults are the paper's generator: SAM ViT-B at 1024 px, protection at 8/255 inside the mask and 2/255
    outside (UnSeg, NeurIPS 2024, sections 3 and 4).

    Args:
        sam_config (`SamConfig` or `dict`, *optional*):
            The SAM inside. `None` is SAM ViT-B.
        epsilon (`float`, defaults to 8/255):
            Largest change of a pixel inside the mask, as a share of the pixel range: 0 to 1.
        epsilon_background (`float`, defaults to 2/255):
            Largest change outside the mask: 0 to `epsilon`.
        fusion_layer (`int`, *optional*):
            The vision encoder layer, counted from 1, whose output is fused into the noise features. `None` is the
            first layer with global attention, as in the paper.
        noise_token_offset (`int`, defaults to 0):
            Where the readout of the three noise tokens starts, relative to the first of them: 0 reads the noise
            tokens, -1 reads the last mask token and the first two noise tokens, as the authors' released weights do.
        noise_codes (`int`, defaults to 1):
            Sets of three noise tokens: noises that the generator can make for the same prompt. The first is that of
            masks; the others, of which the paper's generator has none, are for classes.
        tint_codes (`list[int]`, *optional*):
            Which of those sets are flat tints. They replace the first set where waves would be lost, unless a prompt's
            `tint` says otherwise: in masks whose parts are typically less tall than 0.8 waves, than 2 in images of
            three channels without colour, or than 2.5 in eight parts or more, less their holes. Of several the one is
            taken that is least like the image's own colours, and the first if none clearly is. They may be classes'
            noises as well. `None`: such masks get the first set, too.
        faint_code (`int`, *optional*):
            Which of those sets replaces the first where `epsilon` is below 6/255: waves in colour alone, say, which
            victims still pick up at small amplitudes. `None`: none does.
        epsilon_smooth (`float`, *optional*):
            Largest change, as a share of the pixel range, where the image is smooth and noise would show: skies, skin;
            rounded to whole grey levels. It holds where no more than a quarter of what is protected is smooth, for
            budgets of 6/255 or more, and not for tints and the noises of classes. `None`: `epsilon` and
            `epsilon_background` hold everywhere, as in the paper.
        turned_columns (`list[int]`, *optional*):
            Columns of patches of the input, from 0, in which the noise of masks without a class, tints aside, is the
            opposite. Waves that are broken so leave no lines in a spectrum for a notch filter, but victims need longer
            to learn them. `None`: none are.
        mask_prompt_scale (`float`, defaults to 255.0):
            The value of a mask prompt inside the mask; it is 0 outside. The prompt encoder sees no logits.
        freeze_sam (`bool`, defaults to `True`):
            Train the noise head alone. `False` trains the SAM too, for a SAM without pretrained weights.
        draw_prompts (`bool`, defaults to `False`):
            Draw the boxes and points that SAM is asked about as a mask prompt, too; for a small SAM that
            `train_sam.py` has trained to find objects with them.
        proposal_iou (`float`, defaults to 0.88):
            Predicted IoU above which SAM's mask for a grid point becomes a proposed segment.
        proposal_stability (`float`, defaults to 0.95):
            Least IoU of that mask at the thresholds +1 and -1.
        object_finder_width (`int`, *optional*):
            Channels in the decoder of an [`ObjectFinder`] beside SAM, which says what a photo is of where there is no
            prompt; for a SAM too small to propose anything. `None`: SAM is asked.
        initializer_range (`float`, defaults to 0.02):
            Standard deviation of the normal distribution that new noise tokens are drawn from.

    Raises:
        ValueError: an epsilon outside `0 <= epsilon_background <= epsilon <= 1`, no noise code, tint codes or a faint
            one that are none of them, an epsilon_smooth outside 0 to 1, turned columns that are not there, an
            object_finder_width below 1, a fusion layer or token offset that the SAM inside does not have, or a SAM
            whose parts have images of other sizes.

    Example:

    ```python
    >>> from unseg_hf import UnSegConfig, UnSegModel

    >>> config = UnSegConfig()
    >>> config.sam_config.vision_config.image_size
    1024
    ```
    """

    model_type = "unseg"
    sub_configs_defaults = {"sam_config": SamConfig}  # noqa: RUF012 (transformers' own convention)
    keys_to_ignore_at_inference = ["image_embeddings"]  # noqa: RUF012 (by Trainer: predictions are noise)

    sam_config: dict | PreTrainedConfig | None = None
    epsilon: float | int = 8 / 255
    epsilon_background: float | int = 2 / 255
    fusion_layer: int | None = None
    noise_token_offset: int = 0
    noise_codes: int = 1
    tint_codes: list[int] | tuple[int, ...] | None = None
    faint_code: int | None = None
    epsilon_smooth: float | int | None = None
    turned_columns: list[int] | tuple[int, ...] | None = None
    mask_prompt_scale: float | int = 255.0
    freeze_sam: bool = True
    draw_prompts: bool = False
    proposal_iou: float | int = 0.88
    proposal_stability: float | int = 0.95
    object_finder_width: int | None = None
    initializer_range: float | int = 0.02

    def __post_init__(self, **kwargs):
        if isinstance(self.sam_config, dict):
            self.sam_config = SamConfig(**self.sam_config)
        elif self.sam_config is None:
            self.sam_config = SamConfig()
        if self.fusion_layer is None:
            global_layers = self.sam_config.vision_config.global_attn_indexes
            self.fusion_layer = min(global_layers) + 1 if len(global_layers) else 1
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict` validation: checks values that the types alone do not."""
        check_epsilon(self.epsilon, self.epsilon_background)
        vision = self.sam_config.vision_config
        if vision.image_size % vision.patch_size:
            raise ValueError(
                f"image_size={vision.image_size} of the vision encoder: must be a multiple of its patches' "
                f"{vision.patch_size} pixels"
            )
        prompts = self.sam_config.prompt_encoder_config
        grid = vision.image_size // vision.patch_size
        if (prompts.image_size, prompts.image_embedding_size) != (vision.image_size, grid):
            raise ValueError(
                f"prompt_encoder_config has image_size={prompts.image_size} and image_embedding_size="
                f"{prompts.image_embedding_size}: by the vision_config they must be {vision.image_size} and {grid}"
            )
        layers = vision.num_hidden_layers
        if not 1 <= self.fusion_layer <= layers:
            raise ValueError(f"fusion_layer={self.fusion_layer}: the vision encoder has layers 1 to {layers}")
        if self.noise_codes < 1:
            raise ValueError(f"noise_codes={self.noise_codes}: must be at least 1")
        if not all(0 < code < self.noise_codes for code in self.tint_codes or ()):
            raise ValueError(
                f"tint_codes={self.tint_codes}: all must be above 0 and below noise_codes={self.noise_codes}"
            )
        if self.faint_code is not None and not 0 <= self.faint_code < self.noise_codes:
            raise ValueError(f"faint_code={self.faint_code}: must be from 0 to below noise_codes={self.noise_codes}")
        if self.epsilon_smooth is not None and not 0 <= self.epsilon_smooth <= 1:
            raise ValueError(f"epsilon_smooth={self.epsilon_smooth:g}: must be from 0 to 1 (2 grey levels are 2/255)")
        if not all(0 <= column < grid for column in self.turned_columns or ()):
            raise ValueError(f"turned_columns={self.turned_columns}: all must be from 0 to {grid - 1}")
        if self.object_finder_width is not None and self.object_finder_width < 1:
            raise ValueError(f"object_finder_width={self.object_finder_width}: must be at least 1")
        first_noise_token = self.sam_config.mask_decoder_config.num_multimask_outputs + 2
        if not -first_noise_token <= self.noise_token_offset <= 0:
            raise ValueError(
                f"noise_token_offset={self.noise_token_offset}: must be from {-first_noise_token} to 0 (0 reads the "
                "noise tokens, -1 is right for converted weights of the authors)"
            )

    def budget(self, epsilon: float | None = None, epsilon_background: float | None = None) -> tuple[float, float]:
        """Fill in what was not given: `epsilon` from the model, `epsilon_background` in the model's own proportion.

        Args:
            epsilon: largest change inside the mask, as a share of the pixel range; `None`: the model's.
            epsilon_background: largest change outside; `None`: as much smaller than `epsilon` as the model's own is.

        Returns:
            (epsilon, epsilon_background).

        Raises:
            ValueError: not `0 <= epsilon_background <= epsilon <= 1`.
        """
        share = self.epsilon_background / self.epsilon if self.epsilon else 0.0
        epsilon = self.epsilon if epsilon is None else epsilon
        check_epsilon(epsilon, 0.0)
        epsilon_background = epsilon * share if epsilon_background is None else epsilon_background
        check_epsilon(epsilon, epsilon_background)
        return float(epsilon), float(epsilon_background)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """Reads a config file; one of a plain SAM becomes the `sam_config` of a new generator."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == "sam":
            config_dict = {"sam_config": config_dict}
        return config_dict, kwargs


def check_epsilon(epsilon: float, epsilon_background: float) -> None:
    """Raises ValueError unless `0 <= epsilon_background <= epsilon <= 1`, both of them numbers."""
    for name, value in {"epsilon": epsilon, "epsilon_background": epsilon_background}.items():
        if isinstance(value, bool | str) or not hasattr(value, "__float__"):
            raise ValueError(f"{name}={value!r}: must be a number, a share of the pixel range (8 / 255, say)")
    if not 0 <= epsilon_background <= epsilon <= 1:
        raise ValueError(
            f"epsilon={epsilon:g}, epsilon_background={epsilon_background:g}: needs 0 <= epsilon_background <= "
            "epsilon <= 1, as shares of the pixel range (8 grey levels of 255 are 8/255)"
        )


__all__ = ["UnSegConfig", "check_epsilon"]
