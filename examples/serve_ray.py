"""A service with Ray Serve (`pip install 'ray[serve]'`): batches, health checks, dead replicas are replaced.

python examples/serve_ray.py network.lbs.safetensors --replicas 2
curl --data-binary @image.bin http://127.0.0.1:8000/       the values of one image [C, H, W], float32 or bytes
"""

from __future__ import annotations

import argparse
import os
from contextlib import suppress
from typing import Any

import numpy as np
import ray
import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse
from torch import Tensor

import lbs


@serve.deployment(max_ongoing_requests=64, health_check_period_s=5)
class Classifier:
    def __init__(self, path: str) -> None:
        torch.set_num_threads(1)  # replicas are the threads of a service
        self.packed = lbs.load(path)
        self.dtype = np.dtype(str(self.packed.input_dtype).removeprefix("torch."))
        self.size = int(np.prod(self.packed.input_shape)) * self.dtype.itemsize
        self.probe = self.packed.random_images(1)
        self.expected = self.packed(self.probe)  # and the first call is behind us

    def check_health(self) -> None:
        """Ray calls it every 5 s, and starts another replica where it raises."""
        if not torch.equal(self.packed(self.probe), self.expected):
            raise RuntimeError("the network gives other logits than it gave when the replica started")

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.002)
    async def logits(self, images: list[Tensor]) -> list[Tensor]:
        """Images that came within 2 ms share a call; the bits of a reply do not depend on the company."""
        return list(self.packed(torch.stack(images)))

    async def __call__(self, request: Request) -> Any:
        if request.headers.get("content-length") != str(self.size):  # read no more than an image
            told = f"send {self.size} bytes: one image {list(self.packed.input_shape)} of {self.dtype}"
            return JSONResponse({"error": told}, status_code=400)
        values = np.frombuffer(await request.body(), self.dtype).copy()
        logits = await self.logits(torch.from_numpy(values).reshape(self.packed.input_shape))
        return JSONResponse({"class": int(logits.argmax()), "logits": logits.tolist(), "process": os.getpid()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", help="a packed network")
    parser.add_argument("--replicas", type=int, default=2, help="processes that compute, one core each")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1; /-/healthz says whether all is well")
    args = parser.parse_args()
    ray.init(num_cpus=args.replicas, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": args.port})
    with suppress(KeyboardInterrupt):
        serve.run(Classifier.options(num_replicas=args.replicas).bind(os.path.abspath(args.file)), blocking=True)
