"""What Inspect finds where ctlens is installed: the provider `ctlens/...` of models, and a task per threat.

Inspect imports this file whenever it starts, so the provider's own file waits for a model that is asked for.
"""

from __future__ import annotations

from inspect_ai.model import ModelAPI, modelapi

from ctlens.interop import tasks as tasks

PROVIDER = "ctlens"


@modelapi(name=PROVIDER)
def ctlens() -> type[ModelAPI]:
    """The class of Inspect's models of ctlens."""
    from ctlens.interop.provider import CtlensAPI

    return CtlensAPI
