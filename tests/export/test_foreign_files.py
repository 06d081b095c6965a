"""Files of other projects: read whatever wrapped them, or refused with the true reason."""

from __future__ import annotations

import argparse
import gzip
import io
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import generator, randomize
from official import state_dict_to_official
from safetensors.torch import save_file
from torch import Tensor, nn

import arat_fast
from arat_fast.models import create_model
from arat_fast.saved.naming import to_scheme

X = torch.rand(3, 1, 8, 8, generator=generator(3))
NETWORKS = {
    "official": randomize(create_model("resnet8", 10, 1)).eval(),
    "split": randomize(create_model("resnet8", 10, 1)).eval(),
    "plain": randomize(create_model("resnet8", 10, 1, "shared")).eval(),
}
State = dict[str, Tensor]


def state_of(kind: str) -> State:
    state = NETWORKS[kind].state_dict()
    return state_dict_to_official(state) if kind == "official" else dict(state)


def prefixed(*prefixes: str) -> Callable[[State], State]:
    return lambda state: {"".join(prefixes) + name: tensor for name, tensor in state.items()}


WRAPPED: dict[str, Callable[[State], Any]] = {
    "parallel": prefixed("module."),
    "compiled": prefixed("_orig_mod."),
    "parallel of compiled": prefixed("module.", "_orig_mod."),
    "Lightning of compiled": prefixed("model.", "_orig_mod."),
    "averaged": lambda s: {"n_averaged": torch.tensor(3), **prefixed("module.")(s)},
    "averaged of parallel": lambda s: {
        "module.n_averaged": torch.tensor(3),
        **prefixed("module.", "module.")(s),
    },
    "average": prefixed("ema."),
    "another name": prefixed("network."),
    "second of two": prefixed("1."),
    "sharded inside": lambda s: {
        name.replace("layer1.", "layer1._fsdp_wrapped_module._orig_mod."): tensor
        for name, tensor in s.items()
    },
}
NESTED: dict[str, Callable[[State], Any]] = {
    **{key: lambda s, key=key: {key: s, "epoch": 3} for key in ("state_dict", "net", "ema")},  # type: ignore[misc]
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}},
    "average of a wrapper": lambda s: {"ema": {"module": prefixed("module.")(s), "decay": 0.9}},
    "state_dict of a model": lambda s: {"state_dict": {"model": s}},
    "another key": lambda s: {
        "params_ema": s,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2, 2)}}, "param_groups": []},
    },
    "nested": lambda s: {"model": {"state_dict": s}, "args": {"model": "resnet"}},
    "Lightning": lambda s: {
        "state_dict": OrderedDict(prefixed("model.")(s)),
        "callbacks": {"ModelCheckpoint": {"best": 0.5}},
        "hyper_parameters": {"model": {"name": "resnet8"}},
    },
}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("wrap", [*WRAPPED, *NESTED])
def test_a_network_is_read_whatever_wraps_it(wrap: str, network: str, tmp_path: Path) -> None:
    content = {**WRAPPED, **NESTED}[wrap](state_of(network))
    torch.save(content, tmp_path / "weights.pt")
    expected = arat_fast.load(plain(tmp_path, network), recipe="digits")(X)
    assert torch.equal(arat_fast.load(tmp_path / "weights.pt", recipe="digits")(X), expected)
    if wrap in WRAPPED:
        save_file(content, tmp_path / "weights.safetensors")
        read = arat_fast.load(tmp_path / "weights.safetensors", recipe="digits")
        assert torch.equal(read(X), expected)


def plain(folder: Path, network: str) -> Path:
    torch.save(state_of(network), folder / "plain.pt")
    return folder / "plain.pt"


def test_names_of_other_libraries_are_known(tmp_path: Path) -> None:
    """With RobustBench's normalisation around them, as our own export writes it."""
    model = randomize(create_model("resnet18", 10, 3, "shared", (0.4,) * 3, (0.3,) * 3)).eval()
    x = torch.rand(2, 3, 32, 32, generator=generator(5))
    for scheme in ("robustbench", "torchvision"):
        state = prefixed("model.")(to_scheme(model.state_dict(), "resnet18", scheme))
        state["normalize.mean"] = torch.full((1, 3, 1, 1), 0.4)
        state["normalize.std"] = torch.full((1, 3, 1, 1), 0.3)
        torch.save({"state_dict": prefixed("module.")(state)}, tmp_path / "weights.pt")
        read = arat_fast.load(tmp_path / "weights.pt", recipe="cifar10-resnet18")
        assert torch.allclose(read(x), model(x), atol=1e-5)


class Settings:
    """What no reader knows."""


class MyDict(OrderedDict):  # type: ignore[type-arg]
    """A subclass: unpickling it would call its own code."""


OBJECTS: dict[str, tuple[Callable[[State], Any], str]] = {
    "Namespace": (lambda s: {"state_dict": s, "args": argparse.Namespace(lr=0.1)}, "Namespace"),
    "NumPy's number": (lambda s: {"state_dict": s, "best": np.float64(0.5)}, "numpy"),
    "a class": (lambda s: {"model": s, "config": Settings()}, "Settings"),
    "a subclass": (lambda s: MyDict(s), "MyDict"),
    "a network": (lambda s: NETWORKS["plain"], "ResNet"),
    "a wrapped network": (lambda s: nn.DataParallel(NETWORKS["plain"]), "DataParallel"),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_beside_tensors_are_named(kind: str, tmp_path: Path) -> None:
    make, word = OBJECTS[kind]
    torch.save(make(state_of("plain")), tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", rf"{word}.*weights_only=False", "cut")


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("weights/last.pt", content)
    return file.getvalue()


def tarred(content: bytes) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("last.pt")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def scripted(_: bytes) -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    return file.getvalue()


def saved_safely(_: bytes) -> bytes:
    from safetensors.torch import save

    return save({"a": torch.ones(2)})


OTHERS: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "gzip": (gzip.compress, "gunzip"),
    "zip": (zipped, r"zip archive of last\.pt"),
    "tar": (tarred, "tar"),
    "page": (lambda _: b"\n<!DOCTYPE html><html>Sign in</html>", "web page"),
    "pointer": (
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
        "git lfs pull",
    ),
    "json": (lambda _: b'{"message": "not found"}', "JSON"),
    "script": (scripted, "TorchScript"),
    "safetensors": (saved_safely, r"\.safetensors"),
    "half": (lambda content: content[: len(content) // 2], "cut"),
    "nothing": (lambda _: b"", "0 bytes"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_that_is_something_else_is_called_that(kind: str, tmp_path: Path) -> None:
    make, word = OTHERS[kind]
    content = make(plain(tmp_path, "plain").read_bytes())
    (tmp_path / "weights.pt").write_bytes(content)
    refused(tmp_path / "weights.pt", word, "Traceback" if kind in ("half", "nothing") else "cut")
    if kind not in ("safetensors", "script", "zip", "half"):
        (tmp_path / "weights.safetensors").write_bytes(content)
        refused(tmp_path / "weights.safetensors", word, "\n")


@pytest.mark.parametrize("kept", [4, 600, 5000])
def test_a_safetensors_file_that_was_cut(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state_of("plain"), path)
    path.write_bytes(path.read_bytes()[:kept])
    refused(path, "cut", "suffix")


@pytest.mark.parametrize("names", [("model", "ema"), ("state_dict", "swa"), ("teacher", "student")])
def test_several_networks_in_one_file_are_not_chosen_from(
    names: tuple[str, str], tmp_path: Path
) -> None:
    state = state_of("plain")
    torch.save({names[0]: state, names[1]: {"module": state}, "epoch": 1}, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", ", ".join(names), "cut")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda weight: weight.to(torch.int8), "int8, expected torch.float32"),
        (lambda weight: weight.to(torch.complex64), "complex64"),
        (lambda weight: weight.to_sparse(), "sparse"),
        (lambda weight: weight.to("meta"), "sparse or empty"),
    ],
)
def test_weights_that_are_no_plain_numbers(
    change: Callable[[Tensor], Tensor], word: str, tmp_path: Path
) -> None:
    state = {n: change(t) if n == "conv1.weight" else t for n, t in state_of("plain").items()}
    torch.save(state, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt", f"conv1.weight.*{word}", "cut")


def test_a_zip_of_torch_by_the_other_name(tmp_path: Path) -> None:
    plain(tmp_path, "plain").rename(tmp_path / "weights.safetensors")
    refused(tmp_path / "weights.safetensors", r"\.pt", "cut")


def refused(path: Path, pattern: str, without: str) -> None:
    with pytest.raises(ValueError, match=pattern) as error:
        arat_fast.load(path, recipe="digits")
    message = str(error.value)
    assert str(path) in message and without not in message and "\n" not in message
