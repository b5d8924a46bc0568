"""MobileNetV2 after training: packed in one call from a folder of images, without labels, and timed.

python examples/mobilenet.py --weights mobilenet_v2.pth --data DIR    torchvision's weights, images of any size
python examples/mobilenet.py                                          trained on digits first, in a minute
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lbs
import lbs.data
import lbs.models
from lbs.data.pictures import read_pictures

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def trained_on_digits() -> tuple[nn.Module, Tensor]:
    """A network and images [N, 3, 32, 32] such as it is trained on, where no weights are at hand."""
    model = lbs.models.create("mobilenet_v2", num_classes=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.002)
    seen = []
    for _ in range(5):
        for images, labels in lbs.data.train_loader(lbs.data.load("digits"), batch_size=64, augment=False):
            seen.append(F.interpolate(images, size=32).expand(-1, 3, -1, -1))
            optimizer.zero_grad()
            F.cross_entropy(model(seen[-1]), labels).backward()
            optimizer.step()
    return model.eval(), torch.cat(seen)[:256].contiguous()


parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
parser.add_argument("--weights", help="a state dict of torchvision's mobilenet_v2")
parser.add_argument("--data", help="a folder of images, in it or in folders of it; 64 are taken")
parser.add_argument("--bits", default="8,8", help="of weights and activations")
args = parser.parse_args()
if args.weights and args.data:
    model = lbs.models.create("mobilenet_v2")
    model.load_state_dict(torch.load(args.weights, weights_only=True))
    pixels, unread = read_pictures(args.data, count=64, size=224)
    images = lbs.data.normalize(pixels.permute(0, 2, 3, 1), MEAN, STD)
    print(f"{len(images)} images, {len(unread)} could not be read")
else:
    model, images = trained_on_digits()
weights, activations = map(int, args.bits.split(","))
rounding = "nearest" if weights == 8 else "optimized"
packed = lbs.quantize(model.eval(), images, bits=(weights, activations), rounding=rounding, measure=True)
print(packed.report)
packed.save("mobilenet_v2.lbs.safetensors")
again = lbs.load("mobilenet_v2.lbs.safetensors")
print("a call of the loaded file gives the same bits:", torch.equal(again(images[:4]), packed(images[:4])))
