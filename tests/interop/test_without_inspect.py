"""Without the extra, ctlens works, and what needs it says how to install it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

import ctlens as ct


@pytest.mark.parametrize(
    "use",
    [
        lambda: ct.inspect_model(ct.load_organism()),
        lambda: ct.inspect_task("sycophancy"),
        lambda: ct.inspect_evaluation("log.eval"),
    ],
)
def test_it_is_one_sentence(use: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = [name for name in sys.modules if name.partition(".")[0] == "inspect_ai"]
    for name in (*hidden, "inspect_ai"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("entry", "provider", "tasks"):
        monkeypatch.delitem(sys.modules, f"ctlens.interop.{name}", raising=False)

    with pytest.raises(ct.CtlensError, match=r"pip install 'ctlens\[inspect\]'"):
        use()
