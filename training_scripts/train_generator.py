"""Train a generator of unlearnable noise by the bilevel loop of UnSeg.

The embedded default, on two cores:

    python training_scripts/train_generator.py --config training_scripts/configs/tiny.json \
        --train_data ecssd/train.parquet bsds500/train.parquet,masks=regions --output_dir runs/unseg-tiny

The paper's recipe on a pretrained SAM, on eight GPUs, and the same on shards of SA-1B:

    accelerate launch --num_processes 8 training_scripts/train_generator.py \
        --config training_scripts/configs/paper-vit-b.json --train_data hqseg:HQSeg-44K --output_dir runs/paper
    accelerate launch --num_processes 8 training_scripts/train_generator.py \
        --config training_scripts/configs/paper-vit-b.json --train_data "sa1b:sa1b/*.tar,min_area=0.01" \
        --epoch_size 44320 --output_dir runs/paper-sa1b

Data are named as [KIND:]LOCATION[,option=value]...; unseg_hf/data/sources.py lists kinds and options. What follows a
configuration file overrides it. A run that was interrupted, in whatever way, goes on with the same command and
--resume.
"""

import argparse
import contextlib
import difflib
import json
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

OF_A_NEW_SAM = ("image_size", "hidden_size", "layers", "heads", "decoder_size")


def _setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """What decides the result, beside the loop's own settings and the data."""

    sam: str | None = _setting(
        None, "SAM or UnSeg checkpoint to start from, folder or Hub id; none: a new, small SAM."
    )
    train_sam: bool = _setting(False, "Train the SAM of that checkpoint, too; a new one always is.")
    new_noise_head: bool = _setting(
        False,
        "Begin with a new noise head where that checkpoint has one. What a finished generator makes lies at its "
        "bounds, where hardly a gradient passes: its head stays as it is for long.",
    )
    image_size: int = _setting(256, "Input side of a new SAM, in pixels.")
    hidden_size: int = _setting(128, "Width of a new SAM's vision encoder.")
    layers: int = _setting(6, "Layers of a new SAM's vision encoder.")
    heads: int = _setting(4, "Attention heads of a new SAM's vision encoder.")
    decoder_size: int = _setting(128, "Width of a new SAM's decoder.")
    surrogate: list[str] = field(
        default_factory=lambda: ["sam"],
        metadata={
            "help": "One or several of 'sam' (the generator's SAM architecture, prompted; the paper's), 'unet' (a "
            "small U-Net) and other victims of the audit, NAME or NAME@CHECKPOINT, which see no prompt; trained side "
            "by side."
        },
    )
    surrogate_size: list[int] = field(
        default_factory=lambda: [512], metadata={"help": "Input side of each surrogate, in pixels."}
    )
    surrogate_checkpoint: str | None = _setting(
        None, "SAM checkpoint that a 'sam' surrogate starts from; none: scratch."
    )
    surrogate_encoder: str | None = _setting(
        None, "MAE ViT checkpoint that the encoder of a 'sam' surrogate starts from (the authors': vit-mae-base)."
    )
    surrogate_width: int = _setting(16, "Channels of a 'unet' surrogate at half size.")
    mixed_precision: str | None = _setting(
        None,
        "'no' or 'bf16'; none: as the launcher says. bf16 pays on GPUs and on CPUs with bf16 matrix units only.",
    )
    protect_epsilon: float | None = _setting(
        None,
        "Budget inside the mask that the finished generator protects with, 0 to 1; none, here and in the next three: "
        "as a UnSeg checkpoint says, or 8/255.",
    )
    protect_epsilon_background: float | None = _setting(
        None, "The same outside the mask, 0 to protect_epsilon; none: as said, or 2/255."
    )
    proposal_iou: float | None = _setting(
        None, "Predicted IoU above which the finished generator proposes a segment by itself; none: as said, or 0.88."
    )
    proposal_stability: float | None = _setting(
        None, "Stability (IoU at the thresholds +1 and -1) above which it does; none: as said, or 0.95."
    )


@dataclass
class DataArguments:
    """What decides the samples."""

    train_data: list[str] = field(metadata={"help": "Sources of images and masks, [KIND:]LOCATION[,option=value]..."})
    epoch_size: int | None = _setting(
        None, "Images an epoch; none: all, which streamed sources cannot tell and weighted ones need not mean."
    )
    min_scale: float = _setting(0.1, "Large-scale jitter: smallest factor on the input side.")
    max_scale: float = _setting(2.0, "Large-scale jitter: largest factor on the input side.")
    stretch: bool = _setting(
        False,
        "Images are stretched to the generator's square, in training and by the finished generator, and not padded "
        "(the paper pads): noise then lies alike in images of all shapes.",
    )
    max_masks: int = _setting(1, "A sample's mask is the union of 1 to this many masks of its image.")


@dataclass
class RunArguments:
    """Where and how the run happens; a resumed run may change all of it."""

    output_dir: str = field(metadata={"help": "Gets the generator, its card, logs/, validation/ and checkpoints/."})
    resume: bool = _setting(False, "Go on from the newest checkpoint in output_dir.")
    validation_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Sources of held-out images, named as train_data; none: no validation."},
    )
    validation_size: int = _setting(64, "Held-out images looked at in a validation.")
    workers: int = _setting(0, "Processes that load data, for each training process.")
    gradient_checkpointing: bool = _setting(
        False, "Compute activations again in the backward pass instead of keeping them: less memory, a third slower."
    )
    compile: bool = _setting(False, "torch.compile the encoder and the surrogates; needs a C++ compiler on CPUs.")
    tracker: str = _setting("tensorboard", "'tensorboard', 'trackio', 'wandb' or 'none'.")
    save_code: bool = _setting(True, "Save the model's code beside the weights, for trust_remote_code.")
    push_to_hub: bool = _setting(False, "Upload the finished generator with its card to hub_model_id.")
    hub_model_id: str | None = _setting(None, "'user/name' on the Hub.")
    hub_private: bool = _setting(False, "Make a new repository on the Hub private.")


def parse(arguments: list[str]):
    """The four groups of settings; `--config FILE.json` is read first, what follows it overrides it."""
    from transformers import HfArgumentParser

    from unseg_hf.training.configuration_bilevel import BilevelConfig

    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config")
    config, arguments = files.parse_known_args(arguments)
    groups = (ModelArguments, DataArguments, RunArguments, BilevelConfig)
    if config.config:
        arguments = words_of(Path(config.config), {f.name for group in groups for f in fields(group)}) + arguments
    description = f"{__doc__.splitlines()[0]} --config FILE.json gives settings that the command line overrides."
    return HfArgumentParser(groups, description=description).parse_args_into_dataclasses(arguments)


def words_of(file: Path, known: set[str]) -> list[str]:
    """The settings of a configuration file as words of a command line; null is a setting's default.

    Raises:
        ValueError: a file that is not such, naming what is wrong.
    """
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__}: needs an object of settings and values")
    for name in values.keys() - known:
        close = difflib.get_close_matches(name, known, 1)
        raise ValueError(f"{file}: there is no setting {name!r}" + (f"; {close[0]!r}?" if close else ""))
    lists = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [w for name, value in lists.items() if value != [None] for w in (f"--{name}", *map(str, value))]


def sam_config(image_size: int, hidden_size: int, layers: int, heads: int, decoder_size: int):
    """A small SAM without relative positions, every second layer with global attention."""
    from transformers import SamConfig

    from unseg_hf.evaluation.victims.checkpoints import sam_config_at

    config = SamConfig(
        vision_config={
            "hidden_size": hidden_size,
            "output_channels": decoder_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "use_rel_pos": False,
            "window_size": 8,
            "global_attn_indexes": list(range(1, layers, 2)),
            "num_pos_feats": decoder_size // 2,
        },
        prompt_encoder_config={"hidden_size": decoder_size},
        mask_decoder_config={
            "hidden_size": decoder_size,
            "mlp_dim": 4 * decoder_size,
            "iou_head_hidden_dim": decoder_size,
        },
    )
    return sam_config_at(config, image_size)


def build_generator(args: ModelArguments):
    """The generator, with a new noise head unless the checkpoint has one."""
    import torch

    from unseg_hf.configuration_unseg import UnSegConfig
    from unseg_hf.modeling_unseg import UnSegModel
    from unseg_hf.training.bilevel import keep_first_noise

    finished = {
        "epsilon": args.protect_epsilon,
        "epsilon_background": args.protect_epsilon_background,
        "proposal_iou": args.proposal_iou,
        "proposal_stability": args.proposal_stability,
    }
    finished = {name: value for name, value in finished.items() if value is not None}
    if args.sam:
        # In fp32, whatever it was stored in: so are the new weights, and the optimizer's steps.
        model = UnSegModel.from_pretrained(args.sam, freeze_sam=not args.train_sam, dtype=torch.float32, **finished)
        keep_first_noise(model)
        if args.new_noise_head:
            model.noise_head = UnSegModel(model.config).noise_head
        return model
    sizes = (args.image_size, args.hidden_size, args.layers, args.heads, args.decoder_size)
    return UnSegModel(UnSegConfig(sam_config=sam_config(*sizes), freeze_sam=False, **finished))


def sharpness_of(args: ModelArguments, stretch: bool) -> float:
    """That of the processor of the UnSeg checkpoint that is trained on.

    Raises:
        ValueError: it sees images in another way.
    """
    from unseg_hf.processing_unseg import UnSegProcessor

    try:
        processor = UnSegProcessor.from_pretrained(args.sam) if args.sam else None
    except OSError:  # a SAM alone
        processor = None
    if processor is None:
        return 1.0
    if processor.stretch and not stretch:
        raise ValueError(f"{args.sam} stretches images to its square: pass --stretch True, or start from a plain SAM")
    return processor.sharpness


def build_surrogates(args: ModelArguments, generator):
    """The surrogates, those of SAM's architecture shaped like the generator's."""
    from unseg_hf.evaluation.victims.checkpoints import sam_config_at
    from unseg_hf.training.surrogates import (
        SamSurrogate,
        Surrogates,
        UNetSurrogate,
        VictimSurrogate,
        load_mae_encoder,
    )

    if len(args.surrogate) != len(args.surrogate_size):
        raise ValueError(
            f"--surrogate_size has {len(args.surrogate_size)} values for {len(args.surrogate)} surrogates: pass one "
            "for each"
        )
    if args.surrogate_checkpoint and args.surrogate_encoder:
        raise ValueError("--surrogate_checkpoint and --surrogate_encoder were given: a surrogate starts from one")
    if (start := args.surrogate_checkpoint or args.surrogate_encoder) and "sam" not in args.surrogate:
        raise ValueError(f"{start} is for a sam surrogate, and --surrogate is {' '.join(args.surrogate)}")
    prompt_size = generator.config.sam_config.vision_config.image_size

    def build(kind: str, size: int):
        if kind == "unet":
            return UNetSurrogate(args.surrogate_width, size)
        if kind != "sam":
            return VictimSurrogate(kind, size)
        if args.surrogate_checkpoint:
            return SamSurrogate.from_checkpoint(args.surrogate_checkpoint, size, prompt_size)
        surrogate = SamSurrogate(sam_config_at(generator.config.sam_config, size), prompt_size)
        if args.surrogate_encoder:
            load_mae_encoder(surrogate, args.surrogate_encoder)
        return surrogate

    return Surrogates(
        partial(build, kind, size) for kind, size in zip(args.surrogate, args.surrogate_size, strict=True)
    )


def accelerator_of(model_args: ModelArguments, run: RunArguments, config):
    """Devices, processes, precision and the tracker."""
    from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

    from unseg_hf.training.processes import build_accelerator

    if run.tracker not in ("tensorboard", "trackio", "wandb", "none"):
        raise ValueError(f"--tracker {run.tracker}: must be tensorboard, trackio, wandb or none")
    if run.tracker != "none":
        try:
            __import__(run.tracker)
        except ImportError as error:
            raise ValueError(
                f"--tracker {run.tracker} is not installed: pip install {run.tracker}, or pass --tracker none"
            ) from error
    accelerator = build_accelerator(
        mixed_precision=model_args.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if run.tracker == "none" else run.tracker,
        project_config=ProjectConfiguration(run.output_dir, logging_dir=str(Path(run.output_dir) / "logs")),
        # With one kind of prompt in a step, some parameters have no gradient in it.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    model_args.mixed_precision = accelerator.mixed_precision
    return accelerator


def model_card(run: RunArguments, decisive: dict, data, validation, hours: float) -> str:
    """`model_card.md`, filled with what is known at the end of a run."""
    from importlib.metadata import version

    from unseg_hf.training.publishing import fill_model_card

    def public(value):
        """A local path without the folders that are nobody's business."""
        local = isinstance(value, str) and (Path(value).is_absolute() or ".." in Path(value).parts)
        return Path(value).name if local else value

    settings = {name: public(value) for name, value in decisive.items() if name != "train_data"}
    sources = zip(decisive["train_data"], data.sources, strict=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "unseg-hf"))
    log = [json.loads(line) for line in (Path(run.output_dir) / "training_log.jsonl").read_text().splitlines()]
    validations = [entry for entry in log if "images_per_second" not in entry]
    results = "No victim has been trained yet: `unseg audit` does, beside control noises."
    if validation and validations:
        figures = {name.replace("_", " "): value for name, value in validations[-1].items() if name != "step"}
        results += (
            f"\n\nThe surrogates, on {len(validation)} held-out images at the end of training (mean IoU, with the "
            "budget of the training). They were trained on protected images alone, so a gap says that they read the "
            "noise:\n\n| | IoU |\n|---|---|\n"
        ) + "\n".join(f"| {name} | {value:.3f} |" for name, value in figures.items())
    # Of a folder as it was given: under its last part alone nothing finds it.
    name = run.hub_model_id or public(run.output_dir)
    return fill_model_card(
        (Path(__file__).parent.parent / "model_card.md").read_text(),
        name=Path(name).name,
        model_id=name,
        data="\n".join(_described(spec, public(source.name), source.size) for spec, source in sources),
        settings=f"{log[-1]['step']} steps; the last run of the command took {hours:.1f} hours. {packages}.\n\n"
        f"```json\n{json.dumps(settings, indent=2)}\n```",
        results=results,
        limits=f"- Sees images at {data.image_size} px; the noise is enlarged from a quarter of that.\n"
        "- Nothing is claimed of victims, data and post-processing other than those that the results name.\n"
        "- Whoever has many protected images may find and remove what their noises have in common.",
        licence="Apache-2.0, as SAM's. The training data have licences of their own.",
    )


def _described(spec: str, name: str, size: int | None) -> str:
    """A line on a source of training data: its name, how it was read, and its number of images."""
    options = spec.partition(",")[2]
    return f"- {name}" + (f" ({options})" if options else "") + (f": {size} images" if size else "")


def main(arguments: list[str] | None = None) -> None:
    model_args, data_args, run, config = parse(sys.argv[1:] if arguments is None else arguments)

    from accelerate.utils import set_seed

    from unseg_hf.data.interactive import InteractiveSegmentation
    from unseg_hf.data.sources import parse_source
    from unseg_hf.processing_unseg import UnSegProcessor
    from unseg_hf.training.bilevel import train
    from unseg_hf.training.publishing import check_hub, push_generator, save_generator
    from unseg_hf.training.surrogates import checkpoint_activations
    from unseg_hf.worker_processes import alone

    accelerator = accelerator_of(model_args, run, config)
    if run.push_to_hub and not run.hub_model_id:
        raise ValueError("--push_to_hub needs --hub_model_id user/name")
    if run.push_to_hub and accelerator.is_main_process:
        # Before hours of training, not after them.
        run.hub_model_id = check_hub(run.hub_model_id)
    sources = [parse_source(spec) for spec in data_args.train_data]
    held_out = [parse_source(spec) for spec in run.validation_data]
    set_seed(config.seed)
    generator = build_generator(model_args)
    surrogates = build_surrogates(model_args, generator)
    image_size = generator.config.sam_config.vision_config.image_size
    sharpness = sharpness_of(model_args, data_args.stretch)
    data = InteractiveSegmentation(
        sources,
        image_size,
        (data_args.min_scale, data_args.max_scale),
        data_args.max_masks,
        data_args.epoch_size,
        config.seed,
        data_args.stretch,
    )
    validation = None
    if held_out:
        sizes = [source.size for source in held_out]
        count = run.validation_size if None in sizes else min(run.validation_size, sum(sizes))
        validation = InteractiveSegmentation(
            held_out, image_size, (1.0, 1.0), epoch_size=count, stretch=data_args.stretch
        )
    if run.gradient_checkpointing:
        checkpoint_activations(surrogates)
        if not generator.config.freeze_sam:
            checkpoint_activations(generator)
    if run.compile:
        # In place: the names of the weights stay as they are.
        generator.sam.vision_encoder.compile()
        for surrogate in surrogates:
            surrogate.compile()

    decisive = asdict(model_args) | asdict(data_args) | {"epoch_size": len(data)}
    if model_args.sam:
        # Nothing that a checkpoint decides belongs into a card, or between a run and its resumption.
        decisive = {name: value for name, value in decisive.items() if name not in OF_A_NEW_SAM}
    everything = asdict(config) | decisive
    name = Path(run.output_dir).resolve().name
    accelerator.init_trackers(
        "unseg",
        config={k: v if isinstance(v, int | float) else str(v) for k, v in everything.items()},
        init_kwargs={"trackio": {"name": name, "resume": "allow"}, "wandb": {"name": name}},
    )
    start = time.perf_counter()
    Path(run.output_dir).mkdir(parents=True, exist_ok=True)
    # Two runs in one folder would clear away each other's checkpoints.
    with alone(Path(run.output_dir)) if accelerator.is_main_process else contextlib.nullcontext():
        finished = train(
            generator,
            surrogates,
            data,
            config,
            run.output_dir,
            accelerator,
            validation=validation,
            settings=decisive,
            resume=run.resume,
            num_workers=run.workers,
            report=accelerator.print,
        )
    accelerator.end_training()
    if not finished:
        accelerator.print(f"stopped; the same command with --resume goes on from {run.output_dir}/checkpoints")
        raise SystemExit(130)
    if accelerator.is_main_process:
        card = model_card(run, everything, data, validation, (time.perf_counter() - start) / 3600)
        processor = UnSegProcessor.for_image_size(image_size, data_args.stretch, sharpness)
        save_generator(generator, processor, run.output_dir, card, with_code=run.save_code)
        accelerator.print(f"generator saved to {run.output_dir}")
        if run.push_to_hub:
            accelerator.print(f"uploaded to {push_generator(run.output_dir, run.hub_model_id, run.hub_private)}")


if __name__ == "__main__":
    from unseg_hf.training.publishing import HubError

    try:
        main()
    except (ImportError, ValueError, OSError, FloatingPointError, HubError) as error:
        # What these say is for the user; where it was said is not.
        sys.exit(f"train_generator: {error}")
