"""The error family under its public name."""

from lbs_kernels.errors import (
    BackendError,
    CheckpointError,
    DataError,
    FormatError,
    GraphError,
    LbsError,
    PlanError,
    ShapeError,
    TrainingError,
)

__all__ = [
    "BackendError",
    "CheckpointError",
    "DataError",
    "FormatError",
    "GraphError",
    "LbsError",
    "PlanError",
    "ShapeError",
    "TrainingError",
]
