"""Where a loader is: epochs of batches that go on after a stop, in the middle of an epoch if need be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lbs_kernels.errors import DataError, TrainingError


class Position:
    """Counts batches for a loader whose epoch depends on (seed, epoch) only, not on what ran before.

    `state_dict` tells the position after the batch that was yielded last; after `load_state_dict` the next loop goes on
    there. A loop left early by `break` without a state starts its epoch again.
    """

    epoch = 0
    _next_batch = 0
    _resume = False
    batch_size: int
    drop_last: bool
    rank: int
    world_size: int

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(self.count(), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def count(self) -> int:
        """Images in an epoch."""
        raise NotImplementedError

    def identity(self) -> dict[str, Any]:
        """What a position is only valid for."""
        raise NotImplementedError

    def positions(self) -> Iterator[int]:
        """Numbers of the batches still to come in this epoch; the position moves on as they are taken."""
        first = self._next_batch if self._resume else 0
        self._resume = False
        epoch, batches = self.epoch, len(self)
        for index in range(first, batches):
            last = index + 1 == batches
            self.epoch, self._next_batch = (epoch + 1, 0) if last else (epoch, index + 1)
            yield index

    def rows(self, index: int) -> slice:
        """This process's part of batch `index`, as a slice of the epoch's order."""
        end = min((index + 1) * self.batch_size, self.count())
        return slice(index * self.batch_size + self.rank, end, self.world_size)

    def state_dict(self) -> dict[str, Any]:
        """The position after the batch yielded last, and what it is only valid for."""
        return {"epoch": self.epoch, "batch": self._next_batch, **self.identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on at a saved position.

        Raises TrainingError where it was saved by a loader of other settings (all that differ are named), or lies
        outside an epoch.
        """
        odd = [
            f"{key} = {state.get(key)!r}, this one {value!r}"
            for key, value in self.identity().items()
            if state.get(key) != value
        ]
        if odd:
            raise TrainingError(
                f"the saved loader had {'; '.join(odd)}; its batches would differ, so go on with the data and the "
                "settings of the saved run, or start in a new run folder"
            )
        epoch, batch = state.get("epoch"), state.get("batch")
        if not isinstance(epoch, int) or not isinstance(batch, int) or epoch < 0 or not 0 <= batch < len(self):
            raise TrainingError(
                f"the saved loader position is epoch {epoch!r}, batch {batch!r}; the epoch must be 0 or more and the "
                f"batch below {len(self)}"
            )
        self.epoch, self._next_batch, self._resume = epoch, batch, True


def check_parts(images: int, batch_size: int, drop_last: bool, shuffle: bool, rank: int, world_size: int) -> None:
    """Refuse batches that cannot be made. Raises DataError."""
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}; it must be at least 1")
    if drop_last and batch_size > images:
        raise DataError(f"batch_size {batch_size} with drop_last leaves no batch of {images} images")
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} of {world_size} processes; it must lie in 0..{world_size - 1}")
    if shuffle and world_size > 1 and (batch_size % world_size or not drop_last):
        raise DataError(
            f"batch_size {batch_size} for {world_size} processes (drop_last={drop_last}); training needs equal parts: "
            "a multiple of the number of processes, with drop_last"
        )
