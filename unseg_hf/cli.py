"""The `unseg` command."""

import argparse
import re
import shlex
import sys
from pathlib import Path

from . import __version__
from .demo.serving import add_demo
from .evaluation.audit_command import add_audit
from .inspect_command import add_inspect
from .layouts.command import add_protect_dataset
from .protect_command import add_protect, add_strength_options


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 if an image failed, 2 for a request that makes no sense."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names may be anything
    options = build_parser().parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    options.command_line = shlex.join(["unseg", *map(_public, given)])
    return run(options)


def _public(argument: str) -> str:
    """An argument as a report has it, which is published: names, and not where they lie on this machine."""
    option = re.match("--[a-z-]+=|-o(?=.)|", argument)[0]
    value = argument[len(option) :]
    return option + (Path(value).name or value if Path(value).is_absolute() else value)


def run(options: argparse.Namespace) -> int:
    """Run a command whose options have been parsed; errors that a user can mend become one line."""
    try:
        return options.run(options)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        # RuntimeError: pathlib's word for a loop of links. ImportError: an extra that is not installed.
        said = str(error)
        if isinstance(error, OSError) and error.filename is not None and said.startswith("[Errno"):
            said = f"{error.filename}: {error.strerror}; check the path and your permissions"
        from .image_files import printable

        print("\n".join(map(printable, f"unseg: {said}".split("\n"))), file=sys.stderr)
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

    _add_model_options(add_inspect(commands))

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
