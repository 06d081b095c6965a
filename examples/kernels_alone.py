"""The operations without the trainer: an attack, a step on both branches, the invariance loss.

``arat_kernels`` needs PyTorch alone. On a GPU its operations are Triton kernels, elsewhere plain
PyTorch; ``impl="reference"`` or ``"triton"`` chooses.
"""

import torch
import torch.nn.functional as F
from torch import nn

from arat_kernels.cosine_invariance import cosine_invariance
from arat_kernels.pgd_step import pgd_step, random_start
from arat_kernels.split_batch_norm import SplitBatchNorm2d, use_branch, use_statistics

EPS, ALPHA = 8 / 255, 2 / 255

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
features = nn.Sequential(
    *(nn.Conv2d(3, 32, 3, padding=1), SplitBatchNorm2d(32), nn.ReLU()),
    *(nn.Conv2d(32, 32, 3, padding=1), SplitBatchNorm2d(32), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
).to(device)
classifier = nn.Linear(32, 10).to(device)
x = torch.rand(16, 3, 32, 32, device=device)
y = torch.randint(10, (16,), device=device)

# PGD through the adversarial branch, on the statistics of the batch; no running ones move.
rng = torch.tensor([0, 0], device=device)  # seed and offset of the random start
x_adv = random_start(x, rng, eps=EPS).clamp(0, 1)
with use_branch(features, "adv"), use_statistics(features, "batch"):
    for _ in range(10):
        x_adv.requires_grad_()
        loss = F.cross_entropy(classifier(features(x_adv)), y)
        (grad,) = torch.autograd.grad(loss, x_adv)
        x_adv = pgd_step(x_adv.detach(), grad, x, eps=EPS, alpha=ALPHA)  # in the ball and in [0, 1]

# Both halves in one pass: convolutions are shared, statistics and affine parameters are not.
with use_branch(features, "both"):
    z_clean, z_adv = features(torch.cat([x, x_adv])).chunk(2)
distance = cosine_invariance([z_adv], [z_clean])  # a value a layer; no gradient to the targets
loss = F.cross_entropy(classifier(z_adv), y) + 30 * distance.sum()
loss.backward()

moved = (x_adv - x).abs().max() * 255
clean_mean, adv_mean = features[1].running_mean
print(f"attack: {moved:.1f}/255; mean 1 - cosine: {distance.item():.4f}")
print(f"largest gap of the running means: {(adv_mean - clean_mean).abs().max():.1e}")
