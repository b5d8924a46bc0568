"""Makes the network in lbs/zoo: CIFAR-100 ResNet-20 from float weights, searched, fine-tuned, packed, checked.

    python benchmarks/cifar100_resnet20.py --data cifar100.npz --weights cifar100_resnet20.pth --out DIR \
        --epochs 30 --minutes 35

The schedule is a shortened one (the paper's is 30 + 200 epochs): the cosine ends with the epochs or with the minutes,
whichever comes first, and the record says where it ended. bfloat16 autocast while training, float32 when measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
from lbs.data.loader import TensorLoader, normalize
from lbs.models import create
from lbs.plan import Plan
from lbs.search import parameter_groups, plan_of

MEAN, STD = (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)
BATCH, CALIBRATION_BATCHES, TEMPERATURE, DISTILL = 128, 16, 3.0, 0.7
SEARCH_LR, GATE_LR, PRUNE_LR, STRENGTH, GAIN, PRUNING_CAP = 1e-3, 0.006, 0.032, 1.4, 0.009, 0.25


def main() -> None:
    """Search, fine-tune, or evaluate what an earlier call left in --out."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    data = np.load(args.data)
    model = create("cifar_resnet20", 100)
    model.load_state_dict(torch.load(args.weights, weights_only=True))
    loader = train_loader(data, seed=args.seed)
    calibration = [x for _, (x, _) in zip(range(CALIBRATION_BATCHES), loader, strict=False)]
    plan_path, weights_path = args.out / "plan.json", args.out / "model.safetensors"
    training_path = args.out / "training.json"
    if not args.evaluate_only:
        frozen = search(model, loader, calibration, args.bops)
        plan_of(frozen).save(plan_path)
        epochs = finetune(frozen, model, train_loader(data, seed=args.seed + 1), args, weights_path)
        training = {
            "schedule": f"{epochs} of 200 fine-tuning epochs, bfloat16 autocast",
            "seed": args.seed,
            "lr": args.lr,
        }
        training_path.write_text(json.dumps(training))
    prepared = lbs.prepare(model, calibration[0][:2], lbs.SearchConfig(max_pruning_ratio=PRUNING_CAP))
    frozen = lbs.freeze(prepared, Plan.load(plan_path))
    frozen.load_state_dict(load_file(str(weights_path)))
    record = json.loads(training_path.read_text()) | evaluate(frozen.eval(), data, args.out)
    (args.out / "record.json").write_text(json.dumps(record, indent=1))
    print(json.dumps(record, indent=1))


def search(model: nn.Module, loader: TensorLoader, calibration: list[Tensor], bops: float) -> nn.Module:
    """Train gates and weights until the budget is met; the frozen network, calibrated at its final bits."""
    config = lbs.SearchConfig(max_pruning_ratio=PRUNING_CAP)
    searched = lbs.calibrate(lbs.prepare(model, calibration[0][:2], config), calibration)
    searched.to(memory_format=torch.channels_last)
    budget = lbs.Budget(searched, bops=bops, strength=STRENGTH, gain=GAIN)
    groups = parameter_groups(searched, SEARCH_LR, gate_lr=GATE_LR, prune_lr=PRUNE_LR)
    optimizer = torch.optim.SGD(groups, lr=SEARCH_LR, momentum=0.9, nesterov=True)
    searched.train()
    for x, y in loader:
        loss = F.cross_entropy(forward(searched, x), y) + budget()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.step()
        if budget.frozen:
            break
    print(budget.finish(), flush=True)
    return lbs.calibrate(lbs.freeze(searched), calibration, bits=None)


def finetune(
    model: nn.Module, teacher: nn.Module, loader: TensorLoader, args: argparse.Namespace, weights_path: Path
) -> int:
    """Distil from the float network; saves after each epoch and returns how many ran."""
    model.train().to(memory_format=torch.channels_last)
    teacher.eval().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(parameter_groups(model, args.lr), lr=args.lr, momentum=0.9, nesterov=True)
    steps, start, done = args.epochs * len(loader), time.monotonic(), 0
    for epoch in range(args.epochs):
        for x, y in loader:
            share = min(1.0, max(done / steps, (time.monotonic() - start) / (60 * args.minutes)))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1, (done + 1) / 100) * 0.5 * (1 + math.cos(math.pi * share))
            loss = distillation_loss(model, teacher, x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
            if share >= 1:
                break
        scratch = weights_path.with_suffix(".part")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, str(scratch))
        os.replace(scratch, weights_path)
        print(json.dumps({"epoch": epoch + 1, "loss": loss.item()}), flush=True)
        if share >= 1:
            break
    return epoch + 1


def distillation_loss(model: nn.Module, teacher: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(1 - d) cross entropy + d T^2 KL(teacher, student) of logits softened by T."""
    with torch.no_grad():
        target = F.log_softmax(forward(teacher, x) / TEMPERATURE, 1)
    logits = forward(model, x)
    softened = F.log_softmax(logits / TEMPERATURE, 1)
    distance = F.kl_div(softened, target, log_target=True, reduction="batchmean")
    return (1 - DISTILL) * F.cross_entropy(logits, y) + DISTILL * TEMPERATURE**2 * distance


def forward(model: nn.Module, x: Tensor) -> Tensor:
    """Logits float32, the network under bfloat16 autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x.contiguous(memory_format=torch.channels_last)).float()


@torch.no_grad()
def evaluate(model: nn.Module, data: np.lib.npyio.NpzFile, out: Path) -> dict[str, object]:
    """Pack, save, load again, and compare packed with fine-tuned model on all test images."""
    packed = lbs.pack(model)
    path = out / "cifar100-resnet20.lbs.safetensors"
    packed.save(path)
    packed = lbs.load(path)
    images, labels = normalize(torch.from_numpy(data["test_x"]), MEAN, STD), torch.from_numpy(data["test_y"]).long()
    tuned = torch.cat([model(x).argmax(1) for x in images.split(500)])
    served = torch.cat([packed(x).argmax(1) for x in images.split(500)])
    differing = images[tuned != served]
    report = lbs.verify(model, packed, torch.cat([differing, images[:200]]))
    plan = plan_of(model)
    return {
        "images": len(labels),
        "fine_tuned_top1": (tuned == labels).float().mean().item() * 100,
        "packed_top1": (served == labels).float().mean().item() * 100,
        "equal_predictions": int((tuned == served).sum()),
        "bops": plan.bops(),
        "full_precision_bops": plan.full_precision_bops(),
        "epoch": "last",
        "bits": sorted({(layer.w_bits, layer.a_bits) for layer in plan.layers}),
        "pruned_layers": {e.name: f"{e.kept_filters}/{e.filters}" for e in plan.layers if e.kept_filters < e.filters},
        "bytes": path.stat().st_size,
        "verify": str(report),
    }


def train_loader(data: np.lib.npyio.NpzFile, seed: int) -> TensorLoader:
    """Augmented, shuffled training batches."""
    images, labels = torch.from_numpy(data["train_x"]), torch.from_numpy(data["train_y"]).long()
    return TensorLoader(
        images, labels, mean=MEAN, std=STD, batch_size=BATCH, shuffle=True, augment=True, seed=seed, drop_last=True
    )


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="npz with train_x, train_y, test_x, test_y")
    parser.add_argument("--weights", type=Path, required=True, help="float state dict (.pth)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bops", type=float, default=650e6)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--minutes", type=float, default=35.0)
    parser.add_argument("--lr", type=float, default=0.03)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluate-only", action="store_true", help="take plan.json and model.safetensors from --out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
