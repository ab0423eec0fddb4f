"""The consistency losses by name. Adding one is a file here and a line in `LOSSES`."""

from __future__ import annotations

from typing import Any

from ctlens.config import from_dict, to_dict
from ctlens.errors import unknown
from ctlens.losses.act import ACT
from ctlens.losses.attct import AttCT
from ctlens.losses.attmass import AttMass
from ctlens.losses.attout import AttOut
from ctlens.losses.base import Forwards, Loss, LossValue, require_distinct
from ctlens.losses.bct import BCT
from ctlens.losses.klct import KLCT
from ctlens.losses.mlpct import MLPCT

LOSSES: dict[str, type[Loss]] = {kind.name: kind for kind in (ACT, MLPCT, AttCT, BCT, KLCT, AttOut, AttMass)}
MEASURED = ("act", "mlpct", "attct", "bct", "klct")
"""What models are measured by unless told otherwise: losses that ask no more of a pair than that it aligns."""

__all__ = [
    "ACT",
    "BCT",
    "KLCT",
    "LOSSES",
    "MEASURED",
    "MLPCT",
    "AttCT",
    "AttMass",
    "AttOut",
    "Forwards",
    "Loss",
    "LossValue",
    "from_config",
    "get",
    "names",
    "require_distinct",
    "to_config",
]


def names() -> list[str]:
    """The names of all losses."""
    return list(LOSSES)


def get(name: str, **options: Any) -> Loss:
    """The loss of that name with the given options.

    >>> get("attct", layers="last_half", keys="rest").keys
    'rest'

    Raises:
        CtlensError: the name or an option is unknown.
    """
    if name not in LOSSES:
        raise unknown("loss", name, names())
    return from_dict(LOSSES[name], options)


def to_config(loss: Loss) -> dict[str, Any]:
    """The loss as JSON-ready values, its name among them."""
    return {"name": loss.name, **to_dict(loss)}


def from_config(config: dict[str, Any]) -> Loss:
    """The loss that `to_config` described."""
    return get(**config)
