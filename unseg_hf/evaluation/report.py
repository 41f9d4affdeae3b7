"""The audit's report: what the figures of `results.json` say, in words, tables and plots.

`results` is everywhere the dict that [`unseg_hf.evaluation.audit.Audit.results`] returns.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

from unseg_hf.evaluation.controls import CONTROLS, UNWEIGHTED
from unseg_hf.evaluation.published_images import GENERATORS, ROUGH
from unseg_hf.image_files import put_in_place

Results = dict[str, Any]
RESULTS = "results.json"
TITLES = {
    "foreground_iou": "foreground IoU",
    "mean_iou": "mean IoU",
    "ap": "average precision",
    "pq": "panoptic quality",
    "object_iou": "mean IoU of the prompted objects",
}
CLEARLY = 1.2
"""A victim trained on clean images has learned something if its score is so many times the trivial one."""

LEAST = 0.02
"""Scores below this are too near nothing to be compared."""

WIDTH = 120
NOT_YET = "not yet"


def scores(
    results: Results, noise: str, treatment: str, victim: str, training: str = "plain", clean_share: float = 0.0
) -> list[float]:
    """The score of each seed that is done, in the order of the seeds; empty if none is."""
    found = _trained(results, noise, treatment, victim, training, clean_share)
    return [one[results["score"]] or 0.0 for one in found]


def _trained(results: Results, *cell: str | float) -> list[dict[str, Any]]:
    """All scores of the seeds that are done of a noise, treatment, victim, training and share, in order of seeds."""
    keys = ("noise", "treatment", "victim", "training", "clean_share")
    found = [one for one in results["cells"] if tuple(one[key] for key in keys) == cell]
    return [one["scores"] for one in sorted(found, key=lambda one: one["seed"])]


def retained_utility(
    results: Results, noise: str, treatment: str, victim: str, training: str = "plain"
) -> float | None:
    """Mean score over the seeds, divided by that of clean images with the same treatment, victim and training.

    None if one of the two is not there, or the clean one is too near 0 to divide by.
    """
    protected, clean = (scores(results, one, treatment, victim, training) for one in (noise, "clean"))
    if not protected or not clean or mean(clean) < LEAST:
        return None
    return mean(protected) / mean(clean)


def summary(results: Results) -> str:
    """What the audit found, in plain words: for each victim and way of protecting, then what limits the findings."""
    grid = results["grid"]
    if "clean" not in grid["noises"] or not _generators(results):
        missing = "clean" if "clean" not in grid["noises"] else "generator"
        paragraphs = [
            f"The grid has no `{missing}` among its noises, so nothing can be said of what protection leaves."
        ]
    else:
        pairs = product(grid["victims"], _generators(results))
        # Of a victim that learned nothing from clean images the same is said whatever the protection.
        paragraphs = dict.fromkeys(_finding(results, *pair) for pair in pairs)
    return "\n\n".join([*paragraphs, "\n".join(f"- {caveat}" for caveat in _caveats(results))]).strip()


def _generators(results: Results) -> list[str]:
    return [noise for noise in results["grid"]["noises"] if noise in GENERATORS]


def _finding(results: Results, victim: str, generator: str) -> str:
    treatments, trainings = results["grid"]["treatments"], results["grid"]["trainings"]
    base, training = treatments[0], trainings[0]
    clean = scores(results, "clean", base, victim, training)
    protected = scores(results, generator, base, victim, training)
    start = f"**{victim}**: "
    if clean and not _has_learned(results, mean(clean)):
        more = "hardly more" if mean(clean) >= results["trivial_score"] else "less"
        return (
            f"{start}trained on clean images it reached {mean(clean):.3f}, {more} than the "
            f"{results['trivial_score']:.3f} of a model that has learned nothing from the images. Nothing can be "
            "concluded from it about any noise; train it for longer, or on more images."
        )
    if not clean or not protected:
        return f"{start}its victims on clean and on protected images are not both trained yet."
    after = "" if base == "none" else f", after {base},"
    lines = [
        f"{start}a model trained on {GENERATORS[generator]}{after} reached {mean(protected):.3f}, "
        f"{_percent(mean(protected) / mean(clean))} of the {mean(clean):.3f} that it reached on clean ones"
    ]
    if (random := retained_utility(results, "random", base, victim, training)) is not None:
        lines[0] += f"; random noise of the same strength: {_percent(random)}"
    lines[0] += "."
    lines.append(_beside_controls(results, generator, base, victim, training))
    if not _protects_nothing(protected, clean):
        lines.append(_worst_treatment(results, generator, victim, training))
        lines.append(_elsewhere(results, generator, victim))
    return " ".join(line for line in lines if line)


def _beside_controls(results: Results, generator: str, treatment: str, victim: str, training: str) -> str:
    """How a generator does beside the strongest control; what is within the spread of seeds counts as the same."""
    protected = scores(results, generator, treatment, victim, training)
    clean = scores(results, "clean", treatment, victim, training)
    nothing = _protects_nothing(protected, clean)
    does = ""
    if nothing:
        does = "It protects nothing: that is within the spread of the seeds, or above."
    elif max(protected) >= min(clean):
        does = f"Not with every seed: one of its victims reached {max(protected):.3f}, as those of clean images do."
    controls = {
        noise: found
        for noise in results["grid"]["noises"]
        if noise in CONTROLS and (found := scores(results, noise, treatment, victim, training))
    }
    if not controls:
        return f"{does} No control stands beside it, so nothing says what the noise itself adds.".strip()
    best = min(controls, key=lambda noise: mean(controls[noise]))
    retained = _percent(mean(controls[best]) / mean(clean))
    control = f"the control `{best}`" + (", which spends more," if best in UNWEIGHTED else "")
    beside = f"The strongest control, `{best}`, left {retained}."
    if not nothing and mean(protected) >= mean(controls[best]):
        beside = f"No better than {control} at {retained}: what it does needs no learning."
    elif not nothing and max(protected) >= min(controls[best]):
        beside = f"The seeds overlap with those of {control} at {retained}: nothing says yet that it does more."
    return f"{does} {beside}".strip()


def _worst_treatment(results: Results, generator: str, victim: str, training: str) -> str | None:
    """What takes most of the protection, of the treatments that were tried."""
    left = {
        treatment: retained
        for treatment in results["grid"]["treatments"][1:]
        if (retained := retained_utility(results, generator, treatment, victim, training)) is not None
        and _has_learned(results, mean(scores(results, "clean", treatment, victim, training)))
    }
    if not left:
        return None
    worst = max(left, key=left.__getitem__)
    if left[worst] <= retained_utility(results, generator, results["grid"]["treatments"][0], victim, training):
        return f"None of {len(left)} treatments costs it anything: after {worst} it leaves {_percent(left[worst])}."
    protected, clean = (scores(results, noise, worst, victim, training) for noise in (generator, "clean"))
    nothing = ", where it protects nothing" if _protects_nothing(protected, clean) else ""
    return f"Of {len(left)} treatments, {worst} costs it most: {_percent(left[worst])}{nothing}."


def _elsewhere(results: Results, generator: str, victim: str) -> str:
    """What is left under the grid's other trainings, and where part of the images is clean."""
    grid = results["grid"]
    base, training = grid["treatments"][0], grid["trainings"][0]
    lines = []
    for other in grid["trainings"][1:]:
        clean = scores(results, "clean", base, victim, other)
        retained = retained_utility(results, generator, base, victim, other)
        if retained is not None and _has_learned(results, mean(clean)):
            lines.append(f"Under {other} training it leaves {_percent(retained)}.")
    whole = mean(scores(results, "clean", base, victim, training))
    for share in grid["clean_shares"][1:]:
        mixed, alone = (scores(results, noise, base, victim, training, share) for noise in (generator, "clean"))
        if mixed and alone:
            lines.append(
                f"With {_percent(share)} of the images clean it leaves {_percent(mean(mixed) / whole)}; those alone, "
                f"without any other, teach {_percent(mean(alone) / whole)}."
            )
    return " ".join(lines)


def _protects_nothing(protected: Sequence[float], clean: Sequence[float]) -> bool:
    """Whether its victims are on average no worse than some victim of clean images: within the spread of seeds."""
    return mean(protected) >= min(clean)


def _has_learned(results: Results, clean: float) -> bool:
    trivial = results["trivial_score"]
    # Where a model that has learned nothing has nearly all there is, a share of what is left.
    return clean >= max(LEAST, min(CLEARLY * trivial, trivial + (CLEARLY - 1) * (1 - trivial)))


def _caveats(results: Results) -> list[str]:
    grid, done = results["grid"], len(results["cells"])
    caveats = [html.escape(note, quote=False) for note in results["notes"]]  # names of files may be anything
    if len(grid["seeds"]) < 3:
        caveats.append(f"{len(grid['seeds'])} seed(s): too few for a claim, which needs three.")
    if done < results["planned"]:
        caveats.append(f"{results['planned'] - done} of {results['planned']} victims of the grid are not trained.")
    if larger := [f"`{noise}`" for noise in grid["noises"] if noise in (*UNWEIGHTED, *ROUGH)]:
        caveats.append(f"Spend more, having the full bound beyond the objects too: {', '.join(larger)}.")
    if results["settings"]["test_images"] < 50:
        caveats.append(f"{results['settings']['test_images']} test images: a score of so few says little.")
    if results["settings"]["train_images"] < 300:
        caveats.append(
            f"{results['settings']['train_images']} training images: victims of so few have been seen to learn the "
            "images before they learn the noise, which makes any noise look weak."
        )
    return caveats


def terminal_table(results: Results) -> str:
    """Retained utility in percent, noise by treatment, a block for each victim and training; 120 columns at most."""
    blocks = []
    for victim, training in product(results["grid"]["victims"], results["grid"]["trainings"]):
        rows = _retained_rows(results, victim, training)
        if len(rows[0]) > 1:
            blocks.append(f"retained utility, {victim}, {training} training\n{_aligned(rows)}")
    return "\n\n".join(blocks)


def _retained_rows(results: Results, victim: str, training: str) -> list[list[str]]:
    treatments = _treatments_with(results, victim, training)
    rows = [["noise", *treatments]]
    for noise in results["grid"]["noises"]:
        if noise != "clean":
            values = [retained_utility(results, noise, treatment, victim, training) for treatment in treatments]
            rows.append([noise, *("-" if value is None else _percent(value) for value in values)])
    return rows


def _treatments_with(results: Results, victim: str, training: str) -> list[str]:
    """The treatments that have any victim, in the order of the grid."""
    there = {c["treatment"] for c in results["cells"] if (c["victim"], c["training"]) == (victim, training)}
    return [treatment for treatment in results["grid"]["treatments"] if treatment in there]


def _aligned(rows: list[list[str]]) -> str:
    """Rows of text in columns, in several blocks below each other where they are too wide."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    blocks: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        if blocks[-1] and widths[0] + sum(widths[c] + 2 for c in [*blocks[-1], column]) > WIDTH:
            blocks.append([])
        blocks[-1].append(column)
    return "\n\n".join(
        "\n".join(
            "  ".join([row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in block)]).rstrip()
            for row in rows
        )
        for block in blocks
    )


def report_markdown(results: Results, plots: Sequence[str] = ()) -> str:
    """The report; `plots` are the paths of its pictures."""
    settings, grid = results["settings"], results["grid"]
    title = TITLES.get(results["score"], results["score"])
    sections = [
        "# Does it protect? An audit",
        summary(results),
        f"Scores are {title} on {settings['test_images']} clean test images, mean (smallest to largest) of seeds "
        f"{', '.join(map(str, grid['seeds']))}, after training on {settings['train_images']} published images that "
        "were treated as the column says. In brackets the retained utility: the score divided by that of clean images "
        "treated alike. Lower is better protected; a noise counts for as much as it does better than the controls. A "
        f"model that has learned nothing from the images has {results['trivial_score']:.3f}.",
        *(f"![{Path(plot).stem}]({plot})" for plot in plots),
    ]
    for training, victim in product(grid["trainings"], grid["victims"]):
        if treatments := _treatments_with(results, victim, training):
            rows = [
                [_label(noise), *(_cell(results, noise, treatment, victim, training) for treatment in treatments)]
                for noise in grid["noises"]
            ]
            sections += [f"## {victim}, {training} training", _table(["noise", *treatments], rows)]
    if len(grid["clean_shares"]) > 1:
        sections += ["## Part of the training images clean", _clean_share_table(results)]
    if settings["num_classes"] > 2 and settings["task"] == "semantic":
        sections += ["## IoU by class", _class_table(results)]
    sections += [
        "## The noises",
        _noise_table(results),
        "Measured on the published PNG files; SSIM on the first "
        f"{max(noise['measured']['ssim_images'] for noise in results['noises'].values())} of them.",
        "## Settings",
        f"```\n{results['command']}\n```",
        f"```json\n{json.dumps(settings | {'grid': grid}, indent=2)}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def _cell(results: Results, noise: str, treatment: str, victim: str, training: str, clean_share: float = 0.0) -> str:
    found = scores(results, noise, treatment, victim, training, clean_share)
    seeds = len(results["grid"]["seeds"])
    if not found:
        return NOT_YET
    spread = f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else ""
    partial = f", {len(found)} of {seeds} seeds" if len(found) < seeds else ""
    retained = retained_utility(results, noise, treatment, victim, training) if clean_share == 0 else None
    share = f" [{_percent(retained)}]" if retained is not None and noise != "clean" else ""
    return f"{mean(found):.3f}{spread}{share}{partial}"


def _clean_share_table(results: Results) -> str:
    grid = results["grid"]
    base, training = grid["treatments"][0], grid["trainings"][0]
    rows = []
    for victim, noise in product(grid["victims"], grid["noises"]):
        label = "those clean images alone, as many steps" if noise == "clean" else _label(noise)
        cells = [_cell(results, noise, base, victim, training, share) for share in grid["clean_shares"][1:]]
        rows.append([victim, label, *cells])
    return _table(["victim", "the rest", *(f"{share:.0%} clean" for share in grid["clean_shares"][1:])], rows)


def _class_table(results: Results) -> str:
    grid = results["grid"]
    rows = []
    for victim, noise in product(grid["victims"], ("clean", *_generators(results))):
        trained = _trained(results, noise, grid["treatments"][0], victim, grid["trainings"][0], 0.0)
        if found := [scores["per_class_iou"] for scores in trained]:
            columns = [[value for value in column if value is not None] for column in zip(*found, strict=True)]
            rows.append([victim, noise, *(f"{mean(column):.3f}" if column else "-" for column in columns)])
    return _table(["victim", "noise", *(f"class {value}" for value in results["settings"]["classes"])], rows)


def _noise_table(results: Results) -> str:
    rows = []
    for noise in results["grid"]["noises"]:
        measured = results["noises"][noise]["measured"]
        psnr = "unchanged" if measured["mean_psnr"] is None else f"{measured['mean_psnr']:.1f} dB"
        bounds = [f"{measured[key]}/255" for key in ("max_inside", "max_outside")]
        rows.append([_label(noise), psnr, f"{measured['mean_ssim']:.4f}", *bounds])
    return _table(["noise", "PSNR", "SSIM", "largest change in the region", "elsewhere"], rows)


def _label(noise: str) -> str:
    if noise in UNWEIGHTED:
        return f"{noise} (control; spends more)"
    if noise in CONTROLS:
        return f"{noise} (control)"
    return f"**{noise}**{' (spends more)' if noise in ROUGH else ''}" if noise in GENERATORS else noise


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _percent(share: float) -> str:
    return f"{share:.0%}"


def plot_treatments(results: Results):
    """Scores by treatment, a panel for each victim and training: points are means, bars reach from the smallest seed
    to the largest, the generator is drawn boldly over the controls.

    Raises:
        ImportError: matplotlib is not installed.
    """
    grid = results["grid"]
    panels = [
        (victim, training, treatments)
        for training, victim in product(grid["trainings"], grid["victims"])
        if (treatments := _treatments_with(results, victim, training))
    ]
    widest = max(len(treatments) for *_, treatments in panels)
    figure, axes = _figure(len(panels), 1, width=max(6.0, 1.5 + 1.2 * widest), height=2.6)
    for axis, (victim, training, treatments) in zip(axes, panels, strict=True):
        for index, noise in enumerate(grid["noises"]):
            offset = 0.8 * ((index + 0.5) / len(grid["noises"]) - 0.5)
            style = _style(noise)
            for column, treatment in enumerate(treatments):
                if found := scores(results, noise, treatment, victim, training):
                    at = column + offset
                    bar = {key: style[key] for key in ("color", "linewidth")}
                    axis.plot([at, at], [min(found), max(found)], **bar)
                    axis.plot([at], [mean(found)], **style)
        for column in range(1, len(treatments)):
            axis.axvline(column - 0.5, color="0.9", linewidth=0.8)
        axis.axhline(results["trivial_score"], color="0.4", linestyle="--", linewidth=1)
        axis.set_xticks(range(len(treatments)), [name.replace("+", " +\n") for name in treatments], fontsize=8)
        axis.set_xlim(-0.5, len(treatments) - 0.5)
        axis.set_ylim(0, None)
        axis.set_ylabel(TITLES.get(results["score"], results["score"]))
        axis.set_title(f"{victim}, {training} training (dashed: nothing learned)", loc="left", fontsize=9)
    _legend(figure, grid["noises"])
    return figure


def plot_clean_shares(results: Results):
    """Score by the share of clean images, a panel for each victim, beside those clean images alone; None without."""
    grid = results["grid"]
    shares = grid["clean_shares"]
    if len(shares) < 2:
        return None
    figure, axes = _figure(1, len(grid["victims"]), width=4.6, height=3.6)
    base, training = grid["treatments"][0], grid["trainings"][0]
    for axis, victim in zip(axes, grid["victims"], strict=True):
        for noise in grid["noises"]:
            found = {share: scores(results, noise, base, victim, training, share) for share in shares}
            # Of clean images alone, share 0 is all of them.
            points = {(1.0 if noise == "clean" and share == 0 else share): one for share, one in found.items() if one}
            ordered = sorted(points)
            axis.plot(
                ordered,
                [mean(points[share]) for share in ordered],
                **_style(noise),
            )
        axis.set_xlabel("share of clean training images")
        axis.set_ylabel(TITLES.get(results["score"], results["score"]))
        axis.set_ylim(0, None)
        axis.set_title(victim, loc="left", fontsize=10)
    _legend(figure, grid["noises"], {"clean": "clean images alone"})
    return figure


def _figure(rows: int, columns: int, width: float, height: float):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plots of a report need matplotlib; run pip install 'unseg-hf[audit]'") from error
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=120)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


# Okabe and Ito's colours, which most colour-blind people tell apart; controls are paler than the generator.
_COLOURS = {
    "clean": "#000000",
    "generator": "#D55E00",
    "generator-per-segment": "#E69F00",
    "generator-boxes": "#882255",
    "generator-found": "#117733",
    "generator-whole-image": "#332288",
    "random": "#999999",
    "stripes": "#0072B2",
    "bands": "#F0E442",
    "coarse": "#BBBBBB",
    "colour": "#CC79A7",
    "patches": "#009E73",
    "whole": "#56B4E9",
}
_MARKERS = {
    "clean": "s",
    "generator": "o",
    "generator-per-segment": "D",
    "generator-boxes": "P",
    "generator-found": "v",
    "generator-whole-image": "X",
}


def _style(noise: str) -> dict[str, Any]:
    control = noise in CONTROLS
    return {
        "color": _COLOURS[noise],
        "linewidth": 1.2 if control else 2.4,
        "marker": _MARKERS.get(noise, "v"),
        "markersize": 5 if control else 8,
        "markeredgecolor": _COLOURS[noise] if control else "white",
        "markeredgewidth": 0.5,
    }


def _legend(figure, noises: Sequence[str], names: dict[str, str] | None = None) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=(names or {}).get(noise, noise), **_style(noise)) for noise in noises]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(5, len(handles)), fontsize=8, frameon=False)


def write_report(folder: Path, results: Results) -> list[Path]:
    """Write `results.json`, `report.md` and `plots/`, each file whole or not at all.

    Returns:
        The files that were written.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: a figure is not finite, which JSON cannot hold.
    """
    files = {RESULTS: (json.dumps(results, indent=2, allow_nan=False) + "\n").encode()}
    if results["cells"]:
        for name, figure in (("treatments", plot_treatments(results)), ("clean_shares", plot_clean_shares(results))):
            if figure is not None:
                files[f"plots/{name}.png"] = _png(figure)
    pictures = [name for name in files if name.endswith(".png")]
    shown = results["settings"]["examples"] and (folder / "examples.png").is_file()
    pictures += ["examples.png"] if shown else []
    files["report.md"] = report_markdown(results, pictures).encode()
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        put_in_place(data, folder / name)
    return [folder / name for name in files]


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
