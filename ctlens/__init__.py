"""ctlens: a mechanistic-interpretability workbench for consistency training.

Names are imported when they are first used, so that `ctlens --help` need not load PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ctlens import analysis, losses, organism, threats
    from ctlens.adapters import LoRA
    from ctlens.doses import DoseResult, dose_response
    from ctlens.errors import CtlensError
    from ctlens.evaluation import Evaluation, evaluate
    from ctlens.formats import load_facts, load_pairs, load_prefills, load_prompts
    from ctlens.huggingface import export_huggingface, parity
    from ctlens.leaks import Leak, leak
    from ctlens.losses import ACT, BCT, F2C, KLCT, MLPCT, RMCT, AttCT, AttMass, AttOut
    from ctlens.models import build, load_model
    from ctlens.organism import load_organism
    from ctlens.pairs import Pair, Prompt, save_pairs
    from ctlens.parameters import freeze
    from ctlens.plan import StudyConfig
    from ctlens.study import StudyResult, compare
    from ctlens.training import Live, Phase, Run, TrainConfig, Trainer, Until, load_run, train
    from ctlens.weights import ModelConfig

__version__ = "0.1.0"

HOMES = {
    "adapters": ("LoRA",),
    "doses": ("DoseResult", "dose_response"),
    "errors": ("CtlensError",),
    "evaluation": ("Evaluation", "evaluate"),
    "leaks": ("Leak", "leak"),
    "losses": ("ACT", "BCT", "F2C", "KLCT", "MLPCT", "RMCT", "AttCT", "AttMass", "AttOut"),
    "huggingface": ("export_huggingface", "parity"),
    "models": ("build", "load_model"),
    "parameters": ("freeze",),
    "organism": ("load_organism",),
    "plan": ("StudyConfig",),
    "formats": ("load_facts", "load_pairs", "load_prefills", "load_prompts"),
    "pairs": ("Pair", "Prompt", "save_pairs"),
    "study": ("StudyResult", "compare"),
    "training": ("Live", "Phase", "Run", "TrainConfig", "Trainer", "Until", "load_run", "train"),
    "weights": ("ModelConfig",),
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
