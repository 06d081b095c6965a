"""The report as a page: complete, safe, and whole whatever the run left behind."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import image as matplotlib_image
from report.fake_run import fake_config, rewrite, write_fake_run
from tiny import changed

from arat_fast.report import write_report
from arat_fast.report.curves import run_plots
from arat_fast.report.examples import cards, largest_change, to_png
from arat_fast.report.run import read_run
from arat_fast.report.style import plot_text, running_mean
from arat_fast.report.templates import render
from arat_fast.report.words import (
    better_before,
    duration,
    objective_name,
    plain,
    signed_points,
)

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&$x_{--></title>"


class Page(HTMLParser):
    """Elements, attributes, text and images of a page; fails where elements do not nest."""

    VOID = frozenset({"img", "meta", "br"})

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, str] = {}
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join(self.text.split())
        self.sections = {name: " ".join(text.split()) for name, text in self.sections.items()}

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.elements.append((name, values))
        if name not in self.VOID:
            self.open.append(name)
        if name == "section" and "id" in values:
            self.sections[values["id"]] = ""

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.sections:
            self.sections[list(self.sections)[-1]] += data

    def all(self, name: str) -> list[dict[str, str]]:
        return [attributes for element, attributes in self.elements if element == name]

    def images(self, media_type: str) -> list[bytes]:
        start = f"data:{media_type};base64,"
        sources = [attributes["src"] for attributes in self.all("img")]
        return [base64.b64decode(s.removeprefix(start)) for s in sources if s.startswith(start)]


def report(folder: Path, *compare: Path) -> Page:
    path = write_report(folder, compare)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def assert_self_contained(page: Page) -> None:
    for name, attributes in page.elements:
        assert name not in ("script", "link", "iframe", "object", "form", "base")
        for key, value in attributes.items():
            assert not key.startswith("on")
            assert key not in ("srcset", "action")
            assert key != "href" or value.startswith("#")
            assert key != "src" or value.startswith(("data:image/png;", "data:image/svg+xml;"))
    assert "url(" not in page.source and "@import" not in page.source
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy.startswith("default-src 'none';") and "script-src" not in policy
    for svg in page.images("image/svg+xml"):
        root = ElementTree.fromstring(svg)
        assert not [e for e in root.iter() if e.tag.endswith(("script", "image", "foreignObject"))]
        links = {v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")}
        assert all(link.startswith("#") for link in links)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("runs") / "digits-arat-0")


@pytest.fixture(scope="module")
def finished_page(finished: Path) -> Page:
    return report(finished)


def test_every_part_is_there(finished_page: Page) -> None:
    page = finished_page
    names = "meaning classes examples training measurements configuration next"
    assert list(page.sections) == names.split()
    links = [link["href"] for link in page.all("a")]
    assert links == [f"#{name}" for name in [*names.split(), "next"]]
    assert "trained for 30 epochs on 1,437 images" in page.text
    assert "with ARAT (Rethinking Invariance Regularization" in page.text
    assert "arat-fast train digits --seed 0" in page.sections["next"]
    assert "torch2.11.0" in page.sections["configuration"]
    images = page.all("img")
    assert len(images) == 6 + 3 * 16
    assert all(len(image["alt"]) > 10 for image in images)
    assert_self_contained(page)


def test_the_numbers_stand_with_their_intervals(finished_page: Page) -> None:
    # Wilson, 95 %: 349, 290 and 268 of 360.
    for value, interval in (("96.9", "94.6–98.3"), ("80.6", "76.2–84.3"), ("74.4", "69.7–78.7")):
        assert value in finished_page.text
        assert f"interval {interval}" in finished_page.text
    assert "349 of 360 right" in finished_page.text
    text = finished_page.sections["meaning"]
    assert "at most 0.12" in text and "trains an ordinary network" in text
    # Ten classes of 36 images each.
    assert "same answer to all would be right in 10.0 % at most" in text
    text = finished_page.sections["measurements"]
    assert "APGD on the cross-entropy 76.1" in text
    # Settings of one attack are not those of all.
    assert "evaluation: batch size 500." in text
    assert text.count("; steps ") == 2 and "; steps 100" in text


def test_the_branch_is_named_where_there_are_two(finished_page: Page, tmp_path: Path) -> None:
    assert "BatchNorm branch adv" in finished_page.sections["measurements"]
    folder = write_fake_run(tmp_path / "run", epochs=1)
    found = json.loads((folder / "summary.json").read_text())["accuracy"]
    del found["clean_branch"]
    rewrite(folder / "summary.json", "accuracy", found)
    assert "branch" not in report(folder).sections["measurements"]


def test_every_curve_is_there_and_described(finished: Path) -> None:
    plots = {plot.title: plot.alt for plot in run_plots(read_run(finished))}
    titles = "Accuracy, Loss, Learning rate, Loss weights, Invariance loss by layer, Throughput"
    assert list(plots) == titles.split(", ")
    assert "PGD-20, val (ema) ends at 8" in plots["Accuracy"]
    assert "invariance goes from" in plots["Loss"]
    assert "layer3.0.bn2 ends at" in plots["Invariance loss by layer"]


def test_axes_fit_what_they_show(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run")
    axes = {plot.title: plot.figure.axes[0] for plot in run_plots(read_run(folder))}
    # The invariance loss of two layers, 2 exp(-2t) and 3 exp(-2t), is 11 times its least at most.
    assert axes["Invariance loss by layer"].get_yscale() == axes["Loss"].get_yscale() == "log"
    at = read_run(write_fake_run(tmp_path / "at", objective="at"))
    assert [plot.figure.axes[0].get_yscale() for plot in run_plots(at)] == ["linear"] * 4
    assert axes["Loss weights"].get_lines()[0].get_drawstyle() == "steps-pre"
    assert axes["Learning rate"].get_lines()[0].get_drawstyle() == "default"
    stars = [line for line in axes["Accuracy"].get_lines() if line.get_marker() in ("*", "D")]
    found = [(*line.get_xdata(), *line.get_ydata()) for line in stars]
    assert found == [(30.0, right / 360) for right in (349, 290, 268)]
    assert [line.get_label() for line in stars] == [
        f"{name}, final" for name in ("clean", "PGD-20", "AutoAttack")
    ]
    rewrite(folder / "config.json", "config", "schedule", "name", "steps")
    axes = {plot.title: plot.figure.axes[0] for plot in run_plots(read_run(folder))}
    assert axes["Learning rate"].get_lines()[0].get_drawstyle() == "steps-pre"


def test_wrong_predictions_are_marked_without_colour(finished_page: Page) -> None:
    text = finished_page.sections["examples"]
    # Of the 16, numbers 0, 4, 8 and 12 are wrong after the attack, number 8 before it already.
    marks = ("✗ fooled", "✗ wrong as it is", "✓ holds")
    assert [text.count(mark) for mark in marks] == [3, 1, 12]
    assert "15 are right as they are, 12 after the attack" in text
    assert "after the attack (PGD-20, or AutoAttack where only that fooled the network)" in text
    alts = [image["alt"] for image in finished_page.all("img")]
    assert "attacked image of 0, read as 1 (wrong)" in alts


@pytest.mark.slow
def test_settings_that_differ_from_the_recipe_are_marked(
    finished_page: Page, tmp_path: Path
) -> None:
    text = finished_page.sections["configuration"]
    assert "◆ epochs30 recipe: " in text and text.count("◆ ") == 1
    # Of a recipe that is not known, nothing is.
    folder = write_fake_run(tmp_path / "run", epochs=1)
    rewrite(folder / "config.json", "config", "recipe", "mine")
    text = report(folder).sections["configuration"]
    assert "mine" in text and "◆ " not in text


@pytest.mark.slow
def test_settings_that_are_off_are_left_out(finished_page: Page, tmp_path: Path) -> None:
    text = finished_page.sections["configuration"]
    assert "warmup0.3" in text and "w_adv" not in text
    for off in (
        "compat",
        "start_radius",
        "num_workers",
        "milestones",
        "rollback_factor",
        "base_batch",
        "unsup",
        "watch",
        "distributed",
    ):
        assert off not in text
    folder = write_fake_run(tmp_path / "run", epochs=1)
    for section, name, value in (
        ("schedule", "name", "steps"), ("train", "rollbacks", 2), ("schedule", "warmup", 0.2)
    ):  # fmt: skip
        rewrite(folder / "config.json", "config", section, name, value)
    text = report(folder).sections["configuration"]
    assert "milestones" in text and "rollback_factor" in text
    # What was set is shown, though nothing comes of it.
    assert "◆ warmup0.2" in text


@pytest.mark.slow
def test_class_by_class(finished_page: Page, tmp_path: Path) -> None:
    text = finished_page.sections["classes"]
    # Of AutoAttack's 268 right answers 26 are of each of the first two classes, 27 of the others.
    assert text.count("26 of 36") == 2 and text.count("27 of 36") == 8
    # One image more is not more than chance explains.
    assert "weakest" not in text
    folder = write_fake_run(tmp_path / "run", epochs=1)
    rewrite(folder / "summary.json", "per_class", "autoattack", [16, *[27] * 8, 36])
    text = report(folder).sections["classes"]
    assert (
        "Under AutoAttack the network is weakest on 0 (44.4 %) and 1 (75.0 %), strongest on 9"
        in text
    )
    # Of the last class PGD leaves 29 of 36.
    assert "what AutoAttack’s attacks missed" in text
    assert "attacks missed" not in finished_page.text
    rewrite(folder / "summary.json", "per_class", {})
    page = report(folder)
    assert "classes" not in page.sections and "same answer" not in page.text


@pytest.mark.parametrize(
    ("epoch", "split", "pgd", "is_better"),
    [
        # At the end 0.812 of 200 validation images and 0.806 of 360 test images.
        (12, "val", 0.93, True),
        (12, "val", 0.86, False),
        (12, "test", 0.93, True),
        (28, "test", 0.93, True),
        (28, "val", 0.93, False),
    ],
)
def test_an_earlier_epoch_that_was_clearly_better(
    epoch: int, split: str, pgd: float, is_better: bool, tmp_path: Path
) -> None:
    folder = write_fake_run(tmp_path / "run")
    lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "eval":
            line["split"] = split
            if (line["epoch"], line["model"]) == (epoch, "ema"):
                line["pgd"] = pgd
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rewrite(folder / "summary.json", "command", "arat-fast train digits --out runs/one")
    run = read_run(folder)
    found = better_before(run)
    assert (found is not None) == is_better
    if found is not None:
        end = "80.6" if split == "test" else "81.0"
        assert re.findall(r"[\d.]+", found[0]) == [str(epoch), "93.0", "200", "20", end]
        text = report(folder).sections["next"]
        assert "--train.keep-best --out FOLDER" in text
        assert all(line.count("--out") <= 1 for line in text.split("arat-fast "))
        # A tenth of the 1,437 training images.
        assert ("--data.num-val 143" in text) == (split == "test")
        rewrite(folder / "config.json", "config", "data", "num_val", 100)
        rewrite(folder / "config.json", "config", "train", "keep_best", True)
        assert "eval " + str(folder / "checkpoint-best.pt") in report(folder).sections["next"]


def test_a_gap_between_training_and_test_is_said(finished_page: Page, tmp_path: Path) -> None:
    assert "overfits" not in finished_page.text
    folder = write_fake_run(tmp_path / "run", correct=(349, 250, 230))
    found = re.findall(r"[\d.]+\d", report(folder).sections["training"].split("overfits")[0])
    # Training images of the last epoch; test images under PGD-20.
    assert 78 < float(found[0]) < 82 and found[1:] == ["10", "20", "69.4", "360"]
    # Lines of 10 batches of 64 of the 1,437 images, of 10, and of the last 157 images.
    lines = [
        {"kind": "train", "step": 23 + step, "epoch": 1 + step / 23, "loss": 1.0, "accuracy_adv": a}
        for step, a in ((10, 0.995), (20, 0.985), (23, 0.962))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    share = (640 * 0.995 + 640 * 0.985 + 157 * 0.962) / 1437
    assert f"In the last epoch {100 * share:.1f}" in report(folder).sections["training"]


@pytest.mark.slow
def test_commands_that_go_on(finished: Path, finished_page: Page, tmp_path: Path) -> None:
    text = finished_page.sections["next"]
    for command in ("train", "analyze", "report", "predict", "export"):
        assert f"arat-fast {command}" in text
    assert f"arat-fast eval {finished} --eps 0.06 0.12 0.18" in text and "--resume" not in text
    assert "--objective.name natural --out OTHER" in text
    assert f"arat-fast report {finished} --compare OTHER" in text
    beside = report(finished, finished)
    assert "natural" not in beside.sections["next"] and "ordinary" not in beside.text
    assert f"arat-fast report {finished} --compare {finished} #" in beside.sections["next"]
    assert all(line.count("--out") <= 1 for line in text.split("arat-fast "))
    # A run that began with natural training is compared with that.
    begun = write_fake_run(tmp_path / "begun", epochs=1)
    write_fake_run(begun / "natural", objective="natural", epochs=1, correct=(350, 0, 0))
    assert "comparison" not in report(begun).sections
    rewrite(begun / "summary.json", "natural_model", {"source": "natural", "epochs": 1})
    page = report(begun)
    assert "0 · natural" in page.sections["comparison"] and "ordinary" not in page.text
    assert f"report {begun} --compare {begun / 'natural'} #" in page.sections["next"]
    assert "comparison" in report(begun, finished).sections
    folder = write_fake_run(tmp_path / "my run", epochs=1)
    rewrite(folder / "summary.json", "status", "interrupted")
    rewrite(folder / "summary.json", "command", "arat-fast train digits --seed 0 --resume")
    text = report(folder).sections["next"]
    assert text.count("--resume") == 1 and "train digits --seed 0 # go on" in text
    assert f"arat-fast train digits --seed 0 --out '{folder}' --resume" in text
    assert "arat-fast eval" not in text


@pytest.mark.parametrize(
    ("objective", "changes", "name"),
    [
        ("arat", {}, "ARAT"),
        ("arat", {"stop_gradient": False, "predictor": False}, "(no stop gradient, no predictor)"),
        ("arat", {"norm": "shared"}, "ARAT (shared BatchNorm)"),
        ("trades", {}, "TRADES"),
        ("trades", {"beta": 3.0}, "TRADES (beta 3)"),
    ],
)
def test_methods_are_named_with_what_differs(
    objective: str, changes: dict[str, Any], name: str
) -> None:
    section = "model" if "norm" in changes else "objective"
    found = objective_name(changed(fake_config(objective), section, **changes))
    assert found == name if changes == {} else name in found


def test_the_same_run_gives_the_same_report(finished: Path, finished_page: Page) -> None:
    settings = dict(matplotlib.rcParams)
    assert report(finished).source == finished_page.source
    assert dict(matplotlib.rcParams) == settings


def test_hostile_strings_are_text(tmp_path: Path) -> None:
    folder = write_fake_run(
        tmp_path / HOSTILE.replace("/", "|"),
        epochs=4,
        classes=[HOSTILE] * 10,
        layers=[HOSTILE, "b$"],
    )
    rewrite(folder / "config.json", "config", "recipe", HOSTILE)
    summary = folder / "summary.json"
    for key in ("split", "model", "device", "precision", "command", "commit"):
        rewrite(summary, key, HOSTILE)
    rewrite(summary, "versions", {HOSTILE: HOSTILE})
    rewrite(summary, "evaluation", {HOSTILE: {HOSTILE: HOSTILE}})
    rewrite(summary, "accuracy", HOSTILE, json.loads(summary.read_text())["accuracy"]["clean"])
    rewrite(summary, "accuracy", "autoattack", "attacks", {HOSTILE: 0.5})
    page = report(folder, folder)
    assert_self_contained(page)
    assert "<script" not in page.source.lower()
    assert page.text.count("<script>alert(1)</script>") > 20


def test_a_template_that_lacks_a_value_is_an_error() -> None:
    with pytest.raises(LookupError):
        render("report.html.j2")


def test_a_run_is_reported_as_far_as_it_got(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", epochs=8)
    (folder / "summary.json").unlink()
    (folder / "examples.npz").unlink()
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text[: len(text) * 3 // 4])
    page = report(folder)
    assert "has not finished" in page.text
    assert "Last evaluation during training" in page.text
    assert "examples" not in page.sections and "training" in page.sections
    assert_self_contained(page)
    metrics.unlink()
    page = report(folder)
    assert "No accuracy has been measured yet" in page.text
    assert "training" not in page.sections


@pytest.mark.parametrize(
    "numbers", [{"epoch": 0.1, "lr": 0.1, "loss": 2.3}, {"epoch": 0, "loss": float("nan")}]
)
def test_few_metrics_are_enough(tmp_path: Path, numbers: dict[str, float]) -> None:
    folder = write_fake_run(tmp_path / "run", epochs=1)
    line = {"kind": "train", "step": 1, **numbers}
    (folder / "metrics.jsonl").write_text(json.dumps(line))
    assert_self_contained(report(folder))


@pytest.mark.parametrize(
    ("clean", "pgd", "auto", "words"),
    [
        pytest.param(349, 290, 268, None, marks=pytest.mark.slow),
        pytest.param(100, 200, 90, "above clean", marks=pytest.mark.slow),
        pytest.param(300, 200, 210, "AutoAttack left more", marks=pytest.mark.slow),
        (300, 280, 100, "masked gradients"),
    ],
)
def test_suspicious_numbers_are_pointed_out(
    tmp_path: Path, clean: int, pgd: int, auto: int, words: str | None
) -> None:
    folder = write_fake_run(tmp_path / "run", epochs=1, correct=(clean, pgd, auto))
    text = report(folder).sections["meaning"]
    assert words in text if words else "Check this" not in text and "masked" not in text


@pytest.mark.parametrize(
    ("channels", "size"),
    [
        (1, 8),
        pytest.param(3, 32, marks=pytest.mark.slow),
        pytest.param(4, 5, marks=pytest.mark.slow),
    ],
)
def test_images_are_shown_as_they_are(tmp_path: Path, channels: int, size: int) -> None:
    folder = write_fake_run(
        tmp_path / "run", epochs=1, channels=channels, size=size, num_examples=2
    )
    page = report(folder)
    with np.load(folder / "examples.npz") as archive:
        x, x_adv = archive["x"], archive["x_adv"]
    shown = [matplotlib_image.imread(io.BytesIO(png))[..., :3] for png in page.images("image/png")]
    assert len(shown) == 6
    expected = [x[0], x_adv[0], 0.5 + (x_adv - x)[0] / (2 * np.abs(x_adv - x).max())]
    for picture, pixels in zip(shown, expected, strict=False):
        if channels == 4:
            pixels = pixels.mean(axis=0, keepdims=True)
        pixels = np.broadcast_to(pixels, (3, size, size)).transpose(1, 2, 0)
        assert np.abs(picture - pixels).max() <= 0.5 / 255 + 1e-6


def test_an_attack_that_changed_nothing(finished: Path) -> None:
    examples = read_run(finished).examples
    assert examples is not None
    same = dataclasses.replace(examples, x_adv=examples.x)
    assert largest_change(same) == 0
    change = matplotlib_image.imread(io.BytesIO(cards(same)[0].pictures[2].png))[..., :3]
    assert np.abs(change - 0.5).max() <= 0.5 / 255 + 1e-6


def test_pixels_outside_the_range_are_clipped() -> None:
    png = to_png(np.array([[[-1.0, 2.0]]], dtype=np.float32))
    picture = matplotlib_image.imread(io.BytesIO(png))[..., :3]
    assert picture.tolist() == [[[0, 0, 0], [1, 1, 1]]]


def test_settings_read_as_they_were_written() -> None:
    values = (8 / 255, 0.12, 1.0, 5e-4, True, (), [0.75, 0.9], None)
    words = ["8/255", "0.12", "1", "0.0005", "yes", "empty", "0.75, 0.9", "–"]
    assert [plain(value) for value in values] == words


def test_numbers_in_words() -> None:
    times = [duration(s).replace("\u202f", " ") for s in (3.21, 59.4, 59.6, 200, 7500)]
    assert times == ["3.2 s", "59 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]
    assert [signed_points(d) for d in (0.0123, -0.0123, 0.0001)] == ["+1.2", "−1.2", "±0.0"]


def test_running_mean_leaves_gaps_out() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0, np.nan, np.nan, np.nan])
    expected = [1, 2, 4, 4, 5, np.nan, np.nan]
    assert running_mean(values, 3) == pytest.approx(expected, nan_ok=True)
    assert len(running_mean(values, 50)) == len(values)


def test_names_in_plots_are_short_and_visible() -> None:
    assert [plot_text(name) for name in ("_hidden", "")] == ["hidden", "?"]
    assert len(plot_text("x" * 100)) == 28
