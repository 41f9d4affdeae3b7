"""The "image-protection" pipeline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import Pipeline
from transformers.dynamic_module_utils import custom_object_save

from .image_files import ImageFileError, one_line
from .inputs import Prompt
from .protection import Job, Protector


class ImageProtectionPipeline(Pipeline):
    """Protects images against segmentation models trained on them.

    Inputs are images as [`Protector.protect`] takes them, or dictionaries with an `image` and the fields of
    [`Prompt`]; a list gives a list, and a column of a data set, as any iterator, gives an iterator. Keyword arguments:
    `epsilon`, `epsilon_background`, and the fields of `Prompt` for all images.

    Each result is a dictionary: `image` (the protected PIL image), `mask` (PIL image, 255 where the full budget
    applies) and `report` (`Protected.report`).

    With `batch_size` above 1 the images are encoded together, which pays on a GPU; rounding may then differ from a
    single image's in rare pixels, never beyond the bound.

    Example:

    ```python
    >>> from transformers import pipeline
    >>> import unseg_hf

    >>> protect = pipeline("image-protection", model=str(unseg_hf.default_checkpoint()))
    >>> protect("photo.jpg", mask="photo_mask.png")["image"].save("protected.png")
    ```
    """

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError("the pipeline needs the generator's processor: pass processor=UnSegProcessor...")
        self.image_processor = self.processor.image_processor  # the base class batches only with one of its own
        self._protector = Protector(self.model, self.processor)

    def __call__(self, inputs, *args, **kwargs):
        if args:  # which the base class leaves out, with no more than a line in the log
            raise ValueError("pass what comes after the images by name: mask=..., boxes=..., epsilon=...")
        if hasattr(inputs, "column_names") and hasattr(inputs, "num_rows"):
            raise ValueError("this is a data set: pass one of its columns, or map it with unseg_hf.ProtectImages()")
        if isinstance(inputs, Sequence) and not isinstance(inputs, str | bytes | bytearray | list):
            # A tuple, or a column, whose images the base class would take for one.
            inputs = list(inputs) if isinstance(inputs, tuple) else (image for image in inputs)
        if isinstance(inputs, list) and not inputs:
            return []  # the base class looks at the first
        return super().__call__(inputs, **kwargs)

    @property
    def protector(self) -> Protector:
        """Of the model that the pipeline has now: it may be given another, a compiled one, say."""
        if self._protector.model is not self.model:
            self._protector = Protector(self.model, self.processor)
        return self._protector

    def save_pretrained(self, save_directory, **kwargs):
        """Model, processor and code; `pipeline(..., trust_remote_code=True)` loads them without this package.

        Raises:
            ValueError: `push_to_hub`, with which the model alone would be pushed.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("push_to_hub: it would push the model alone; call push_to_hub(repo_id) of the pipeline")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        # Before the model, which names a pipeline whose code is there; the base class leaves out that of one which was
        # itself loaded from such a folder.
        custom_object_save(self, save_directory)
        # The base class saves the image processor alone, from which no processor could be loaded.
        self.image_processor, kept = None, self.image_processor
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.image_processor = kept
        self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(self, epsilon: float | None = None, epsilon_background: float | None = None, **prompt):
        Prompt.check_names(prompt)
        budget = {"epsilon": epsilon, "epsilon_background": epsilon_background}
        given = {name: value for name, value in budget.items() if value is not None}
        # Each by its own name, so that a call changes what it names and leaves what the pipeline was made with.
        return given | prompt, {}, {}

    def preprocess(
        self, inputs, epsilon: float | None = None, epsilon_background: float | None = None, **prompt
    ) -> dict[str, Job]:
        if isinstance(inputs, dict):
            if "image" not in inputs:
                raise ValueError(f"a dict of {', '.join(map(str, inputs))}: it needs an 'image'")
            fields = {name: value for name, value in inputs.items() if name != "image"}
            inputs = inputs["image"]
            Prompt.check_names(fields)
            prompt |= fields
        if isinstance(inputs, str) and inputs.lower().startswith(("http://", "https://")):
            inputs = _fetched(inputs)
        return {"job": self.protector.prepare(inputs, Prompt(**prompt), epsilon, epsilon_background)}

    def _forward(self, model_inputs: dict) -> dict[str, Any]:
        jobs = model_inputs["job"]
        if isinstance(jobs, Job):
            return {"job": jobs, "decoded": self.protector.decode(jobs, self.protector.encode([jobs])[0])}
        embeddings = self.protector.encode(jobs)
        return {"job": jobs, "decoded": [self.protector.decode(*both) for both in zip(jobs, embeddings, strict=True)]}

    def postprocess(self, model_outputs: dict) -> dict[str, Any]:
        protected = self.protector.apply(model_outputs["job"], model_outputs["decoded"])
        return {
            "image": protected.image,
            "mask": Image.fromarray(protected.region).convert("L"),
            "report": protected.report,
        }


def _fetched(url: str) -> bytes:
    """The bytes behind a URL; transformers' own function would make RGB of grey, 16 bits and alpha."""
    from huggingface_hub import get_session

    try:
        answer = get_session().get(url, follow_redirects=True, timeout=30)
        answer.raise_for_status()
    except Exception as error:  # of whatever client the Hub's package uses
        raise ImageFileError(f"{url}: it cannot be fetched ({one_line(error)}); check the address") from error
    return answer.content


__all__ = ["ImageProtectionPipeline"]
