"""Measure whether a noise protects: publish, train victims, test them on clean images, controls beside it.

The grid of the defaults, 4 noises x 2 post-processings x 3 seeds = 24 victims (about 40 s each on two CPU cores for
ECSSD's 761 training images):

    python training_scripts/evaluate_protection.py \\
        --train data/ecssd/train.parquet --test data/ecssd/test.parquet --output runs/ecssd

A quick look, under a minute, at a checkpoint of your own:

    python training_scripts/evaluate_protection.py \\
        --train data/ecssd/train.parquet --test data/ecssd/test.parquet --output runs/quick \\
        --model runs/my-checkpoint --noises clean generator stripes --post_processings none --seeds 0 \\
        --max_train 64 --max_test 32 --epochs 4

The same command again goes on where an interrupted run stopped. The output folder gets `published/<noise>/*.png`,
`results.json` (every victim) and `results.md` (the table).
"""

from __future__ import annotations

import shlex
import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the evaluation; `arguments` replaces the command line's."""
    from transformers import HfArgumentParser

    from unseg_hf.evaluation.protection_evaluation import ProtectionEvaluationConfig, evaluate_protection

    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser(ProtectionEvaluationConfig, description=__doc__.splitlines()[0])
    try:
        (config,) = parser.parse_args_into_dataclasses(arguments)
    except ValueError as error:
        parser.error(str(error))
    command = shlex.join(["python", "training_scripts/evaluate_protection.py", *arguments])
    evaluate_protection(config, command, report=lambda line: print(line, flush=True))
    print(f"wrote {config.output}/results.json and {config.output}/results.md")


if __name__ == "__main__":
    main()
