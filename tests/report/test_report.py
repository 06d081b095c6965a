"""The report as a page: complete, safe, and whole whatever the run left behind."""

from __future__ import annotations

import base64
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
from matplotlib.figure import Figure
from report.fake_run import write_fake_run

from arat_fast.report import style, write_report
from arat_fast.report.examples import to_png
from arat_fast.report.html import escape, tag
from arat_fast.report.style import plot_text, running_mean
from arat_fast.report.words import duration, plain, signed_points

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
        assert name not in ("script", "link", "iframe", "object", "form", "a", "base")
        for key, value in attributes.items():
            assert not key.startswith("on")
            assert key not in ("href", "srcset", "action")
            assert key != "src" or value.startswith(("data:image/png;", "data:image/svg+xml;"))
    assert "url(" not in page.source and "@import" not in page.source
    policy = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for svg in page.images("image/svg+xml"):
        root = ElementTree.fromstring(svg)
        assert not [e for e in root.iter() if e.tag.endswith(("script", "image", "foreignObject"))]
        links = {v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")}
        assert all(link.startswith("#") for link in links)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that a report draws from here on."""
    drawn: list[Figure] = []
    to_svg = style.to_svg

    def noted(figure: Figure) -> bytes:
        drawn.append(figure)
        return to_svg(figure)

    monkeypatch.setattr(style, "to_svg", noted)
    return drawn


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("runs") / "digits-arat-0")


@pytest.fixture(scope="module")
def finished_page(finished: Path) -> Page:
    return report(finished)


def test_every_part_is_there(finished_page: Page) -> None:
    page = finished_page
    assert list(page.sections) == [
        "meaning",
        "examples",
        "training",
        "measurements",
        "configuration",
        "environment",
        "again",
    ]
    assert "ARAT on scikit-learn’s handwritten digits" in page.text
    assert "trained for 30 epochs on 1,437 images" in page.text
    assert "arat-fast train digits --seed 0" in page.sections["again"]
    assert "torch2.11.0" in page.sections["environment"]
    assert "split_batch_normreference" in page.sections["environment"]
    assert_self_contained(page)


def test_the_numbers_stand_with_their_intervals(finished_page: Page) -> None:
    # Wilson, 95 %: 349, 290 and 268 of 360.
    for value, interval in (("96.9", "94.6–98.3"), ("80.6", "76.2–84.3"), ("74.4", "69.7–78.7")):
        assert value in finished_page.text
        assert f"interval {interval}" in finished_page.text
    assert "349 of 360 right" in finished_page.text
    assert "at most 0.12 on a brightness scale" in finished_page.sections["meaning"]
    assert "not a guarantee" in finished_page.sections["meaning"]
    assert "apgd-ce 76.1" in finished_page.sections["measurements"]


def test_settings_of_one_attack_are_not_those_of_all(finished_page: Page) -> None:
    text = finished_page.sections["measurements"]
    assert "Settings of the evaluation: batch_size 500; max_samples 0." in text
    assert text.count("num_steps") == 2 and "num_steps 100" in text
    # The interval has a column of its own.
    assert "interval 0" not in text and "interval69.7–78.7" in text


def test_every_curve_is_there_and_described(finished_page: Page) -> None:
    alts = [i["alt"] for i in finished_page.all("img") if "svg" in i["src"][:30]]
    titles = [alt.split(" over epochs: ")[0] for alt in alts]
    assert titles == [
        "Accuracy",
        "Loss",
        "Learning rate",
        "Loss weights",
        "Invariance loss by layer",
        "Throughput",
    ]
    assert "PGD-20, val (ema) ends at 8" in alts[0]
    assert "invariance goes from" in alts[1]
    assert "layer3.0.bn2 ends at" in alts[4]


def test_every_picture_has_an_alternative_text(finished_page: Page) -> None:
    images = finished_page.all("img")
    assert len(images) == 6 + 3 * 16
    assert all(len(image["alt"]) > 10 for image in images)


def test_wrong_predictions_are_marked_without_colour(finished_page: Page) -> None:
    text = finished_page.sections["examples"]
    # Of the 16, numbers 0, 4, 8 and 12 are wrong after the attack, number 8 before it already.
    assert text.count("✗ fooled") == 3
    assert text.count("✗ wrong as it is") == 1
    assert text.count("✓ holds") == 12
    assert "15 are right as they are, 12 after the attack" in text
    assert "The first 16 images of the test set, nothing was chosen" in text
    alts = [i["alt"] for i in finished_page.all("img")]
    assert any(re.fullmatch(r"attacked image of 0, read as 1 \(wrong, .*\)", alt) for alt in alts)


def test_settings_that_differ_from_the_recipe_are_marked(finished_page: Page) -> None:
    text = finished_page.sections["configuration"]
    assert "◆ epochs30recipe: " in text
    assert text.count("◆ ") == 1


def test_the_same_run_gives_the_same_report(finished: Path) -> None:
    first = write_report(finished).read_bytes()
    assert write_report(finished).read_bytes() == first


def test_matplotlibs_settings_are_left_alone(finished: Path) -> None:
    before = dict(matplotlib.rcParams)
    write_report(finished)
    assert dict(matplotlib.rcParams) == before


def test_hostile_strings_are_text(tmp_path: Path) -> None:
    hostile = HOSTILE + "\x00\x07\u202e"
    folder = write_fake_run(
        tmp_path / HOSTILE.replace("/", "|"),
        epochs=4,
        classes=[hostile] * 10,
        layers=[hostile, "b$"],
    )
    config = json.loads((folder / "config.json").read_text())
    config["version"] = hostile
    config["config"]["recipe"] = hostile
    config["config"][hostile] = {hostile: [hostile]}
    config["config"]["objective"]["name"] = hostile
    config["config"]["data"]["name"] = hostile
    (folder / "config.json").write_text(json.dumps(config))
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("recipe", "split", "model", "device", "precision", "command", "commit"):
        summary[key] = hostile
    summary["versions"] = {hostile: hostile}
    summary["evaluation"] = {hostile: {hostile: hostile}}
    summary["accuracy"][hostile] = summary["accuracy"]["clean"]
    summary["accuracy"]["autoattack"]["attacks"] = {hostile: 0.5}
    (folder / "summary.json").write_text(json.dumps(summary))
    with (folder / "metrics.jsonl").open("a") as stream:
        line = {"kind": "eval", "step": 999, "epoch": 4, "split": hostile, "model": "\ud800"}
        stream.write(json.dumps({**line, "clean": 0.5, "pgd": 0.4, "num_samples": 9}) + "\n")

    page = report(folder, folder)
    assert_self_contained(page)
    assert "<script" not in page.source.lower()
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "\u202e" not in page.text and "\x00" not in page.text


def test_an_interrupted_run_is_reported_as_far_as_it_got(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", epochs=8)
    (folder / "summary.json").unlink()
    (folder / "examples.npz").unlink()
    metrics = folder / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(text[: len(text) * 3 // 4])
    page = report(folder)
    assert "has not finished" in page.text
    assert "The last line of metrics.jsonl is cut off" in page.text
    assert "Last evaluation during training" in page.text
    assert "examples" not in page.sections and "training" in page.sections
    assert_self_contained(page)


def test_a_run_that_has_only_begun_is_reported(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", epochs=1)
    for name in ("summary.json", "examples.npz", "metrics.jsonl"):
        (folder / name).unlink()
    page = report(folder)
    assert "No accuracy has been measured yet" in page.text
    assert "training" not in page.sections


@pytest.mark.parametrize(
    "lines",
    [
        ['{"kind": "train", "step": 1, "epoch": 0.1, "lr": 0.1, "loss": 2.3}'],
        ['{"kind": "train", "step": 1, "epoch": 0, "loss": NaN, "accuracy_clean": NaN}'],
        ['{"kind": "eval", "step": 1, "epoch": 1}'],
        ['{"kind": "other", "step": 1, "epoch": 1}', "", "null"],
    ],
)
def test_few_or_odd_metrics_are_enough(tmp_path: Path, lines: list[str]) -> None:
    folder = write_fake_run(tmp_path / "run", epochs=1)
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    assert_self_contained(report(folder))


@pytest.mark.parametrize("key", ["accuracy", "wall_seconds", "versions", "model", "status"])
@pytest.mark.parametrize("value", [None, 3, "text", {"clean": 1}])
def test_a_summary_of_odd_types_is_reported(tmp_path: Path, key: str, value: Any) -> None:
    folder = write_fake_run(tmp_path / "run", epochs=1, num_examples=1)
    (folder / "metrics.jsonl").unlink()
    summary = json.loads((folder / "summary.json").read_text())
    summary[key] = value
    (folder / "summary.json").write_text(json.dumps(summary))
    assert_self_contained(report(folder))


def test_an_unknown_recipe_marks_nothing(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", epochs=1)
    config = json.loads((folder / "config.json").read_text())
    config["config"]["recipe"] = "mine"
    (folder / "config.json").write_text(json.dumps(config))
    text = report(folder).sections["configuration"]
    assert "nothing is marked" in text and "◆" not in text


def test_the_comparison_shows_what_the_method_buys(tmp_path: Path) -> None:
    ours = write_fake_run(tmp_path / "arat", epochs=4)
    other = write_fake_run(
        tmp_path / "at", objective="at", epochs=4, correct=(320, 270, 262), train_seconds=37.1
    )
    page = report(ours, other)
    assert next(iter(page.sections)) == "comparison"
    text = page.sections["comparison"]
    # (349 - 320) / 360 = 8.1 points and so on; the sum is of clean and AutoAttack.
    assert "clean +8.1, PGD-20 +5.6, AutoAttack +1.7, sum +9.7 points" in text
    assert "in 2.00 times the training time" in text
    assert "More than the choice of test images explains: clean." in text
    # Newcombe's interval of 268 and 262 of 360 and of 349 and 320 of 360.
    assert "A +1.7(−4.8 to +8.1)" in text
    assert "A +8.1(+4.4 to +12.0)" in text
    assert "Plain adversarial training" in text and "at" in text
    assert "differ in more than the method" not in text
    alts = [i["alt"] for i in page.all("img")]
    assert any(alt.startswith("Clean against robust accuracy. A · ARAT, seed 0") for alt in alts)
    assert any("B PGD-20 ends at" in alt for alt in alts)
    assert_self_contained(page)


def test_a_comparison_of_different_tests_says_so(tmp_path: Path) -> None:
    ours = write_fake_run(tmp_path / "ours", epochs=1)
    other = write_fake_run(tmp_path / "other", epochs=1)
    config = json.loads((other / "config.json").read_text())
    config["config"]["attack"]["eps"] = 8 / 255
    config["config"]["train"]["epochs"] = 2
    (other / "config.json").write_text(json.dumps(config))
    text = report(ours, other).sections["comparison"]
    assert "eps 0.12 against 8/255; 1 against 2 epochs" in text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "cifar10"}, "dataset digits against cifar10"),
        ({"name": "folder", "root": "b"}, "images from a against b"),
    ],
)
def test_no_difference_is_claimed_between_datasets(
    tmp_path: Path, data: dict[str, str], words: str
) -> None:
    ours = write_fake_run(tmp_path / "ours", epochs=1)
    other = write_fake_run(tmp_path / "other", epochs=1, correct=(100, 90, 80))
    for folder in (ours, other):
        config = json.loads((folder / "config.json").read_text())
        if "root" in data:
            config["config"]["data"] |= {**data, "root": "a"}
        if folder is other:
            config["config"]["data"] |= data
        (folder / "config.json").write_text(json.dumps(config))
    text = report(ours, other).sections["comparison"]
    assert words in text
    assert "tested on other data, so no difference between them is given" in text
    assert "choice of test images explains" not in text and "A +" not in text and "A ×" not in text


def test_a_comparison_without_autoattack_has_no_sum(tmp_path: Path, figures: list[Figure]) -> None:
    ours = write_fake_run(tmp_path / "ours", epochs=1, correct=(357, 4, 3))
    other = write_fake_run(tmp_path / "other", epochs=1, correct=(6, 2, 1))
    for folder in (ours, other):
        summary = json.loads((folder / "summary.json").read_text())
        del summary["accuracy"]["autoattack"]
        (folder / "summary.json").write_text(json.dumps(summary))
    text = report(ours, other).sections["comparison"]
    assert "PGD-20" in text and "AutoAttack" not in text and "Sum" not in text
    (axes,) = [f.axes[0] for f in figures if f.axes[0].get_ylabel() == "clean accuracy, %"]
    for low, high in (axes.get_xlim(), axes.get_ylim()):
        assert -2 <= low < 1 and high <= 102


def test_single_points_are_marked_inside_the_frame(tmp_path: Path, figures: list[Figure]) -> None:
    runs = [write_fake_run(tmp_path / name, epochs=1) for name in ("ours", "other")]
    for run in runs:
        metrics = run / "metrics.jsonl"
        metrics.write_text(metrics.read_text().splitlines(keepends=True)[-1])
    report(*runs)
    over_epochs = [f.axes[0] for f in figures if f.axes[0].get_xlabel() == "epoch"]
    assert len(over_epochs) == 6
    for axes in over_epochs:
        for line in axes.get_lines():
            assert len(line.get_xdata()) == 1 and line.get_marker() in ("o", "s")
            assert line.get_xdata()[0] < 0.97 * axes.get_xlim()[1]
    overlay = over_epochs[-1]
    labels = overlay.get_legend_handles_labels()[1]
    assert labels == ["A clean (train)", "A PGD (train)", "B clean (train)", "B PGD (train)"]
    looks = {
        (line.get_color(), line.get_marker(), line.get_markerfacecolor())
        for line in overlay.get_lines()
    }
    assert len(looks) == 4


def test_runs_that_differ_in_the_seed_are_averaged(tmp_path: Path) -> None:
    runs = [
        write_fake_run(
            tmp_path / f"run{seed}", seed=seed, epochs=1, correct=(340 + 5 * seed, 290, 262)
        )
        for seed in range(3)
    ]
    other = write_fake_run(tmp_path / "at", objective="at", epochs=1)
    text = report(runs[0], *runs[1:], other).sections["comparison"]
    # Clean: 340, 345 and 350 of 360.
    assert "ARATruns A, B, CClean95.894.4–97.2" in text
    assert "Plain adversarial trainingrun DClean96.9one run" in text
    alone = report(runs[0], other).sections["comparison"]
    assert "Mean over seeds" not in alone


def test_a_comparison_with_a_run_without_results(tmp_path: Path) -> None:
    ours = write_fake_run(tmp_path / "ours", epochs=1)
    other = write_fake_run(tmp_path / "other", epochs=1)
    for name in ("summary.json", "metrics.jsonl"):
        (other / name).unlink()
    text = report(ours, other).sections["comparison"]
    assert "seed 0 · other" in text
    assert "A +" not in text and "against" not in text


def test_the_longest_evaluation_is_compared(tmp_path: Path) -> None:
    ours = write_fake_run(tmp_path / "ours", epochs=12)
    text = report(ours, ours).sections["comparison"]
    assert "evaluations during training (val, ema weights)" in text
    metrics = ours / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    early = [n for n, line in enumerate(lines) if '"ema"' in line][:2]
    metrics.write_text("".join(line for n, line in enumerate(lines) if n not in early))
    text = report(ours, ours).sections["comparison"]
    assert "evaluations during training (val, last weights)" in text


@pytest.mark.parametrize(
    ("clean", "pgd", "auto", "words"),
    [
        (100, 200, 90, "accuracy under PGD is above clean"),
        (300, 200, 210, "AutoAttack left more answers right"),
        (300, 280, 100, "masked gradients"),
    ],
)
def test_suspicious_numbers_are_pointed_out(
    tmp_path: Path, clean: int, pgd: int, auto: int, words: str
) -> None:
    folder = write_fake_run(tmp_path / "run", epochs=1, correct=(clean, pgd, auto))
    assert words in report(folder).sections["meaning"]


def test_nothing_is_pointed_out_where_nothing_is_odd(finished_page: Page) -> None:
    assert "Check this" not in finished_page.text
    assert "masked" not in finished_page.text


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (4, 5)])
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


def test_an_attack_that_changed_nothing(tmp_path: Path) -> None:
    folder = write_fake_run(tmp_path / "run", epochs=1)
    with np.load(folder / "examples.npz") as archive:
        arrays = dict(archive)
    np.savez(folder / "examples.npz", **{**arrays, "x_adv": arrays["x"]})
    assert "The attack changed nothing here." in report(folder).sections["examples"]


def test_pixels_outside_the_range_are_clipped() -> None:
    png = to_png(np.array([[[-1.0, 2.0]]], dtype=np.float32))
    picture = matplotlib_image.imread(io.BytesIO(png))[..., :3]
    assert picture.tolist() == [[[0, 0, 0], [1, 1, 1]]]


def test_a_report_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_fake_run(tmp_path / "run", epochs=1, num_examples=1)
    path = write_report(folder)
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(folder)
    assert path.read_text() == "old"
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "examples.npz",
        "report.html",
    }


def test_text_is_escaped_unless_it_is_html() -> None:
    assert tag("p", "a < b", tag("b", "&"), None) == "<p>a &lt; b<b>&amp;</b></p>"
    assert tag("td", class_='"x"', data_x=None) == '<td class="&quot;x&quot;"></td>'
    assert escape("95\u202f% µ\ud800\x1b") == "95\u202f% µ"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (8 / 255, "8/255"),
        (0.12, "0.12"),
        (0.2, "0.2"),
        (1.0, "1"),
        (5e-4, "0.0005"),
        (True, "yes"),
        ((), "empty"),
        ([0.75, 0.9], "0.75, 0.9"),
        (None, "–"),
    ],
)
def test_settings_read_as_they_were_written(value: Any, text: str) -> None:
    assert plain(value) == text


def test_numbers_in_words() -> None:
    times = [duration(s).replace("\u202f", " ") for s in (3.21, 59.4, 59.6, 200, 7500)]
    assert times == ["3.2 s", "59 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]
    assert [signed_points(d) for d in (0.0123, -0.0123, 0.0001)] == ["+1.2", "−1.2", "±0.0"]


def test_running_mean_leaves_gaps_out() -> None:
    values = np.array([1.0, np.nan, 3.0, 5.0, np.nan, np.nan, np.nan])
    mean = running_mean(values, 3)
    assert mean[:5] == pytest.approx([1, 2, 4, 4, 5])
    assert np.isnan(mean[5:]).all()
    assert len(running_mean(values, 50)) == len(values)


def test_names_in_plots_are_short_and_visible() -> None:
    assert plot_text("_hidden\n") == "hidden "
    assert plot_text("") == "?"
    assert len(plot_text("x" * 100)) == 28
