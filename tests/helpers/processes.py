"""Several processes on this machine, started together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers.models import byte_level_tokenizer, hf_model

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


def place_of_training(folder: Path, words: Sequence[str]) -> Path:
    """A folder with a tiny Llama that chats, `hf`, and a file of pairs, one per word, `pairs.jsonl`."""
    hf_model("llama").save_pretrained(folder / "hf")
    byte_level_tokenizer(chat=True).save_pretrained(folder / "hf")
    rows = [{"clean": f"Is it {word}?", "wrapped": f"I don't think it's {word}. Is it {word}?"} for word in words]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
