"""The consistency losses by name. A new loss is a file in this folder and an entry in `LOSSES`, or is registered.

A name imported as itself (`from ... import X as X`) is public to type checkers; no other list of them is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from ctlens.core.config import from_dict, to_dict
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.public import public
from ctlens.losses.act import ACT as ACT
from ctlens.losses.attct import AttCT as AttCT
from ctlens.losses.attmass import AttMass as AttMass
from ctlens.losses.attout import AttOut as AttOut
from ctlens.losses.base import Forwards as Forwards
from ctlens.losses.base import Loss as Loss
from ctlens.losses.base import LossValue as LossValue
from ctlens.losses.base import require_distinct as require_distinct
from ctlens.losses.bct import BCT as BCT
from ctlens.losses.dpo import DPO as DPO
from ctlens.losses.f2c import F2C as F2C
from ctlens.losses.klct import KLCT as KLCT
from ctlens.losses.mlpct import MLPCT as MLPCT
from ctlens.losses.opct import OPCT as OPCT
from ctlens.losses.presets import OURS, PUBLISHED, described
from ctlens.losses.rmct import RMCT as RMCT
from ctlens.losses.subact import SubACT as SubACT

_KINDS = (ACT, MLPCT, AttCT, BCT, RMCT, OPCT, F2C, KLCT, AttOut, AttMass, SubACT, DPO)
LOSSES: dict[str, type[Loss]] = {kind.name: kind for kind in _KINDS}
MEASURED = ("act", "mlpct", "attct", "bct", "klct")
"""The losses that analyses measure by default: all that they need of a pair is that it aligns."""


def names() -> list[str]:
    """Lists the names of all losses."""
    return list(LOSSES)


@public
def get(name: str, **options: Any) -> Loss:
    """Builds the loss of that name with the given options.

    >>> get("attct", layers="last_half", keys="rest").keys
    'rest'

    Raises:
        CtlensError: the name or an option is unknown.
    """
    if name not in LOSSES:
        raise unknown("loss", name, names())
    return from_dict(LOSSES[name], options)


def built(losses: Loss | str | Sequence[Loss | str]) -> tuple[Loss, ...]:
    """Builds the losses that are given by name, and takes the others as they are.

    >>> [loss.name for loss in built(["act", get("bct")])], [loss.name for loss in built("attct")]
    (['act', 'bct'], ['attct'])

    Raises:
        CtlensError: a name is unknown.
    """
    given = (losses,) if isinstance(losses, Loss | str) else losses
    return tuple(get(loss) if isinstance(loss, str) else loss for loss in given)


def register(kind: type[Loss]) -> type[Loss]:
    """Adds a class of losses to `LOSSES`, so that runs with it can be saved and loaded; also a decorator.

    A run is loaded only where the class has been registered, so a script that loads it imports the class first.

    Raises:
        CtlensError: the class has no name, or another class has it.
    """
    name = getattr(kind, "name", "")
    if not name:
        raise CtlensError(f'{kind.__name__} has no name: give the class one, `name: ClassVar[str] = "mine"`.')
    known = LOSSES.setdefault(name, kind)
    if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise CtlensError(
            f"a loss {name!r} is there already ({known.__qualname__}): give {kind.__name__} another name."
        )
    LOSSES[name] = kind  # the same class again, such as from a notebook's cell that was run twice
    return kind


def to_config(loss: Loss) -> dict[str, Any]:
    """Writes the loss as JSON-ready values, its name among them.

    Raises:
        CtlensError: the loss is not registered, so that nobody could read it back.
    """
    if LOSSES.get(loss.name) is not type(loss):
        mine = type(loss).__name__
        raise CtlensError(
            f"the loss {loss.name!r} is not registered, so a run with it could not be loaded: call "
            f"ctlens.losses.register({mine}) first."
        )
    return {"name": loss.name, **to_dict(loss)}


def from_config(config: Any) -> Loss:
    """Builds the loss that `to_config` described; what is read from a file may be anything.

    Raises:
        CtlensError: it is no such description, no loss of this name is registered, or an option is unknown.
    """
    match config:
        case {"name": str(name), **options}:
            if name in LOSSES:
                return get(name, **options)
            raise CtlensError(
                f"the loss {name!r} is not registered here: if it is one of your own, import its class and call "
                f"ctlens.losses.register on it first. Known: {', '.join(names())}."
            )
    raise CtlensError(f"{config!r} does not describe a loss: an object with its name and options is expected.")


@public
def preset(method: str, source: str) -> Loss:
    """Builds the loss that a source defines under a method's name, see `ctlens.losses.presets`.

    >>> preset("attct", "stack-jailbreak").distance
    'mse'

    Args:
        method: the name that the source gives the method; the loss can be of another class, and then has its name.
        source: `"ctlens"` for the defaults, or a source that `table` lists for the method.

    Raises:
        CtlensError: the method is unknown, or it has no such source.
    """
    known = _presets()
    sources = [theirs for named, theirs in known if named == method]
    if not sources:
        raise unknown("method", method, dict.fromkeys(named for named, _ in known))
    if source not in sources:
        raise unknown(f"source of {method}", source, sources)
    return known[method, source][0]


def table() -> pd.DataFrame:
    """Tabulates every definition of every method, one row each; the defaults of ctlens come first.

    Columns: method, source, loss (the class's name), hook point, window, layers, distance, options
    (further options of this loss), layer weights, clean side, tokens (those trained on), weight,
    and note: the parts of the source's definition that lie outside the loss or could not be established.
    """
    rows = [
        {"method": method, "source": source, **described(loss), "note": note}
        for (method, source), (loss, note) in _presets().items()
    ]
    return pd.DataFrame(rows)


def _presets() -> dict[tuple[str, str], tuple[Loss, str]]:
    """Maps method and source to the loss and its note; the sources of a method stand together."""
    ours = {(name, OURS): (kind(), "") for name, kind in LOSSES.items()}
    found = ours | {key: (published.loss, published.note) for key, published in PUBLISHED.items()}
    methods = list(dict.fromkeys(method for method, _ in found))
    return dict(sorted(found.items(), key=lambda entry: methods.index(entry[0][0])))
