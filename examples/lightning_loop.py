"""ARAT in PyTorch Lightning: ``pip install lightning``, one process, any accelerator.

The step runs backward and the optimiser itself, so the optimisation is manual.
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from arat_fast import ARAT, PGD, ThreatModel, TrainStep, evaluate
from arat_fast.models import create_model

EPOCHS, EPS = 4, 0.12


class RobustDigits(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = create_model("resnet8", num_classes=10, in_channels=1)  # split BatchNorm
        self.objective = ARAT(self.model, ["layer3.0.bn1", "layer3.0.bn2"], (1, 8, 8))
        self.clean_accuracy = 0.1  # chance

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def on_train_start(self):
        optimizer = self.optimizers().optimizer  # the optimiser itself, without Lightning around it
        attack = PGD(eps=EPS, alpha=EPS / 4, num_steps=5)
        self.step = TrainStep(self.model, self.objective, attack, optimizer)

    def on_train_epoch_start(self):
        self.objective.start_epoch(self.clean_accuracy)
        self.seen = []

    def training_step(self, batch, index):
        metrics = self.step(*batch)
        self.seen.append(metrics["accuracy_clean"])
        if index % 10 == 0:  # reading a metric waits for the device
            self.log_dict({name: float(value) for name, value in metrics.items()})

    def on_train_epoch_end(self):
        self.clean_accuracy = float(torch.stack(self.seen).mean())


digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
labels = torch.tensor(digits.target)
loader = DataLoader(
    TensorDataset(images[:1437], labels[:1437]), batch_size=64, shuffle=True, drop_last=True
)

lightning.seed_everything(0)
module = RobustDigits()
trainer = lightning.Trainer(max_epochs=EPOCHS, devices=1, logger=False)
trainer.fit(module, loader)

test_data = TensorDataset(images[1437:], labels[1437:])
print(evaluate(module.model, test_data, ThreatModel(eps=EPS), ["pgd"]))
