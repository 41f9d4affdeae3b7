"""unseg-hf: publish images that spoil the segmentation models trained on them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registration import with_transformers

if TYPE_CHECKING:
    from .configuration_unseg import UnSegConfig
    from .image_files import ImageFileError
    from .inputs import Prompt
    from .mapping import ProtectImages
    from .modeling_unseg import UnSegImageEmbeddings, UnSegModel, UnSegOutput
    from .pipeline_unseg import ImageProtectionPipeline
    from .processing_unseg import UnSegProcessor
    from .protection import Protected, Protector, default_checkpoint

# Where the noise of a checkpoint changes, this has to: what `map` and an audit keep is found again by it.
__version__ = "0.1.0"

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

# Imported when they are asked for: with them come torch and transformers, which take seconds.
_MODULE_OF = {
    "ImageFileError": "image_files",
    "ImageProtectionPipeline": "pipeline_unseg",
    "Prompt": "inputs",
    "ProtectImages": "mapping",
    "Protected": "protection",
    "Protector": "protection",
    "UnSegConfig": "configuration_unseg",
    "UnSegImageEmbeddings": "modeling_unseg",
    "UnSegModel": "modeling_unseg",
    "UnSegOutput": "modeling_unseg",
    "UnSegProcessor": "processing_unseg",
    "default_checkpoint": "protection",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def _register() -> None:
    """Make the Auto classes and `pipeline()` know this package, and saved models carry its code."""
    from transformers import AutoConfig, AutoModel, AutoProcessor
    from transformers.pipelines import PIPELINE_REGISTRY

    from .configuration_unseg import UnSegConfig
    from .modeling_unseg import UnSegModel
    from .pipeline_unseg import ImageProtectionPipeline
    from .processing_unseg import UnSegProcessor
    from .protection import default_checkpoint

    AutoConfig.register(UnSegConfig.model_type, UnSegConfig, exist_ok=True)
    AutoModel.register(UnSegConfig, UnSegModel, exist_ok=True)
    AutoProcessor.register(UnSegConfig, UnSegProcessor, exist_ok=True)
    UnSegConfig.register_for_auto_class()
    UnSegModel.register_for_auto_class("AutoModel")
    UnSegProcessor.register_for_auto_class()
    if "image-protection" not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(
            "image-protection",
            pipeline_class=ImageProtectionPipeline,
            pt_model=AutoModel,
            default={"model": (str(default_checkpoint()), "main")},
            type="image",
        )
        # What saved configurations get of it: without the default model, which is a path of this machine.
        (registered,) = ImageProtectionPipeline._registered_impl.values()
        shared = {name: value for name, value in registered.items() if name != "default"}
        ImageProtectionPipeline._registered_impl = {"image-protection": shared}


with_transformers(_register)
