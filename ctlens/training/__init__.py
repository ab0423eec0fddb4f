"""The visible training loop, its settings, and the run it yields."""

from ctlens.training.config import TrainConfig
from ctlens.training.run import History, Run, load_run
from ctlens.training.trainer import Step, Trainer, train

__all__ = ["History", "Run", "Step", "TrainConfig", "Trainer", "load_run", "train"]
