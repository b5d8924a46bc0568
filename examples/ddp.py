"""DistributedDataParallel: search and fine-tune in several processes, pack in the first.

torchrun --nproc-per-node 2 examples/ddp.py --data cifar100.npz --model cifar_resnet20    on GPUs, if there are any
torchrun --nproc-per-node 2 examples/ddp.py                                               digits, on the CPU
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
import lbs.data
import lbs.models
import lbs.search


class Loss(nn.Module):
    """Model and budget in one forward pass: thresholds get gradients from both, and DDP has to see all of them."""

    def __init__(self, model: nn.Module, budget: lbs.Budget | None) -> None:
        super().__init__()
        self.model, self.budget = model, budget

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(images), labels) + (self.budget() if self.budget else 0)


def train(model: nn.Module, epochs: int, budget: lbs.Budget | None = None) -> None:
    loss = nn.parallel.DistributedDataParallel(Loss(model, budget), find_unused_parameters=budget is not None)
    optimizer = torch.optim.SGD(lbs.search.parameter_groups(model, lr=0.02), momentum=0.9, nesterov=True)
    for images, labels in (batch for _ in range(epochs) for batch in loader):
        optimizer.zero_grad(), loss(images, labels).backward(), optimizer.step(), budget.step() if budget else None


parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
parser.add_argument("--data", default="digits", help="digits, a .npz, CIFAR-100's folder, or folders of images")
parser.add_argument("--model", default="digits_resnet8", help="a name of lbs.models")
parser.add_argument("--epochs", type=int, default=3, help="of each of the three phases")
args = parser.parse_args()
dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, data = dist.get_rank(), lbs.data.load(args.data)
device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
loader = lbs.data.train_loader(data, 64, device=device, rank=rank, world_size=dist.get_world_size(), augment=False)
net = lbs.models.create(args.model, len(data.classes)).to(device)
train(net, args.epochs)
batch = next(iter(lbs.data.train_loader(data, 256, device=device, augment=False)))[0]  # the same in every process
model = lbs.calibrate(lbs.prepare(net, batch), [batch])
budget = lbs.Budget(model, bops=0.02)
train(model, args.epochs, budget)
result, frozen = budget.finish(), lbs.freeze(model)
train(frozen, args.epochs)
if rank == 0:
    print(result, lbs.verify(frozen, lbs.pack(frozen.eval()), batch), sep="\n")
dist.destroy_process_group()
