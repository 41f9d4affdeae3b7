"""Train a generator of unlearnable noise by the bilevel loop of UnSeg.

The embedded default (two cores, under an hour):

    python training_scripts/train_generator.py --config training_scripts/configs/tiny.json \
        --train_files ecssd/train.parquet bsds500/train.parquet --mask_kinds binary regions \
        --output_dir runs/unseg-tiny

The paper's recipe on a pretrained SAM (one GPU):

    python training_scripts/train_generator.py --config training_scripts/configs/paper-vit-b.json \
        --train_files hqseg44k.parquet --mask_kinds binary --output_dir runs/paper-vit-b

Every value of a configuration file can be overridden behind it. An interrupted run goes on with `--resume True`.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class GeneratorArguments:
    sam: str | None = field(
        default=None,
        metadata={"help": "SAM checkpoint to build on, frozen (folder or Hub id); none: a new, small SAM."},
    )
    image_size: int = field(default=256, metadata={"help": "Input side of a new SAM, in pixels."})
    hidden_size: int = field(default=128, metadata={"help": "Width of a new SAM's vision encoder."})
    layers: int = field(default=6, metadata={"help": "Layers of a new SAM's vision encoder."})
    heads: int = field(default=4, metadata={"help": "Attention heads of a new SAM's vision encoder."})
    decoder_size: int = field(default=128, metadata={"help": "Width of a new SAM's decoder."})
    surrogate: str = field(
        default="sam", metadata={"help": "'sam': SAM's architecture from scratch, prompted (the paper's); 'unet'."}
    )
    surrogate_size: int = field(default=512, metadata={"help": "Input side of the surrogate, in pixels."})
    surrogate_width: int = field(default=16, metadata={"help": "Channels of a 'unet' surrogate at full resolution."})
    protect_epsilon: float = field(
        default=8 / 255, metadata={"help": "Budget inside the mask that the finished generator protects with, 0 to 1."}
    )
    protect_epsilon_background: float = field(
        default=2 / 255, metadata={"help": "The same outside the mask, 0 to protect_epsilon."}
    )
    proposal_iou: float = field(
        default=0.88,
        metadata={"help": "Predicted IoU above which the finished generator proposes a segment by itself."},
    )
    proposal_stability: float = field(
        default=0.95, metadata={"help": "Stability (IoU at the thresholds +1 and -1) above which it does."}
    )


@dataclass
class DataArguments:
    train_files: list[str] = field(metadata={"help": "Parquet files with an image column and a label image column."})
    mask_kinds: list[str] = field(
        metadata={"help": "For each file 'binary' (one mask: not zero) or 'regions' (one mask a label value)."}
    )
    output_dir: str = field(metadata={"help": "Gets the generator, the log, and a checkpoint for --resume."})
    min_scale: float = field(default=0.1, metadata={"help": "Large-scale jitter: smallest factor on the input side."})
    max_scale: float = field(default=2.0, metadata={"help": "Large-scale jitter: largest factor on the input side."})
    max_regions: int = field(
        default=1, metadata={"help": "A mask of 'regions' is the union of 1 to this many regions."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on from the checkpoint in output_dir."})
    mixed_precision: str = field(
        default="no", metadata={"help": "'no' or 'bf16'; bf16 pays on GPUs and on CPUs with bf16 matrix units only."}
    )
    workers: int = field(default=0, metadata={"help": "Processes that load data."})
    save_code: bool = field(
        default=True, metadata={"help": "Save the model's code beside the weights, for trust_remote_code."}
    )


def parse(arguments: list[str]):
    """The three groups of settings; `--config FILE.json` is read first, what follows it overrides it."""
    from transformers import HfArgumentParser

    from unseg_hf.training.bilevel import BilevelConfig

    if "--config" in arguments:
        at = arguments.index("--config")
        values = json.loads(Path(arguments[at + 1]).read_text())
        words = [w for k, v in values.items() for w in (f"--{k}", *map(str, v if isinstance(v, list) else [v]))]
        arguments = words + arguments[:at] + arguments[at + 2 :]
    parser = HfArgumentParser((GeneratorArguments, DataArguments, BilevelConfig), description=__doc__.splitlines()[0])
    return parser.parse_args_into_dataclasses(arguments)


def sam_config(image_size: int, hidden_size: int, layers: int, heads: int, decoder_size: int):
    """A small SAM without relative positions, every second layer with global attention."""
    from transformers import SamConfig

    return SamConfig(
        vision_config={
            "hidden_size": hidden_size,
            "output_channels": decoder_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": image_size,
            "use_rel_pos": False,
            "window_size": 8,
            "global_attn_indexes": list(range(1, layers, 2)),
            "num_pos_feats": decoder_size // 2,
            # SAM's own positional scale; SamVisionConfig derives one from the width, so high that neighbouring pixels
            # have nothing in common.
            "scale": 1,
            # SAM's own 1e-10 suits weights that are loaded; nothing would train from it.
            "initializer_range": 0.02,
        },
        prompt_encoder_config={"hidden_size": decoder_size, "image_size": image_size},
        mask_decoder_config={
            "hidden_size": decoder_size,
            "mlp_dim": 4 * decoder_size,
            "iou_head_hidden_dim": decoder_size,
        },
    )


def resized(config, image_size: int):
    """A SAM configuration for another input size and weights from scratch."""
    from transformers import SamConfig

    values = config.to_dict()
    values["vision_config"] |= {"image_size": image_size, "initializer_range": 0.02, "scale": 1}
    values["prompt_encoder_config"]["image_size"] = image_size
    del values["prompt_encoder_config"]["image_embedding_size"]  # derived from the image size
    return SamConfig(**values)


def main(arguments: list[str] | None = None) -> None:
    model_args, data_args, config = parse(sys.argv[1:] if arguments is None else arguments)

    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from transformers import pipeline

    from unseg_hf.configuration_unseg import UnSegConfig
    from unseg_hf.data.records import InteractiveSegmentation, Source
    from unseg_hf.modeling_unseg import UnSegModel
    from unseg_hf.processing_unseg import UnSegProcessor
    from unseg_hf.training.bilevel import train
    from unseg_hf.training.surrogates import SamSurrogate, UNetSurrogate

    if len(data_args.train_files) != len(data_args.mask_kinds):
        raise SystemExit(
            f"--mask_kinds has {len(data_args.mask_kinds)} values for {len(data_args.train_files)} --train_files: "
            "pass one for each file"
        )
    if model_args.surrogate not in ("sam", "unet"):
        raise SystemExit(f"--surrogate {model_args.surrogate}: must be sam or unet")
    accelerator = Accelerator(mixed_precision=data_args.mixed_precision)
    set_seed(config.seed)

    finished = {
        "epsilon": model_args.protect_epsilon,
        "epsilon_background": model_args.protect_epsilon_background,
        "proposal_iou": model_args.proposal_iou,
        "proposal_stability": model_args.proposal_stability,
    }
    sizes = (model_args.hidden_size, model_args.layers, model_args.heads, model_args.decoder_size)
    if model_args.sam:
        generator = UnSegModel.from_pretrained(model_args.sam, **finished)
    else:
        generator = UnSegModel(
            UnSegConfig(sam_config=sam_config(model_args.image_size, *sizes), freeze_sam=False, **finished)
        )
    image_size = generator.config.sam_config.vision_config.image_size
    if model_args.surrogate == "sam":
        # On a pretrained SAM the surrogate has its architecture at another size, as in the paper.
        architecture = (
            resized(generator.config.sam_config, model_args.surrogate_size)
            if model_args.sam
            else sam_config(model_args.surrogate_size, *sizes)
        )
        surrogate = SamSurrogate(architecture, prompt_size=image_size)
    else:
        surrogate = UNetSurrogate(model_args.surrogate_width, model_args.surrogate_size)

    sources = [Source(path, kind) for path, kind in zip(data_args.train_files, data_args.mask_kinds, strict=True)]
    data = InteractiveSegmentation(
        sources, image_size, (data_args.min_scale, data_args.max_scale), data_args.max_regions, config.seed
    )
    train(
        generator,
        surrogate,
        data,
        config,
        data_args.output_dir,
        accelerator,
        resume=data_args.resume,
        num_workers=data_args.workers,
        report=accelerator.print,
    )
    if accelerator.is_main_process:
        processor = UnSegProcessor.for_image_size(image_size)
        if data_args.save_code:
            # Through the pipeline, which adds its own code and its name in the configuration.
            pipeline("image-protection", model=generator, processor=processor).save_pretrained(data_args.output_dir)
        else:
            UnSegConfig._auto_class = UnSegModel._auto_class = UnSegProcessor._auto_class = None
            generator.save_pretrained(data_args.output_dir)
            processor.save_pretrained(data_args.output_dir)
        accelerator.print(f"generator saved to {data_args.output_dir}")


if __name__ == "__main__":
    main()
