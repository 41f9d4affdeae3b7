import json
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from unseg_hf.evaluation.report import (
    report_markdown,
    retained_utility,
    scores,
    summary,
    terminal_table,
    write_report,
)

MEASURED = {"images": 400, "max_inside": 8, "max_outside": 2, "mean_psnr": 36.2, "mean_ssim": 0.95, "ssim_images": 50}
UNTOUCHED = {"clean": 0.5, "generator": 0.05, "random": 0.48, "stripes": 0.3}


def results(figures: dict[tuple[str, str], float] | None = None, spread: float = 0.02, **changes) -> dict:
    """Three seeds of a U-Net: a mean for each noise and treatment, and one seed each above and below it."""
    figures = figures or {(noise, "none"): value for noise, value in UNTOUCHED.items()}
    noises, treatments = (list(dict.fromkeys(names)) for names in zip(*figures, strict=True))
    cells = [
        {"noise": noise, "treatment": treatment, "victim": "unet", "training": "plain", "clean_share": 0.0,
         "seed": seed, "scores": {"foreground_iou": value + (seed - 1) * spread}, "seconds": 1.0}
        for ((noise, treatment), value), seed in product(figures.items(), range(3))
    ]  # fmt: skip
    grid = {"noises": noises, "treatments": treatments, "victims": ["unet"], "trainings": ["plain"]}
    return {
        "command": "unseg audit data -o out",
        "settings": {"task": "semantic", "num_classes": 2, "classes": [0, 1], "train_images": 400, "test_images": 99,
                     "examples": 2},
        "score": "foreground_iou",
        "trivial_score": 0.2,
        "grid": grid | {"clean_shares": [0.0], "seeds": [0, 1, 2]},
        "noises": {noise: {"settings": {}, "measured": dict(MEASURED)} for noise in noises},
        "cells": cells,
        "planned": len(cells),
        "notes": [],
    } | changes  # fmt: skip


def test_the_plain_words_hold_the_figures():
    text = summary(results())
    assert "a model trained on the protected images reached 0.050, 10% of the 0.500 that it reached on clean" in text
    assert "random noise of the same strength: 96%" in text
    assert "The strongest control, `stripes`, left 60%" in text
    assert "nothing" not in text


def test_retained_utility_is_taken_from_clean_images_treated_alike():
    figures = {(noise, "none"): value for noise, value in UNTOUCHED.items()}
    figures |= {("clean", "greyscale"): 0.4, ("generator", "greyscale"): 0.3}
    found = results(figures)
    assert retained_utility(found, "generator", "greyscale", "unet") == pytest.approx(0.75)
    assert retained_utility(found, "generator", "none", "unet") == pytest.approx(0.1)
    assert retained_utility(found, "stripes", "greyscale", "unet") is None
    assert scores(found, "clean", "none", "unet") == pytest.approx([0.48, 0.5, 0.52])
    assert "Of 1 treatments, greyscale costs it most: 75%." in summary(found)


@pytest.mark.parametrize(
    ("generator", "stripes", "says", "does_not_say"),
    [
        (0.49, 0.51, "It protects nothing: that is within the spread of the seeds, or above.", "No better"),
        (
            0.49,
            0.2,
            "It protects nothing: that is within the spread of the seeds, or above. The strongest",
            "No better",
        ),
        (
            0.3,
            0.31,
            "The seeds overlap with those of the control `stripes` at 62%: nothing says yet that it does more.",
            "needs no learning",
        ),
        (0.31, 0.1, "No better than the control `stripes` at 20%: what it does needs no learning.", "overlap"),
        (0.2, 0.3, "The strongest control, `stripes`, left 60%.", "No better"),
    ],
)
def test_within_the_spread_of_seeds_nothing_is_claimed(generator, stripes, says, does_not_say):
    figures = UNTOUCHED | {"generator": generator, "stripes": stripes}
    text = summary(results({(noise, "none"): value for noise, value in figures.items()}))
    assert says in text
    assert does_not_say not in text


def test_a_treatment_after_which_it_protects_nothing_is_named():
    figures = {(noise, "none"): value for noise, value in UNTOUCHED.items()}
    figures |= {("clean", "half"): 0.5, ("generator", "half"): 0.2, ("clean", "jpeg75"): 0.45}
    figures |= {("generator", "jpeg75"): 0.44}
    assert "Of 2 treatments, jpeg75 costs it most: 98%, where it protects nothing." in summary(results(figures))


def test_treatments_that_take_nothing_of_the_protection_are_not_blamed():
    figures = {(noise, "none"): value for noise, value in UNTOUCHED.items()}
    figures |= {("clean", "half"): 0.5, ("generator", "half"): 0.02, ("clean", "jpeg75"): 0.5}
    figures |= {("generator", "jpeg75"): 0.04}
    text = summary(results(figures))
    assert "None of 2 treatments costs it anything: after jpeg75 it leaves 8%." in text
    assert "most" not in text


def test_a_seed_that_escapes_does_not_make_it_nothing():
    found = results()
    for cell, score in zip((c for c in found["cells"] if c["noise"] == "generator"), (0.01, 0.02, 0.485), strict=True):
        cell["scores"]["foreground_iou"] = score
    text = summary(found)
    assert "Not with every seed: one of its victims reached 0.485, as those of clean images do." in text
    assert "The seeds overlap with those of the control `stripes`" in text
    assert "protects nothing" not in text


def test_nothing_is_concluded_from_a_victim_that_learned_nothing():
    figures = {("clean", "none"): 0.22, ("generator", "none"): 0.01, ("random", "none"): 0.2}
    text = summary(results(figures))
    assert "Nothing can be concluded from it about any noise" in text
    assert "%" not in text


def test_a_victim_has_learned_where_it_is_clearly_above_what_is_there_without_learning():
    figures = {("clean", "none"): 0.99, ("generator", "none"): 0.86}
    assert "reached 0.860, 87% of the 0.990" in summary(results(figures, spread=0.001, trivial_score=0.855))
    figures = {("clean", "none"): 0.07, ("generator", "none"): 0.01}
    assert "it reached 0.070, less than the 0.200 of a model" in summary(results(figures, spread=0.001))


def test_each_way_of_protecting_has_its_own_finding():
    figures = {("clean", "none"): 0.5, ("generator", "none"): 0.45, ("generator-per-segment", "none"): 0.1}
    text = summary(results(figures))
    assert "a model trained on the protected images reached 0.450, 90%" in text
    assert "a model trained on images protected segment by segment reached 0.100, 20%" in text
    del figures["generator", "none"]
    assert "trained on images protected segment by segment reached 0.100" in summary(results(figures))
    figures["clean", "none"] = 0.1
    assert summary(results(figures)).count("Nothing can be concluded") == 1


def test_scores_near_zero_are_not_compared():
    figures = {("clean", "none"): 0.004, ("generator", "none"): 0.001}
    found = results(figures, spread=0.0, trivial_score=0.0, score="ap")
    for cell in found["cells"]:
        cell["scores"] = {"ap": cell["scores"]["foreground_iou"]}
    assert retained_utility(found, "generator", "none", "unet") is None
    assert "Nothing can be concluded" in summary(found)


def test_a_rough_way_to_ask_the_generator_is_named_and_said_to_spend_more():
    figures = {("clean", "none"): 0.5, ("generator", "none"): 0.1, ("generator-boxes", "none"): 0.2}
    text = report_markdown(results(figures))
    assert "a model trained on images protected by a box around each object reached 0.200, 40%" in text
    assert "| **generator-boxes** (spends more) |" in text
    assert "having the full bound beyond the objects too: `generator-boxes`." in text


def test_what_limits_the_findings_is_said():
    found = results()
    assert "- " not in summary(found)
    few = results(notes=["3 images were left out"], planned=20)
    few["grid"]["seeds"] = [0]
    few["settings"]["train_images"] = 100
    few["grid"]["noises"].append("whole")
    text = summary(few)
    for caveat in ("3 images were left out", "1 seed(s): too few for a claim", "8 of 20 victims of the grid are not",
                   "Spend more, having the full bound beyond the objects too: `whole`.",
                   "100 training images"):  # fmt: skip
        assert f"- {caveat}" in text
    alone = results({("clean", "none"): 0.5, ("generator", "none"): 0.1})
    assert "No control stands beside it" in summary(alone)
    missing = results({("clean", "none"): 0.5})
    assert "The grid has no `generator` among its noises" in summary(missing)
    missing["grid"]["noises"].append("generator")
    assert "are not both trained yet" in summary(missing)
    missing["grid"]["noises"].remove("clean")
    assert "The grid has no `clean` among its noises" in summary(missing)


def test_the_words_name_the_base_other_trainings_and_shares():
    found = results({("clean", "jpeg50"): 0.5, ("generator", "jpeg50"): 0.1})
    found["grid"] |= {"treatments": ["jpeg50"], "trainings": ["plain", "strong"], "clean_shares": [0.0, 0.5]}
    more = []
    for cell in found["cells"]:
        strong = {"clean": 0.4, "generator": 0.3}[cell["noise"]]
        mixed = {"clean": 0.35, "generator": 0.45}[cell["noise"]]
        more.append(cell | {"training": "strong", "scores": {"foreground_iou": strong}})
        more.append(cell | {"clean_share": 0.5, "scores": {"foreground_iou": mixed}})
    found["cells"] += more
    text = summary(found)
    assert "a model trained on the protected images, after jpeg50, reached 0.100" in text
    assert "Under strong training it leaves 75%." in text
    assert "With 50% of the images clean it leaves 90%; those alone, without any other, teach 70%." in text
    for cell in found["cells"]:
        cell["scores"] = {"foreground_iou": 0.5}
    assert "Under strong" not in summary(found)  # where there is nothing to lose


def test_the_tables_show_what_is_there_and_what_is_not():
    figures = {(noise, treatment): value for (noise, value), treatment in product(UNTOUCHED.items(), ("none", "half"))}
    del figures["stripes", "half"]
    found = results(figures)
    found["cells"] = [c for c in found["cells"] if (c["noise"], c["treatment"], c["seed"]) != ("random", "half", 2)]
    lines = report_markdown(found).splitlines()
    row = next(line for line in lines if line.startswith("| random"))
    assert "0.480 (0.460 to 0.500) [96%]" in row
    assert "0.470 (0.460 to 0.480) [94%], 2 of 3 seeds" in row
    row = next(line for line in lines if line.startswith("| stripes"))
    assert row.endswith("| not yet |")
    row = next(line for line in lines if line.startswith("| clean"))
    assert row == "| clean | 0.500 (0.480 to 0.520) | 0.500 (0.480 to 0.520) |"
    assert "unseg audit data -o out" in lines

    table = terminal_table(found).splitlines()
    assert table[1].split() == ["noise", "none", "half"]
    assert next(line for line in table if line.startswith("stripes")).split() == ["stripes", "60%", "-"]
    assert len({len(line) for line in table[1:] if line.strip()}) <= 2


def test_a_wide_table_is_split():
    treatments = [f"treatment number {index}" for index in range(12)]
    found = results({(noise, t): value for (noise, value), t in product(UNTOUCHED.items(), treatments)})
    table = terminal_table(found)
    assert max(map(len, table.splitlines())) <= 120
    assert table.count("generator") == 3
    assert all(table.count(treatment) >= 1 for treatment in treatments)


def test_clean_shares_stand_beside_those_clean_images_alone_and_classes_are_listed():
    found = results()
    found["grid"]["clean_shares"] = [0.0, 0.5]
    for cell in [dict(cell) for cell in found["cells"]]:
        found["cells"].append(cell | {"clean_share": 0.5, "scores": {"foreground_iou": 0.4}})
    text = report_markdown(found)
    assert "| unet | those clean images alone, as many steps | 0.400 (0.400 to 0.400) |" in text
    assert "| unet | **generator** | 0.400 (0.400 to 0.400) |" in text

    found = results()
    found["settings"] |= {"num_classes": 3, "classes": [0, 4, 9]}
    for cell in found["cells"]:
        cell["scores"]["per_class_iou"] = [0.5, None, 0.1 * cell["seed"]]
    text = report_markdown(found)
    assert "| unet | clean | 0.500 | - | 0.100 |" in text
    assert "class 9 |" in text


def test_everything_is_written_whole_and_the_json_is_valid(tmp_path: Path):
    Image.new("RGB", (8, 8)).save(tmp_path / "examples.png")
    found = results()
    found["grid"]["clean_shares"] = [0.0, 0.5]
    found["cells"] += [cell | {"clean_share": 0.5} for cell in found["cells"]]
    files = write_report(tmp_path, found)
    names = {file.relative_to(tmp_path).as_posix() for file in files}
    assert names == {"results.json", "report.md", "plots/treatments.png", "plots/clean_shares.png"}
    report = (tmp_path / "report.md").read_text()
    for picture in ("plots/treatments.png", "plots/clean_shares.png", "examples.png"):
        assert f"]({picture})" in report
    with Image.open(tmp_path / "plots" / "treatments.png") as plot:
        assert min(plot.size) > 200
        assert len(plot.convert("RGB").getcolors(10**6)) > 50
    assert json.loads((tmp_path / "results.json").read_text()) == found

    before = (tmp_path / "results.json").read_bytes()
    found["cells"][0]["scores"]["foreground_iou"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(tmp_path, found)
    assert (tmp_path / "results.json").read_bytes() == before


def test_a_report_of_no_victims_says_so(tmp_path: Path):
    found = results()
    found["cells"] = []
    write_report(tmp_path, found)
    assert "12 of 12 victims of the grid are not trained" in (tmp_path / "report.md").read_text()
