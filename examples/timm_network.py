"""A timm network: packed after training, and what of it stays in float.

pip install -e .[zoos]
python examples/timm_network.py --model mobilenetv3_large_100 --weights mine.pth --data DIR --size 224
python examples/timm_network.py                                   resnet18d, trained on digits first, in a minute
"""

from __future__ import annotations

import argparse

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
import lbs.data
from lbs.data.pictures import read_pictures


def train_on_digits(model: nn.Module, size: int) -> Tensor:
    """Images [N, 3, size, size] that the network has seen; stands for the training it comes from."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    seen = []
    for images, labels in lbs.data.train_loader(lbs.data.load("digits"), batch_size=32, augment=False):
        seen.append(F.interpolate(images, size=size).repeat(1, 3, 1, 1))
        optimizer.zero_grad()
        F.cross_entropy(model(seen[-1]), labels).backward()
        optimizer.step()
    return torch.cat(seen)[:256]


parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
parser.add_argument("--model", default="resnet18d", help="a name of timm.list_models()")
parser.add_argument("--weights", help="its state dict; without, it is trained on digits")
parser.add_argument("--data", help="a folder of images for the ranges; 64 are taken")
parser.add_argument("--size", type=int, default=32, help="sides of the images")
args = parser.parse_args()
if args.weights and args.data:
    model = timm.create_model(args.model, pretrained=False)
    model.load_state_dict(torch.load(args.weights, weights_only=True))
    pixels, _ = read_pictures(args.data, count=64, size=args.size)
    norm = timm.data.resolve_model_data_config(model)
    images = lbs.data.normalize(pixels.permute(0, 2, 3, 1), norm["mean"], norm["std"])
else:
    model = timm.create_model(args.model, pretrained=False, num_classes=10)
    images = train_on_digits(model, args.size)
packed = lbs.quantize(model.eval(), images[:-32])
print(packed.report)  # what is not packed is named with its reason
unseen = lbs.fidelity(model, packed, images[-32:])
print(f"other images: {unseen.kept} of {unseen.images} keep their class, outputs are off by {unseen.error:.1%}")
print(lbs.explain(packed))
packed.save(f"{args.model}.lbs.safetensors")
