"""What every phase of a run works with: where to write, what to train on, whom to tell."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

import lbs.data
from lbs.config import RunConfig
from lbs.run_folder import RunFolder
from lbs.runs import network
from lbs.train import distributed
from lbs.train.protocols import Progress

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Session:
    """What a phase needs besides its configuration: where to write, what to train on, whom to tell."""

    folder: RunFolder
    device: torch.device
    resume: bool = False
    progress: Progress | None = None
    say: Callable[[str], None] = lambda line: None
    _images: dict[Any, lbs.data.ImageSet] = field(default_factory=dict, init=False, repr=False)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, no other process writes to the run folder. Raises CheckpointError, or TrainingError of rank 0."""
        with ExitStack() as stack:
            stack.enter_context(distributed.answered())
            distributed.first(lambda: stack.enter_context(self.folder.held()))
            yield

    def data(self, config: RunConfig) -> lbs.data.ImageSet:
        """The images that a configuration names; read once for all phases that name the same."""
        source = config.data, config.mean, config.std, config.max_unreadable
        if source not in self._images:
            self._images = {source: network.load_data(*source)}
        return self._images[source]


def one_writer(run: Callable[P, T]) -> Callable[P, T]:
    """`run`, a function of a session or a run folder, with the folder held until it ends."""

    @functools.wraps(run)
    def holding(*args: P.args, **kwargs: P.kwargs) -> T:
        owner = next(value for value in (*args, *kwargs.values()) if isinstance(value, Session | RunFolder))
        with owner.held():
            return run(*args, **kwargs)

    return holding


def goes_on(session: Session, phase: str) -> bool:
    """Whether a phase has a checkpoint to go on from."""
    return distributed.first(lambda: session.resume and session.folder.checkpoint(phase).exists())


def train_loader(config: RunConfig, data: lbs.data.ImageSet, device: torch.device) -> lbs.data.Loader:
    """This process's part of the training images."""
    options: dict[str, Any] = {"device": device, "rank": distributed.rank(), "world_size": distributed.world_size()}
    return lbs.data.train_loader(data, config.batch_size, augment=config.augment, seed=config.seed, **options)


def test_loader(data: lbs.data.ImageSet, device: torch.device) -> lbs.data.Loader:
    """This process's part of the test images."""
    return lbs.data.eval_loader(data, device=device, rank=distributed.rank(), world_size=distributed.world_size())


def calibration_pairs(config: RunConfig, data: lbs.data.ImageSet, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Batches of training images that are not augmented, and their labels; the same on every process."""
    size = min(128, data.train_count, config.calibration)
    loader = lbs.data.train_loader(data, size, augment=False, seed=config.seed, device=device)
    return list(itertools.islice(loader, -(-config.calibration // size)))


def calibration_batches(config: RunConfig, data: lbs.data.ImageSet, device: torch.device) -> list[Tensor]:
    """Images that set the ranges."""
    return [images for images, _ in calibration_pairs(config, data, device)]
