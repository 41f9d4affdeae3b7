"""The `unseg` command."""

import argparse
import json
import shlex
import sys
from pathlib import Path

from . import __version__
from .demo.serving import add_demo
from .evaluation.audit_command import add_audit
from .image_tasks import refuse_overwriting
from .layouts.command import add_protect_dataset
from .protect_command import add_protect, add_strength_options, decibels, load_protector

FAINT_BUDGET = 2 / 255  # the smallest in which noise is recognised


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 if an image failed, 2 for a request that makes no sense."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may be anything
    options = build_parser().parse_args(arguments)
    options.command_line = shlex.join(["unseg", *(sys.argv[1:] if arguments is None else arguments)])
    return run(options)


def run(options: argparse.Namespace) -> int:
    """Run a command whose options have been parsed; errors that a user can mend become one line."""
    try:
        return options.run(options)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        # RuntimeError: pathlib's word for a loop of links. ImportError: an extra that is not installed.
        said = str(error)
        if isinstance(error, OSError) and error.filename is not None and said.startswith("[Errno"):
            said = f"{error.filename}: {error.strerror}; check the path and your permissions"
        print(f"unseg: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("unseg: stopped; run it again to go on, what is finished is kept", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unseg", description="Publish images that spoil the segmentation models trained on them."
    )
    parser.add_argument("--version", action="version", version=f"unseg-hf {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_model_options(add_protect(commands)).add_argument(
        "--bf16",
        action="store_true",
        help="encode images in bfloat16: faster on devices with units for it, a few pixels one grey level away",
    )

    look = commands.add_parser(
        "inspect",
        help="compare a protected image with its original, or look for the noise in one image",
        description="Compare a pair of images; or, of one, tell whether it carries the generator's noise.",
    )
    look.set_defaults(run=run_inspect)
    look.add_argument("original", type=Path, help="or the only image, in which the noise is looked for")
    look.add_argument("protected", type=Path, nargs="?")
    look.add_argument("--mask", type=Path, metavar="FILE", help="measure inside and outside this mask")
    look.add_argument(
        "--published",
        type=Path,
        metavar="FILE",
        help="the protected image as a web site serves it, resized or recompressed: how much of the noise is left",
    )
    look.add_argument(
        "--picture", type=Path, metavar="FILE", help="write original, protected and amplified noise as PNG"
    )
    look.add_argument("--json", action="store_true", help="print JSON")
    _add_model_options(look)

    check = commands.add_parser(
        "verify",
        help="check a protected data set",
        description="Check what training_scripts/protect_dataset.py wrote: every file against the manifest, and with "
        "--originals every pixel against the bound.",
    )
    check.set_defaults(run=run_verify)
    check.add_argument("output", type=Path, metavar="OUT", help="folder of the protected data set")
    check.add_argument("--originals", nargs="+", metavar="IN", help="what was protected, as it was named then")
    check.add_argument("--masks", type=Path, metavar="PATH", help="the masks of a folder of images")

    _add_model_options(add_audit(commands))

    dataset = add_protect_dataset(commands)
    add_strength_options(dataset)
    _add_model_options(dataset)
    _add_model_options(add_demo(commands))
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("generator")
    group.add_argument("--model", metavar="ID", help="folder or Hub id (default: the embedded one)")
    group.add_argument("--device", default="cpu", help="cpu, cuda, mps (default: cpu)")
    return group


def run_inspect(options: argparse.Namespace) -> int:
    if options.protected is None:
        return _look_for_noise(options)
    from . import image_files
    from .inputs import read_region
    from .inspection import comparison_picture, inspect_pair

    if options.picture:
        if options.picture.suffix.lower() != ".png":
            raise ValueError(f"--picture {options.picture}: it is a PNG, so name it .png")
        given = [options.original, options.protected, options.mask, options.published]
        refuse_overwriting("--picture", [options.picture], given)
    original, protected = image_files.read(options.original), image_files.read(options.protected)
    region = None
    if options.mask:
        region = read_region(image_files.read_mask(options.mask), (original.height, original.width))
    published = image_files.read(options.published) if options.published else None
    figures = inspect_pair(original, protected, region, published)
    if options.picture:
        picture = image_files.from_pil(comparison_picture(original, protected))
        image_files.write(picture, options.picture, "png")
    if options.json:
        print(json.dumps(figures, indent=2))
        return 0
    where = "" if region is None else f" in the mask, {figures['max_noise_background']:g} outside"
    after = {"after JPEG 75": "left_after_jpeg75", "as published": "left_as_published"}
    print(f"max |noise|     {figures['max_noise']:g} of 255{where}")
    print(f"PSNR            {decibels(figures['psnr'])}")
    print(f"SSIM            {figures['ssim']:.4f}")
    for when, left in ((when, figures[name]) for when, name in after.items() if name in figures):
        print(f"{when:15} {'no noise to begin with' if left is None else f'{max(left, 0):.0%} of the noise is left'}")
    if options.picture:
        print(f"picture         {options.picture}")
    return 0


def _look_for_noise(options: argparse.Namespace) -> int:
    """`unseg inspect` of one image."""
    from . import image_files

    if given := [f"--{name}" for name in ("published", "picture") if getattr(options, name)]:
        raise ValueError(f"{' and '.join(given)}: for two images, the original and the protected one after it")
    from .inputs import Prompt
    from .noise_choice import without_colour
    from .protection import PROTECTED_BEFORE
    from .recognition import Recognition

    prompt = Prompt(mask=image_files.read_mask(options.mask) if options.mask else None)
    picture, embeddings = image_files.read(options.original), None
    protector = load_protector(options.model, options.device)
    # With the whole budget, and with one of those in which some generators have another noise.
    for epsilon in (None, FAINT_BUDGET):
        job = protector.prepare(picture, prompt, epsilon)
        embeddings = embeddings or protector.encode([job])[0]
        protected = protector.apply(job, protector.decode(job, embeddings))
        found, levels = protected.before, protected.epsilon * 255
        if found is None or found.sure:
            break
    noise, error = (None, None) if found is None else (found.share * levels, found.error * levels)
    if options.json:
        print(json.dumps({"noise": noise, "standard_error": error, "sure": found and found.sure}, indent=2))
        return 0
    if found is None:
        why = "hardly any pixel of it would get noise"
        if protected.tinted:
            why = "it would get a tint, which may be its own colour"
        elif without_colour(protected.original.pixels) or protected.original.pixels.shape[2] == 1:
            why = "it has no colour"
        print(f"{options.original}: whether it carries this generator's noise cannot be told: {why}")
    else:
        said = "it carries this generator's noise" if found.sure else "no sign of the noise that it would get"
        if found.unclear:
            said = "there may be a little of this generator's noise in it"
        elif not found.sure and not Recognition(1, found.error).sure:
            said = "what it shows would hide this generator's noise"
        print(f"{options.original}: {said} ({noise:.1f} of 255, standard error about {error:.1f})")
    for note in protected.notes:
        if note != PROTECTED_BEFORE:
            print(f"note: {note}")
    return 0


def run_verify(options: argparse.Namespace) -> int:
    from .bulk.verify import verify

    if options.masks and not options.originals:
        raise ValueError("--masks needs --originals")
    result = verify(options.output, options.originals, options.masks)
    for line in result.wrong:
        print(f"unseg: {line}", file=sys.stderr)
    what = "files and pixels" if options.originals else "files"
    unchecked = f"; {result.unchecked}" if result.unchecked else ""
    print(
        f"{options.output}: {result.images} images in {result.files} files, {len(result.wrong)} problem(s); "
        f"{what} checked{unchecked}; {result.failed_before} records could not be protected, see manifest/"
    )
    for sentence in result.unprotected:
        print(f"{options.output}: {sentence}")
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
