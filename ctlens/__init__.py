"""ctlens: a mechanistic-interpretability workbench for consistency training.

Names are imported when they are first used, so that `ctlens --help` need not load PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctlens import analysis, losses, organism, threats
    from ctlens.core.errors import CtlensError
    from ctlens.data.formats import load_facts, load_pairs, load_prefills, load_prompts
    from ctlens.data.pairs import Pair, Prompt, save_pairs
    from ctlens.evaluation import Evaluation, evaluate
    from ctlens.losses import ACT, BCT, F2C, KLCT, MLPCT, RMCT, AttCT, AttMass, AttOut
    from ctlens.models.export import export_huggingface, parity
    from ctlens.models.loading import build, load_model
    from ctlens.models.lora import LoRA
    from ctlens.models.parameters import freeze
    from ctlens.models.weights import ModelConfig
    from ctlens.organism import load_organism
    from ctlens.study.config import StudyConfig
    from ctlens.study.dose_response import DoseResult, dose_response
    from ctlens.study.inoculation import Leak, leak
    from ctlens.study.runner import StudyResult, compare
    from ctlens.training import Live, Phase, Run, TrainConfig, Trainer, Until, load_run, train

__version__ = "0.2.0.dev0"

HOMES = {
    "models.lora": ("LoRA",),
    "study.dose_response": ("DoseResult", "dose_response"),
    "core.errors": ("CtlensError",),
    "evaluation": ("Evaluation", "evaluate"),
    "study.inoculation": ("Leak", "leak"),
    "losses": ("ACT", "BCT", "F2C", "KLCT", "MLPCT", "RMCT", "AttCT", "AttMass", "AttOut"),
    "models.export": ("export_huggingface", "parity"),
    "models.loading": ("build", "load_model"),
    "models.parameters": ("freeze",),
    "organism": ("load_organism",),
    "study.config": ("StudyConfig",),
    "data.formats": ("load_facts", "load_pairs", "load_prefills", "load_prompts"),
    "data.pairs": ("Pair", "Prompt", "save_pairs"),
    "study.runner": ("StudyResult", "compare"),
    "training": ("Live", "Phase", "Run", "TrainConfig", "Trainer", "Until", "load_run", "train"),
    "models.weights": ("ModelConfig",),
}
PACKAGES = ("analysis", "losses", "organism", "threats")

__all__ = [
    "ACT", "BCT", "F2C", "KLCT", "MLPCT", "RMCT", "AttCT", "AttMass", "AttOut", "CtlensError", "DoseResult",
    "Evaluation", "Leak", "Live", "LoRA", "ModelConfig", "Pair", "Phase", "Prompt", "Run", "StudyConfig", "StudyResult",
    "TrainConfig", "Trainer", "Until", "analysis", "build", "compare", "dose_response", "evaluate",
    "export_huggingface", "freeze", "leak", "load_facts", "load_model", "load_organism", "load_pairs", "load_prefills",
    "load_prompts", "load_run", "losses", "organism", "parity", "save_pairs", "threats", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in PACKAGES:
        return importlib.import_module(f"ctlens.{name}")
    for module, names in HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"ctlens.{module}"), name)
    raise AttributeError(f"module 'ctlens' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
