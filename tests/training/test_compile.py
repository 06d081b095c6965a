"""torch.compile of the attack's passes: the same step, on the same modules."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from networks import generator
from torch import Tensor, nn

from arat_fast import ARAT, PGD, TrainStep, convert_split_batch_norm


@pytest.mark.slow
def test_the_attack_is_compiled_and_the_network_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The default compiler takes half a minute for this.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))

    def trained(compile: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(144, 3)
        model = convert_split_batch_norm(nn.Sequential(*layers))
        objective = ARAT(model, ["1"], (3, 8, 8), balance="fixed")
        parameters = [*model.parameters(), *objective.parameters()]
        step = TrainStep(
            model,
            objective,
            PGD(eps=0.1, alpha=0.05, num_steps=1),
            torch.optim.SGD(parameters, lr=0.1),
            precision=torch.float32,
            generator=generator(3),
            compile=compile,
        )
        for seed in (1, 2):
            values = step(
                torch.rand(4, 3, 8, 8, generator=generator(seed)), torch.tensor([0, 1, 2, 0])
            )
            assert "invariance/1" in set(values)
        return model.state_dict()

    torch._dynamo.utils.counters.clear()
    plain, compiled = trained(False), trained(True)
    assert torch._dynamo.utils.counters["frames"]["ok"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert list(plain) == list(compiled)
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, msg=name)
