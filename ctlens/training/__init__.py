"""The visible training loop, its settings, and the run it yields."""

from ctlens.training.config import Phase, TrainConfig, Until
from ctlens.training.history import History
from ctlens.training.live import Live
from ctlens.training.loggers import Logger, TensorBoard, WeightsAndBiases
from ctlens.training.run import Run, load_run
from ctlens.training.step import Step
from ctlens.training.trainer import Trainer, train

__all__ = [
    "History",
    "Live",
    "Logger",
    "Phase",
    "Run",
    "Step",
    "TensorBoard",
    "TrainConfig",
    "Trainer",
    "Until",
    "WeightsAndBiases",
    "load_run",
    "train",
]
