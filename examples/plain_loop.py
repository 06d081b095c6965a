"""ARAT in a training loop of one's own: network, data, schedule, evaluation, weights."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from arat_fast import ARAT, PGD, ThreatModel, TrainStep, convert_split_batch_norm, evaluate
from arat_fast.saved.plain import export_plain, save_safetensors

EPOCHS, EPS = 4, 0.12

digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]  # (1797, 1, 8, 8), [0, 1]
labels = torch.tensor(digits.target)
train_data = TensorDataset(images[:1437], labels[:1437])
test_data = TensorDataset(images[1437:], labels[1437:])

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
network = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)),
)
model = convert_split_batch_norm(network).to(device)  # before objective and optimiser
objective = ARAT(model, layers=["5", "8"], image_shape=(1, 8, 8)).to(device)  # module paths
parameters = [*model.parameters(), *objective.parameters()]  # its predictors learn too
loader = DataLoader(train_data, batch_size=64, shuffle=True, drop_last=True)
optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=EPOCHS * len(loader))
# In bf16 where the GPU, or the CPU, has it; precision=torch.float32 keeps float32.
step = TrainStep(model, objective, PGD(eps=EPS, alpha=EPS / 4, num_steps=5), optimizer)

clean_accuracy = 0.1  # chance; ARAT balances its two classification losses by that of the epoch
parts = {"model": model, "objective": objective, "optimizer": optimizer, "schedule": schedule}
for epoch in range(EPOCHS):
    objective.start_epoch(clean_accuracy)
    seen = []
    for x, y in loader:
        metrics = step(x.to(device), y.to(device))  # tensors on the device, not synchronised
        schedule.step()
        seen.append(metrics["accuracy_clean"])
    clean_accuracy = float(torch.stack(seen).mean())
    print(f"epoch {epoch + 1}: loss {metrics['loss']:.2f}, clean accuracy {clean_accuracy:.1%}")
    # To go on: load_state_dict of each, before the first step, and these two numbers.
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"epoch": epoch + 1, "clean_accuracy": clean_accuracy, **state}, "checkpoint.pt")

# Outside of the step every layer runs its adversarial branch, the robust network.
print(evaluate(model, test_data, ThreatModel(eps=EPS), ["pgd"]))
# Ordinary BatchNorm again: fits the network as it was before the conversion.
save_safetensors(export_plain(model), "robust.safetensors")
