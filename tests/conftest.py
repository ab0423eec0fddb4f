"""Tiny models and tokenizers that the tests build themselves; `CTLENS_TYPECHECK=1` has shapes checked at run time."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # on models this small, threads cost more than they bring; before torch looks
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that no folder has may be one on the hub, which no test asks

import pytest
from jaxtyping import install_import_hook

if os.environ.get("CTLENS_TYPECHECK") == "1":
    install_import_hook(
        ["ctlens.data.alignment", "ctlens.data.batch", "ctlens.losses", "ctlens.analysis"], "beartype.beartype"
    )
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits an ignored one

from helpers.models import Call, Ended, byte_level_tokenizer, hf_model  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from ctlens import cli  # noqa: E402


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Without a chat template."""
    return byte_level_tokenizer()


@pytest.fixture(scope="session")
def chat_tokenizer() -> PreTrainedTokenizerFast:
    """With a chat template."""
    return byte_level_tokenizer(chat=True)


@pytest.fixture
def hf_folder(tmp_path: Path) -> Path:
    """A HuggingFace folder with a tiny Llama and its tokenizer."""
    folder = tmp_path / "hf"
    hf_model("llama").save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


# Files whose tests train for minutes in all, or look at trainings, or at a site, that one fixture of theirs makes. Run
# first, they are all in the first worker's share, and the others, who take over from the end of it, never make the same
# again.
LONG = ("tests/study/", "tests/training/test_processes.py", "tests/test_docs.py", "tests/test_site.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the order is otherwise that of the folders."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command in this process."""

    def run(line: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["ctlens", *line.split()])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Ended(int(end.value.code or 0), *capsys.readouterr())

    return run
