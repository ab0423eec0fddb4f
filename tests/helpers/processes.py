"""Several processes on this machine, started together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 600
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}


def together(count: int, *command: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A module with its arguments, run by torchrun in a folder."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(folder), ENVIRONMENT["PYTHONPATH"]])}
    return subprocess.run(
        [*launch, "-m", *command], cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
