"""arat-fast export: what each format writes, that it loads where it says, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import runpy
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from networks import generator, randomize
from PIL import Image
from report.fake_run import rewrite
from torch import Tensor, nn

import arat_fast
from arat_fast.cli import main
from arat_fast.config import Config
from arat_fast.evaluation.checkpoint import evaluate_checkpoint
from arat_fast.evaluation.pictures import LoadedNetwork
from arat_fast.evaluation.pieces import checksum
from arat_fast.export import folder
from arat_fast.export.card import public_command
from arat_fast.export.folder import export_checkpoint
from arat_fast.export.programs import ONNX_PACKAGES, save_program
from arat_fast.models import create_model
from arat_fast.objectives import ARAT
from arat_fast.recipes import recipe
from arat_fast.saved import export_plain, save_safetensors
from arat_fast.saved.naming import SCHEMES, to_own, to_scheme
from arat_fast.saved.network import describe, header, read_saved
from arat_fast.statistics import wilson_interval

DATA = Path(__file__).parents[1] / "data"
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)
onnx_only = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ONNX_PACKAGES),
    reason="the extra onnx is not installed",
)
robustbench_only = pytest.mark.skipif(
    importlib.util.find_spec("robustbench") is None, reason="robustbench is not installed"
)


def weights(
    path: Path, name: str, recipe_name: str, normalize: bool = False, unsup: Path | None = None
) -> nn.Module:
    """Exported weights of a run that never was; the network they hold."""
    config: Config = recipe(recipe_name)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, unsup=unsup))
    if normalize:
        config = dataclasses.replace(
            config, model=dataclasses.replace(config.model, mean=MEAN, std=STD)
        )
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=name))
    torch.manual_seed(0)
    model = create_model(name, 10, 3, "split", config.model.mean, config.model.std)
    plain = export_plain(randomize(model)).eval()
    size = 64 if name == "resnet50" else 32
    save_safetensors(plain, path, header(describe(config, "ema", "adv", (3, size, size))))
    return plain


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator(5))


def run_example(out: Path, network: LoadedNetwork, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The network that a folder's own example builds, from another folder; it says of a picture
    what ``network`` does, but for the rounding of its pixels."""
    monkeypatch.chdir(out.parent)
    noise = torch.rand(9, 11, 3, generator=generator(3)).mul(255).byte().numpy()
    Image.fromarray(noise).resize((110, 90)).save("picture.png")
    monkeypatch.setattr(sys, "argv", ["example.py", "picture.png"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        names = runpy.run_path(f"{out.name}/example.py")
    ((label, confidence),) = network.predict(["picture.png"])
    for path in ("picture.png", Path("picture.png")):
        assert network.predict(path) == [(label, confidence)]
    said = re.fullmatch(r"(.+), (\d+\.\d) % sure\n", printed.getvalue())
    assert said is not None and said[1] == label
    assert abs(float(said[2]) - 100 * confidence) < 2
    return names["model"]


def test_hub_folder(ema_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "hub"
    record = export_checkpoint(ema_run, "hub", out, license="mit", name="robust-digits")
    files = {"README.md", "config.json", "example.py", "model.safetensors"}
    assert {p.name for p in out.iterdir()} == files
    assert record == json.loads((out / "config.json").read_text())
    assert (record["branch"], record["weights"]) == ("adv", "ema")
    assert record["largest_difference"] == 0 < record["largest_logit"]
    assert record["classes"] == list("0123456789")
    x, expected = images(7, 1, 8, 8), arat_fast.load(ema_run)
    assert torch.equal(run_example(out, expected, monkeypatch)(x), expected(x))
    summary = json.loads((ema_run / "summary.json").read_text())
    card = (out / "README.md").read_text()
    assert card.startswith('---\nlicense: "mit"\n') and '- "digits"' in card
    for name, label in (("clean", "Clean"), ("pgd1", "PGD-1")):
        measured = summary["accuracy"][name]
        low, high = wilson_interval(measured["correct"], measured["num_samples"])
        interval = f"{100 * low:.2f} to {100 * high:.2f} %"
        assert f"| {label} | {100 * measured['value']:.2f} % | {interval} | 40 |" in card
    assert "Linf, radius 0.12" in card and ARAT.paper is not None and ARAT.paper.link in card
    assert "arat-fast train digits --seed 0" in card and "/home/me" not in card
    assert (out / "example.py").read_text() in card
    assert main(["eval", str(out), "--eps", "0.1", "--attacks", "pgd", "--max-samples", "20"]) == 0


@pytest.mark.parametrize(
    "option", ["--init w.pt", "--init=w.pt", "--objective.teacher w.pt", "--init-freeze-epochs 1"]
)
def test_a_start_from_weights_is_on_the_card(ema_run: Path, tmp_path: Path, option: str) -> None:
    shutil.copytree(ema_run, tmp_path / "run")
    rewrite(tmp_path / "run" / "summary.json", "command", f"arat-fast train digits {option}")
    export_checkpoint(tmp_path / "run", "hub", tmp_path / "hub")
    card = (tmp_path / "hub" / "README.md").read_text()
    start = re.split("[ =]", option)[0]
    assert (f"started from other weights (`{start}`)" in card) == ("w.pt" in option)
    assert "w.pt" not in card


def test_silu_is_kept_or_refused(tmp_path: Path) -> None:
    config = recipe("digits")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, activation="silu"))
    model = randomize(create_model("resnet8", 10, 1, "shared", activation="silu")).eval()
    facts = describe(config, "last", "shared", (1, 8, 8))
    save_safetensors(model, tmp_path / "m.safetensors", header(facts))
    export_checkpoint(tmp_path / "m.safetensors", "hub", tmp_path / "hub")
    x = images(3, 1, 8, 8)
    for path in (tmp_path / "hub", tmp_path / "hub" / "model.safetensors"):
        assert torch.equal(arat_fast.load(path)(x), model(x))
    with pytest.raises(ValueError, match="silu"):
        export_checkpoint(tmp_path / "hub", "torchvision", tmp_path / "torchvision")


def test_figures_of_other_weights_are_not_on_the_card(ema_run: Path, tmp_path: Path) -> None:
    clean = export_checkpoint(ema_run, "hub", tmp_path / "clean", branch="clean")
    summary = json.loads((ema_run / "summary.json").read_text())
    assert list(clean["accuracy"]) == ["clean"]
    assert clean["accuracy"]["clean"]["correct"] == summary["accuracy"]["clean_branch"]["correct"]
    assert "not robust" in (tmp_path / "clean" / "README.md").read_text()
    last = export_checkpoint(ema_run, "hub", tmp_path / "last", weights="last")
    assert last["weights"] == "last" and last["accuracy"] == {}
    assert "Nothing was measured of these weights" in (tmp_path / "last" / "README.md").read_text()


def test_what_eval_found_of_a_run_is_on_its_card(ema_run: Path, tmp_path: Path) -> None:
    """Figures on more images replace the run's own."""
    copy = tmp_path / "run"
    shutil.copytree(ema_run, copy)
    out = copy / "evaluation.json"
    evaluate_checkpoint(copy, attacks=["pgd"], max_samples=60, device="cpu", out=out, num_steps=2)
    found = export_checkpoint(copy, "hub", tmp_path / "hub")["accuracy"]
    assert [found[name]["num_samples"] for name in ("clean", "pgd1", "pgd2")] == [60, 40, 60]
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "PGD-2" in card and "`summary.json` and `evaluation.json`" in card
    # More images in another ball count for the clean accuracy, not for an attack.
    weaker = evaluate_checkpoint(
        copy, attacks=["pgd"], max_samples=80, device="cpu", out=tmp_path / "m.json", eps=0.01
    )
    (copy / "checkpoint.evaluation.json").write_text(json.dumps(weaker))
    again = export_checkpoint(copy, "hub", tmp_path / "again")["accuracy"]
    assert again["clean"]["num_samples"] == 80 and again["pgd1"] == found["pgd1"]


@pytest.mark.parametrize(
    ("metadata", "additional"),
    [({"additional_data": "true"}, True), ({"additional_data": "false"}, False), ({}, None)],
)
def test_additional_data_are_said(
    metadata: dict[str, str], additional: bool | None, tmp_path: Path
) -> None:
    path = tmp_path / "m.safetensors"
    plain = create_model("resnet8", 10, 1, norm="shared")
    save_safetensors(plain, path, {"recipe": "digits", **metadata})
    hub = export_checkpoint(path, "hub", tmp_path / "hub")
    assert hub["additional_data"] is additional
    card = (tmp_path / "hub" / "README.md").read_text()
    said = {True: "other additional images", False: "No images but", None: "not known"}
    assert [text in card for text in said.values()] == [key is additional for key in said]


@pytest.mark.slow
def test_robustbench_takes_the_ball_of_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_safetensors(create_model("resnet18", 10, norm="shared"), path, {"norm": "Linf"})
    with pytest.raises(ValueError, match="--recipe NAME"):
        export_checkpoint(path, "robustbench", tmp_path / "out")
    record = export_checkpoint(path, "robustbench", tmp_path / "out", recipe="cifar10-resnet18")
    assert (record["norm"], record["eps"]) == ("Linf", 8 / 255)
    assert (record["recipe"], record["objective"]) == ("cifar10-resnet18", "arat")


def test_front_matter_is_yaml(ema_run: Path, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    export_checkpoint(ema_run, "hub", tmp_path / "hub")
    _, front, _ = (tmp_path / "hub" / "README.md").read_text().split("---\n", 2)
    content = yaml.safe_load(front)
    assert content["license"] == "unknown"
    (result,) = content["model-index"][0]["results"]
    assert result["dataset"]["split"] == "test" and len(result["metrics"]) == 2


def test_program(ema_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_checkpoint(ema_run, "torch-export", tmp_path / "program")
    expected = arat_fast.load(ema_run)
    program = run_example(tmp_path / "program", expected, monkeypatch)
    for batch in (1, 7, 64):
        x = images(batch, 1, 8, 8)
        assert (program(x) - expected(x)).abs().max() <= 1e-6
    facts = {"facts.json": ""}
    torch.export.load(tmp_path / "program" / "model.pt2", extra_files=facts)
    assert json.loads(facts["facts.json"])["branch"] == "adv"
    with pytest.raises(ValueError, match="torch.export.load"):
        arat_fast.load(tmp_path / "program")


@pytest.mark.slow
def test_program_in_float64(tmp_path: Path) -> None:
    model = create_model("resnet8", 10, norm="shared", mean=MEAN, std=STD)
    model = randomize(model).double().eval()
    program = save_program(model, (3, 8, 8), tmp_path / "model.pt2", {})
    for batch in (1, 7):
        x = images(batch, 3, 8, 8).double()
        assert (program(x) - model(x)).abs().max() <= 1e-12


@pytest.mark.slow
@onnx_only
def test_onnx(ema_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_checkpoint(ema_run, "onnx", tmp_path / "onnx")
    files = {"config.json", "example.py", "model.onnx"}
    assert {p.name for p in (tmp_path / "onnx").iterdir()} == files
    expected = arat_fast.load(ema_run)
    session = run_example(tmp_path / "onnx", expected, monkeypatch)
    for batch in (1, 7, 64):
        x = images(batch, 1, 8, 8)
        (logits,) = session.run(None, {"image": x.numpy()})
        assert (torch.from_numpy(logits) - expected(x)).abs().max() <= 1e-5
    assert session.get_modelmeta().custom_metadata_map["branch"] == "adv"


def test_onnx_that_is_not_installed(
    ema_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(ema_run), "--format", "onnx", "--out", str(tmp_path / "onnx")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install -e '.[onnx]'" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe_name", ["imagenette-resnet18", "folder-resnet18"])
def test_an_example_cuts_a_picture_as_the_test_images(
    recipe_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kinds "pad" and "resized"."""
    weights(tmp_path / "m.safetensors", "resnet18", recipe_name)
    export_checkpoint(tmp_path / "m.safetensors", "torchvision", tmp_path / "out")
    network = arat_fast.load(tmp_path / "out")
    run_example(tmp_path / "out", network, monkeypatch)
    image = torch.from_numpy(runpy.run_path("out/example.py")["image"])
    # Two libraries' bilinear filters; half a pixel to the side is ten times as much.
    assert (image - network.preprocess(["picture.png"])).abs().mean() < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("normalize", [False, True])
def test_torchvision(
    name: str, normalize: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = weights(tmp_path / "m.safetensors", name, "cifar10-resnet18", normalize)
    out = tmp_path / "out"
    export_checkpoint(tmp_path / "m.safetensors", "torchvision", out)
    model = run_example(out, arat_fast.load(out), monkeypatch)
    x = images(2, 3, 64, 64) if name == "resnet50" else images(2, 3, 32, 32)
    assert (model(x) - expected(x)).abs().max() <= 1e-6 * expected(x).abs().max().clamp(min=1)
    # torchvision's Normalize makes its constants anew, in the dtype of the image.
    if not normalize:
        wide, logits = x.double(), expected.double()(x.double())
        assert (model.double()(wide) - logits).abs().max() <= 1e-12 * logits.abs().max().clamp(1)
    state = torch.load(out / "model.pth", weights_only=True)
    library = torchvision.models.get_model(name, num_classes=10)
    if name == "resnet50":
        library.load_state_dict(state, strict=True)
    else:
        with pytest.raises(RuntimeError, match=r"size mismatch for conv1\.weight"):
            library.load_state_dict(state, strict=True)
    assert torch.equal(
        arat_fast.load(out)(x.float()), arat_fast.load(tmp_path / "m.safetensors")(x)
    )


@pytest.mark.slow
def test_timm_names_are_torchvisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = weights(tmp_path / "m.safetensors", "resnet18", "cifar10-resnet18", True)
    export_checkpoint(tmp_path / "m.safetensors", "timm", tmp_path / "out")
    assert torch.equal(
        arat_fast.load(tmp_path / "out")(images(2, 3, 32, 32)), expected(images(2, 3, 32, 32))
    )
    pytest.importorskip("timm")
    model = run_example(tmp_path / "out", arat_fast.load(tmp_path / "out"), monkeypatch)
    x = images(2, 3, 32, 32)
    assert (model(x) - expected(x)).abs().max() <= 1e-6 * expected(x).abs().max().clamp(min=1)


@pytest.mark.parametrize("name", ["resnet18", "wrn34-10"])
def test_robustbench_names_and_shapes(name: str) -> None:
    """Those of RobustBench 1.1.1, as tests/data/make_robustbench_keys.py read them."""
    with torch.device("meta"):
        state = create_model(name, 10, norm="shared").state_dict()
    table = json.loads((DATA / "robustbench_keys.json").read_text())[name]
    named = to_scheme(state, name, "robustbench")
    assert {key: list(tensor.shape) for key, tensor in named.items()} == table


def robustbench_resnet18(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The published computation on RobustBench's names: eight blocks, pooling over 4×4."""
    if "normalize.mean" in state:
        x = (x - state["normalize.mean"]) / state["normalize.std"]
        state = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}

    def norm(y: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(y, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(y: Tensor, name: str, stride: int, padding: int) -> Tensor:
        return F.conv2d(y, state[f"{name}.weight"], stride=stride, padding=padding)

    y = norm(conv(x, "conv1", 1, 1), "bn1").relu()
    for stage in (1, 2, 3, 4):
        for index in (0, 1):
            block = f"layer{stage}.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            z = norm(conv(y, f"{block}.conv1", stride, 1), f"{block}.bn1").relu()
            z = norm(conv(z, f"{block}.conv2", 1, 1), f"{block}.bn2")
            if f"{block}.shortcut.0.weight" in state:
                y = norm(conv(y, f"{block}.shortcut.0", stride, 0), f"{block}.shortcut.1")
            y = (y + z).relu()
    pooled = F.avg_pool2d(y, 4).flatten(1)
    return F.linear(pooled, state["linear.weight"], state["linear.bias"])


@pytest.mark.parametrize("normalize", [pytest.param(False, marks=pytest.mark.slow), True])
def test_robustbench_resnet18(
    normalize: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "m.safetensors", tmp_path / "out"
    more = Path("/me") if normalize else None
    expected = weights(path, "resnet18", "cifar10-resnet18", normalize, more)
    record = export_checkpoint(path, "robustbench", out)
    assert record["weights_file"] == "models/cifar10/Linf/Waseda2025Rethinking_RN18.pt"
    (file,) = (out / "model_info" / "cifar10" / "Linf").iterdir()
    entry = json.loads(file.read_text())
    assert entry["additional_data"] is record["additional_data"] is normalize
    assert ("Additional images" in entry["footnote"]) == normalize and "/me" not in file.read_text()
    assert read_saved(out).facts["additional_data"] is normalize
    state = torch.load(out / record["weights_file"], weights_only=True)
    assert all(k.startswith(("model.", "normalize.")) for k in state) == normalize
    x = images(2, 3, 32, 32)
    scale = expected(x).abs().max().clamp(min=1)
    assert (robustbench_resnet18(state, x) - expected(x)).abs().max() <= 1e-6 * scale
    if not normalize:
        wide = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
        difference = robustbench_resnet18(wide, x.double()) - expected.double()(x.double())
        assert difference.abs().max() <= 1e-12 * scale
    assert (arat_fast.load(out)(x) - expected.float()(x)).abs().max() == 0
    stand_in_for_robustbench(monkeypatch)
    with torch.no_grad():
        model = run_example(out, arat_fast.load(out), monkeypatch)
        assert (model(x) - expected(x)).abs().max() <= 1e-6 * scale
    if normalize:
        state["normalize.mean"] += 0.1
        torch.save(state, out / record["weights_file"])
        assert (arat_fast.load(out)(x) - expected(x)).abs().max() > 1e-3 * scale


def stand_in_for_robustbench(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its package by names and arguments, with the computation above, unless it is installed."""
    if importlib.util.find_spec("robustbench") is not None:
        return

    class ResNet(nn.Module):
        def __init__(self, block: type, num_blocks: list[int], num_classes: int) -> None:
            super().__init__()
            assert (block, num_blocks, num_classes) == (object, [2, 2, 2, 2], 10)

        def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
            self.tensors = dict(state)

        def forward(self, x: Tensor) -> Tensor:
            return robustbench_resnet18(self.tensors, x)

    zoo = "robustbench.model_zoo.architectures"
    names: dict[str, dict[str, Any]] = {
        f"{zoo}.resnet": {"BasicBlock": object, "ResNet": ResNet},
        f"{zoo}.utils_architectures": {"normalize_model": lambda model, mean, std: model},
    }
    for package in ("robustbench", "robustbench.model_zoo", zoo, *names):
        module = types.ModuleType(package)
        vars(module).update(names.get(package, {}))
        monkeypatch.setitem(sys.modules, package, module)


@pytest.mark.slow
def test_robustbench_wrn() -> None:
    """The published computation of WRN-34-10 on RobustBench's names: three times five blocks."""
    model = randomize(create_model("wrn34-10", 10, norm="shared")).eval()
    state = to_scheme(model.state_dict(), "wrn34-10", "robustbench")
    x = images(1, 3, 32, 32)

    def activated(y: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(y, mean, var, state[f"{name}.weight"], state[f"{name}.bias"]).relu()

    y = F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for index in range(5):
            block = f"block{stage}.layer.{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            inner = activated(y, f"{block}.bn1")
            z = F.conv2d(inner, state[f"{block}.conv1.weight"], stride=stride, padding=1)
            z = activated(z, f"{block}.bn2")
            z = F.conv2d(z, state[f"{block}.conv2.weight"], padding=1)
            if index == 0:
                # Where the widths differ, the shortcut starts behind the activation too.
                y = F.conv2d(inner, state[f"{block}.convShortcut.weight"], stride=stride)
            y = y + z
    pooled = F.avg_pool2d(activated(y, "bn1"), 8).flatten(1)
    with torch.no_grad():
        expected = model(x)
    difference = (F.linear(pooled, state["fc.weight"], state["fc.bias"]) - expected).abs().max()
    assert difference <= 1e-6 * expected.abs().max().clamp(min=1)


@robustbench_only
@pytest.mark.parametrize("name", ["resnet18", "wrn34-10"])
def test_robustbenchs_own_classes(name: str, tmp_path: Path) -> None:
    tools = runpy.run_path(str(DATA / "make_robustbench_keys.py"))
    path, out = tmp_path / "m.safetensors", tmp_path / "out"
    expected = weights(path, name, "cifar10-resnet18", normalize=True)
    record = export_checkpoint(path, "robustbench", out)
    if name == "resnet18":
        network = tools["architecture"]("resnet").ResNet18()
    else:
        network = tools["architecture"]("wide_resnet").WideResNet(depth=34, widen_factor=10)
    model = tools["architecture"]("utils_architectures").normalize_model(network, MEAN, STD)
    state = torch.load(out / record["weights_file"], weights_only=True)
    model.load_state_dict(state, strict=True)
    x = images(2, 3, 32, 32)
    with torch.no_grad():
        difference = (model.eval()(x) - expected(x)).abs().max()
        assert difference <= 1e-6 * expected(x).abs().max().clamp(min=1)


@pytest.mark.slow
def test_model_info(tmp_path: Path) -> None:
    """Only what RobustBench would accept as measured is filled in."""
    path = tmp_path / "m.safetensors"
    weights(path, "resnet18", "cifar10-resnet18")
    eps, digest = 8 / 255, checksum(read_saved(path).model)
    facts = {"model": "ema", "weights_sha256": digest, "dataset": "cifar10", "root": None}
    attack = {"version": "standard", "norm": "Linf", "eps": eps}
    full = {"correct": 4902, "num_samples": 10000, "value": 0.4902}
    clean = {"correct": 8782, "num_samples": 10000, "value": 0.8782}
    evaluation = path.with_name("m.evaluation.json")
    for changes, reported in (
        ({}, "49.02"),
        ({"version": "torchattacks10"}, None),
        ({"eps": 4 / 255}, None),
        ({"num_samples": 5000}, None),
    ):
        accuracy = {"clean": clean, "autoattack": {**full, **attack, **changes}}
        evaluation.write_text(json.dumps({**facts, "accuracy": accuracy}))
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        export_checkpoint(path, "robustbench", out)
        (file,) = (out / "model_info" / "cifar10" / "Linf").iterdir()
        entry = json.loads(file.read_text())
        assert entry["clean_acc"] == "87.82" and entry["autoattack_acc"] == reported
        assert (entry["eps"], entry["architecture"]) == ("8/255", "ResNet-18")
        assert entry["venue"] == "ICLR 2025" and entry["additional_data"] is False
    for key in facts:
        evaluation.write_text(json.dumps({**facts, key: "other", "accuracy": accuracy}))
        record = export_checkpoint(path, "hub", tmp_path / f"other-{key}")
        assert record["accuracy"] == {}, key
    named = export_checkpoint(path, "robustbench", tmp_path / "named", name="Mine2026_RN18")
    assert named["weights_file"] == "models/cifar10/Linf/Mine2026_RN18.pt"
    assert (tmp_path / "named/model_info/cifar10/Linf/Mine2026_RN18.json").is_file()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "wrn34-10"])
def test_names_go_there_and_back(name: str, scheme: str) -> None:
    with torch.device("meta"):
        state = create_model(name, 10, norm="shared").state_dict()
    try:
        named = to_scheme(state, name, scheme)
    except ValueError as error:
        assert "has no class for" in str(error)
        return
    assert len(named) == len(state)
    assert list(to_own(named, state)) == list(state)


@pytest.mark.parametrize(
    ("options", "keyword"),
    [
        (["--format", "torchvision"], "resnet8"),
        (["--format", "robustbench"], "resnet8"),
        (["--format", "pickle"], "pickle"),
        (["--format", "hub", "--name", "../x"], "--name"),
    ],
)
def test_what_is_refused(
    ema_run: Path,
    tmp_path: Path,
    options: list[str],
    keyword: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["export", str(ema_run), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and keyword in error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_stays(ema_run: Path) -> None:
    before = {path.name for path in ema_run.iterdir()}
    with pytest.raises(FileExistsError, match="--out"):
        export_checkpoint(ema_run, "hub", ema_run)
    assert {path.name for path in ema_run.iterdir()} == before


def test_other_logits_are_not_exported(
    ema_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = create_model("resnet8", 10, 1, norm="shared").eval()
    monkeypatch.setattr(folder, "load", lambda path: other)
    with pytest.raises(ValueError, match="logits"):
        export_checkpoint(ema_run, "hub", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_command_line_without_folders() -> None:
    command = "arat-fast train cifar10-resnet18 --data.root=/data --out 'a b' --seed 3"
    assert public_command(command) == "arat-fast train cifar10-resnet18 --seed 3"
    paths = ("--data.root", "--data.unsup", "--objective.teacher", "--init")
    for option in paths:
        command = f"arat-fast train digits {option} /home/me --seed 3"
        assert public_command(command) == "arat-fast train digits --seed 3"
    assert public_command("an 'open quote") == ""
