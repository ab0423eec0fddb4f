"""The visible training loop, its settings, and the run it yields.

A name imported as itself (`from ... import X as X`) is public to type checkers; no other list of them is kept.
"""

from ctlens.training.config import Phase as Phase
from ctlens.training.config import TrainConfig as TrainConfig
from ctlens.training.config import Until as Until
from ctlens.training.edits import TrainingEdits as TrainingEdits
from ctlens.training.history import History as History
from ctlens.training.live import Live as Live
from ctlens.training.loggers import Logger as Logger
from ctlens.training.loggers import TensorBoard as TensorBoard
from ctlens.training.loggers import WeightsAndBiases as WeightsAndBiases
from ctlens.training.run import Run as Run
from ctlens.training.run import load_run as load_run
from ctlens.training.step import Step as Step
from ctlens.training.trainer import Trainer as Trainer
from ctlens.training.trainer import train as train
