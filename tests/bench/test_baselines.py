"""The plain baseline computes what our step computes; the official code is run as it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from networks import generator, randomize
from official import predictors_to_official, state_dict_to_official

from arat_fast.objectives import ARAT
from arat_fast.training.step import TrainStep
from benchmarks.baselines import PlainStep, plain_network
from benchmarks.official import OfficialStep, check_official
from benchmarks.workload import (
    EPS,
    LEARNING_RATE,
    MOMENTUM,
    WEIGHT_DECAY,
    WIDE_RESNETS,
    Workload,
)

TINY = [
    Workload("resnet8", batch_size=4, image_size=8, num_steps=2),
    Workload("wrn34-10", batch_size=4, image_size=8, num_steps=2),
]


@pytest.mark.parametrize("workload", TINY, ids=lambda workload: workload.model)
def test_naive_computes_the_terms_of_our_step(
    workload: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WIDE_RESNETS, "wrn34-10", (34, 1))
    torch.manual_seed(0)
    network = randomize(workload.network().double())
    objective = ARAT(network, workload.layers, workload.image_shape, gamma=workload.gamma).double()
    objective.start_epoch(0.5)
    plain = PlainStep(
        plain_network(workload).double(), num_steps=workload.num_steps, gamma=workload.gamma
    )
    plain.network.load_state_dict(state_dict_to_official(network.state_dict()))
    assert objective.predictors is not None
    for module, state in zip(
        plain.predictors, predictors_to_official(objective.predictors), strict=True
    ):
        module.load_state_dict({k.removeprefix("predictor_x."): v for k, v in state.items()})
    optimizer = torch.optim.SGD(
        [*network.parameters(), *objective.parameters()],
        LEARNING_RATE,
        momentum=MOMENTUM,
        weight_decay=WEIGHT_DECAY,
    )
    step = TrainStep(network, objective, workload.attack("batch_update"), optimizer)
    source = generator(3)
    for _ in range(3):
        shape = (workload.batch_size, *workload.image_shape)
        x = torch.rand(shape, generator=source, dtype=torch.float64)
        y = torch.randint(10, (workload.batch_size,), generator=source)
        noise = (2 * torch.rand(shape, generator=source, dtype=torch.float64) - 1) * EPS
        ours = step(x, y, noise)
        theirs = plain(x, y, noise)
        names = ["ce_adv", "ce_clean", *(f"invariance/{layer}" for layer in workload.layers)]
        assert len(theirs) == len(names)
        torch.testing.assert_close(
            torch.stack(list(theirs.values())),
            torch.stack([ours[name] for name in names]),
            rtol=1e-8,
            atol=1e-10,
        )
    # The third step's terms come from weights that two steps have changed.
    running = plain.network.state_dict()["bn1.adv.running_mean"]
    torch.testing.assert_close(running, network.state_dict()["bn1.running_mean"][1])


OFFICIAL = {
    "train_ARAT.py": """
import pandas, torchattacks
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
import utils.helper
from models.load_model import load_model

def train_one_epoch(args, epoch, net, loader, optimizer, adversary, losses, accuracy, device):
    total = 0.0
    for index, (x, y) in tqdm(enumerate(loader), total=len(loader)):
        adversary(net, x, y)
        total += float(x.min()) + accuracy
    return total / len(loader)
""",
    "attacks.py": """
import torch
class PGD_linf(torch.nn.Module):
    def __init__(self, epsilon, num_steps, step_size):
        super().__init__()
    def forward(self, net, x, y):
        x -= 5
""",
    "loss.py": """
import torch
class AlignLoss(torch.nn.Module):
    def __init__(self, args, is_use_predictor_x, feat_dim, hidden_dim):
        super().__init__()
        self.predictor_x = torch.nn.Linear(feat_dim, hidden_dim)
""",
    "models/load_model.py": """
import torch
class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.set_bn_name = lambda name: None
        self.model.reset_bn_name = lambda: None
        self.weight = torch.nn.Parameter(torch.zeros(1))
    def forward(self, x, get_feat=False):
        return x, {"layer4.0.bn1": torch.zeros(1, 8)}
def load_model(args, name, num_classes, extract_layers, is_avg_pool, is_relu):
    print("created", name)
    return Network()
""",
    "utils/helper.py": "",
}


@pytest.fixture
def official(tmp_path: Path) -> Path:
    for name, text in OFFICIAL.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_official_code_runs_unmodified_and_leaves_nothing_behind(
    official: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, modules = list(sys.path), set(sys.modules)
    mine = sys.modules["networks"]
    step = OfficialStep(official, Workload("resnet18", batch_size=2), torch.device("cpu"))
    x = torch.full((2, 3, 32, 32), 0.25)
    loss = step.run([(x, torch.zeros(2, dtype=torch.long))] * 2)
    # Its attack writes into the batch that it is given: each time another copy.
    assert loss == pytest.approx(0.25 - 5 + 0.5) and float(x.min()) == 0.25
    assert sys.path == path and sys.modules["networks"] is mine
    left = {name.partition(".")[0] for name in set(sys.modules) - modules}
    assert not left & {"train_ARAT", "attacks", "loss", "models", "utils", "pandas", "tqdm"}
    assert not list(official.rglob("__pycache__"))
    assert capsys.readouterr() == ("", "")


def test_official_code_must_be_there_and_have_the_network(official: Path) -> None:
    with pytest.raises(ValueError, match="resnet8"):
        check_official(official, Workload("resnet8"))
    (official / "loss.py").unlink()
    with pytest.raises(FileNotFoundError, match="loss"):
        check_official(official, Workload("resnet18"))
