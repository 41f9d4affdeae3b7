"""unseg-hf: publish images that spoil the segmentation models trained on them."""

from .configuration_unseg import UnSegConfig
from .image_files import ImageFileError
from .mapping import ProtectImages
from .modeling_unseg import UnSegImageEmbeddings, UnSegModel, UnSegOutput
from .pipeline_unseg import ImageProtectionPipeline
from .processing_unseg import UnSegProcessor
from .protection import Prompt, Protected, Protector, default_checkpoint

__version__ = "0.1.0"


def _register() -> None:
    """Make the Auto classes and `pipeline()` know this package, and saved models carry its code."""
    from transformers import AutoConfig, AutoModel, AutoProcessor
    from transformers.pipelines import PIPELINE_REGISTRY

    AutoConfig.register(UnSegConfig.model_type, UnSegConfig, exist_ok=True)
    AutoModel.register(UnSegConfig, UnSegModel, exist_ok=True)
    AutoProcessor.register(UnSegConfig, UnSegProcessor, exist_ok=True)
    UnSegConfig.register_for_auto_class()
    UnSegModel.register_for_auto_class("AutoModel")
    UnSegProcessor.register_for_auto_class()
    if "image-protection" not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            "image-protection", pipeline_class=ImageProtectionPipeline, pt_model=AutoModel, type="image"
        )


_register()

__all__ = [
    "ImageFileError",
    "ImageProtectionPipeline",
    "Prompt",
    "ProtectImages",
    "Protected",
    "Protector",
    "UnSegConfig",
    "UnSegImageEmbeddings",
    "UnSegModel",
    "UnSegOutput",
    "UnSegProcessor",
    "default_checkpoint",
]
