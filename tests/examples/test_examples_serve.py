"""A service of several processes on loopback: replies are the packed network's, also while a replica dies."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lbs
import lbs.zoo

ROOT = Path(__file__).parents[2]
FILE = lbs.zoo.entry("cifar100-resnet20").path
PATIENCE = 240.0  # seconds until a service is up, and until a dead replica is replaced
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # all of Ray's own ports too

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="not installed: pip install 'ray[serve]'"),
]


@dataclass(frozen=True)
class Service:
    """A running example."""

    url: str
    errors: list[str]  # of requests that had to be sent again

    def reply(self, body: bytes) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(self.url, data=body)
        try:
            with urllib.request.urlopen(request, timeout=30) as found:
                return int(found.status), json.loads(found.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read()) if error.code == 400 else {}

    def classify(self, image: Tensor, tries: int = 60) -> dict[str, Any]:
        """The reply to one image, asked for again where there was none."""
        for _ in range(tries):
            try:
                code, found = self.reply(image.numpy().tobytes())
            except OSError as error:
                code, found = 0, {"error": repr(error)}
            if code == 200:
                return found
            self.errors.append(f"{code} {found}")
            time.sleep(0.5)
        raise AssertionError(f"no reply in {tries} tries: {self.errors[-1]}")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("service") / "log"
    command = [sys.executable, "examples/serve_ray.py", str(FILE), "--replicas", "2", "--port", str(port)]
    with log.open("wb") as words:
        server = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **LOOPBACK}, stdout=words, stderr=subprocess.STDOUT
        )
    try:
        running = Service(f"http://127.0.0.1:{port}/", [])
        deadline = time.monotonic() + PATIENCE
        while not _healthy(running):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield running
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)


def _healthy(service: Service) -> bool:
    try:
        with urllib.request.urlopen(f"{service.url}-/healthz", timeout=5) as found:
            return bool(found.read() == b"success")
    except OSError:
        return False


@pytest.fixture(scope="module")
def images() -> Tensor:
    return lbs.load(FILE).random_images(96, torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(images: Tensor) -> Tensor:
    return lbs.load(FILE)(images)


def check(replies: list[dict[str, Any]], expected: Tensor) -> None:
    logits = torch.tensor([found["logits"] for found in replies], dtype=torch.float32)
    assert torch.equal(logits, expected)
    assert [found["class"] for found in replies] == expected.argmax(1).tolist()


def processes(service: Service, images: Tensor, gone: int = 0) -> set[int]:
    """The two replicas that answer, as soon as two do."""
    deadline, found = time.monotonic() + PATIENCE, set[int]()
    while len(found - {gone}) < 2:
        assert time.monotonic() < deadline, f"only {found - {gone}} answers"
        found |= {int(service.classify(image)["process"]) for image in images[:16]}
    return found - {gone}


def test_replies_are_the_packed_networks_bit_for_bit(service: Service, images: Tensor, expected: Tensor) -> None:
    with ThreadPoolExecutor(16) as clients:
        replies = list(clients.map(service.classify, images))
    check(replies, expected)
    assert service.errors == []
    assert len(processes(service, images)) == 2


def test_what_is_no_image_is_refused_before_it_is_read(service: Service) -> None:
    code, body = service.reply(b"abc")
    assert (code, body["error"]) == (400, "send 12288 bytes: one image [3, 32, 32] of float32")


def test_a_killed_replica_loses_no_request_that_is_sent_again(
    service: Service, images: Tensor, expected: Tensor
) -> None:
    before = processes(service, images)
    with ThreadPoolExecutor(8) as clients:
        replies = [clients.submit(service.classify, image) for image in images.repeat(4, 1, 1, 1)]
        replies[20].result()
        os.kill(min(before), signal.SIGKILL)
        found = [reply.result() for reply in replies]
    check(found, expected.repeat(4, 1))
    assert len(processes(service, images, gone=min(before)) - before) == 1
