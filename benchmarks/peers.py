"""Two trainings of CIFAR-10 as others write them, which `bench_time_to_accuracy.py` compares with suanli, each as a
whole process. Images are decoded beforehand, for them too. After each epoch, or about each minute of a long one, they
are evaluated on the test split, and the time for that doesn't count. So each gets the earliest moment at which it
reached a score, which one can't know while training.

    python benchmarks/peers.py plain|resnet18 arrays.npz --limit-s 600 --started SECONDS

Prints one JSON object a line: seconds since `--started` (of `time.time`, when the process was requested), epochs,
accuracy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from suanli.models.networks import resnet18

EVALUATE_EVERY_S = 60.0
Example = tuple[torch.Tensor, int]


def plain() -> tuple[nn.Module, torch.optim.Optimizer, int, int]:
    """The network of an ordinary tutorial with two fixes: it fits 32 px, and there is no softmax before the loss."""
    network = nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(8192, 10)),
    )
    return network, torch.optim.Adam(network.parameters(), lr=0.001), 64, 5


def usual_resnet18() -> tuple[nn.Module, torch.optim.Optimizer, int, int]:
    """Settings of https://github.com/kuangliu/pytorch-cifar."""
    network = resnet18.MODEL.build(classes=10, in_channels=3, image_size=(32, 32))
    return network, torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4), 128, 200


class Images(Dataset[Example]):
    """Images (N, 32, 32, 3) uint8, as tensors one by one; `varied` crops and mirrors them."""

    def __init__(self, images: np.ndarray, targets: np.ndarray, *, varied: bool) -> None:
        self.images, self.targets, self.varied = images, targets, varied

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, at: int) -> Example:
        image = normalize(self.images[at]).permute(2, 0, 1)
        if self.varied:
            top, left = torch.randint(9, (2,)).tolist()
            image = F.pad(image, (4, 4, 4, 4))[:, top : top + 32, left : left + 32]
            image = image.flip(2) if torch.rand(()) < 0.5 else image
        return image, int(self.targets[at])


def normalize(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).float().div(255).sub(0.5).div(0.5)


@torch.inference_mode()
def accuracy(network: nn.Module, images: np.ndarray, targets: np.ndarray) -> float:
    network.eval()
    right = 0
    for first in range(0, len(images), 500):
        batch = normalize(images[first : first + 500]).permute(0, 3, 1, 2)
        right += int((network(batch).argmax(1) == torch.from_numpy(targets[first : first + 500])).sum())
    network.train()
    return right / len(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=("plain", "resnet18"))
    parser.add_argument("arrays", type=Path)
    parser.add_argument("--limit-s", type=float, default=600.0)
    parser.add_argument("--started", type=float, default=time.time())
    args = parser.parse_args()
    for result in train(args):
        print(json.dumps(result), flush=True)


def train(args: argparse.Namespace) -> Iterator[dict[str, float]]:
    torch.manual_seed(0)
    arrays = {name: np.asarray(array) for name, array in np.load(args.arrays).items()}
    network, optimizer, batch_size, epochs = plain() if args.peer == "plain" else usual_resnet18()
    images = Images(arrays["x_train"], arrays["y_train"], varied=args.peer != "plain")
    loader = DataLoader(images, batch_size=batch_size, shuffle=True, num_workers=2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs) if args.peer != "plain" else None
    evaluating_s = evaluated_s = 0.0  # spent on evaluation, and the time of the last one
    for epoch in range(epochs):
        for number, (inputs, targets) in enumerate(loader, 1):
            optimizer.zero_grad()
            F.cross_entropy(network(inputs), targets).backward()
            optimizer.step()
            took = time.time() - args.started - evaluating_s
            if number == len(loader) or took > args.limit_s or took - evaluated_s > EVALUATE_EVERY_S:
                began = time.time()
                score = accuracy(network, arrays["x_test"], arrays["y_test"])
                evaluating_s += time.time() - began
                evaluated_s = took
                yield {"seconds": took, "epochs": epoch + number / len(loader), "accuracy": score}
            if took > args.limit_s:
                return
        if schedule is not None:
            schedule.step()


if __name__ == "__main__":
    main()
