"""A network of your own on CIFAR-100: train it, search within a share of its bit operations, fine-tune, pack, verify.

python examples/own_cnn.py --data cifar100.npz --epochs 20     a .npz, CIFAR-100's folder, or folders of images
python examples/own_cnn.py                                     the digits that scikit-learn ships, in seconds
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn import functional as F

import lbs
import lbs.data
import lbs.search


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def train(model: nn.Module, epochs: int, rate: float, budget: lbs.Budget | None = None) -> None:
    optimizer = torch.optim.SGD(lbs.search.parameter_groups(model, lr=rate), momentum=0.9, nesterov=True)
    curve = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader)) if budget is None else None
    model.train()
    for _ in range(epochs):
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels) + (budget() if budget else 0)
            optimizer.zero_grad(), loss.backward(), optimizer.step()
            _ = budget.step() if budget else curve.step() if curve else None


def top1(model: nn.Module) -> str:
    right = [model(images).argmax(1) == labels for images, labels in test]
    return f"{100 * torch.cat(right).float().mean():.2f} %"


parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
parser.add_argument("--data", default="digits", help="digits, a .npz, CIFAR-100's folder, or folders of images")
parser.add_argument("--epochs", type=int, default=3, help="of each of the three phases")
parser.add_argument("--bops", type=float, default=0.02, help="share of the bit operations of float")
args = parser.parse_args()
data = lbs.data.load(args.data)
loader, test = lbs.data.train_loader(data, 64, augment=data.name != "digits"), lbs.data.eval_loader(data)
body = [block(data.channels, 32, 1), block(32, 64, 2), block(64, 128, 2), block(128, 128, 1)]
net = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, len(data.classes)))
train(net, args.epochs, 0.1)
print("float:", top1(net.eval()))
model = lbs.calibrate(lbs.prepare(net, next(iter(loader))[0]), [next(iter(loader))[0]])
budget = lbs.Budget(model, bops=args.bops)
train(model, args.epochs, 0.01, budget)
print(budget.finish())
frozen = lbs.freeze(model)
train(frozen, args.epochs, 0.02)
packed = lbs.pack(frozen.eval())
print("packed:", top1(packed), lbs.verify(frozen, packed, next(iter(test))[0][:16]), sep="\n")
packed.save("own_cnn.lbs.safetensors")
