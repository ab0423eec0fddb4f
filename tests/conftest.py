"""Tiny models and tokenizers that the tests build themselves; shapes are checked at run time."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # on models this small, threads cost more than they bring; before torch looks

import pytest
import torch
from jaxtyping import install_import_hook

install_import_hook(["ctlens.alignment", "ctlens.batch", "ctlens.losses", "ctlens.analysis"], "beartype.beartype")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits an ignored one

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from ctlens import cli  # noqa: E402
from ctlens.architectures import tiny_model as hf_model  # noqa: E402
from ctlens.models import build, load_model  # noqa: E402
from ctlens.types import LensModel  # noqa: E402
from ctlens.weights import ModelConfig  # noqa: E402

CHAT_MODELS = ("made here", "llama", "gpt2", "qwen3")
TEXTS = (
    "Which term best describes the disease?\n\nAnswer choices:\n(A) isolated cases\n(B) outbreak\n",
    "I may be in the minority here, but I don't think it's right. The best answer is: (",
    "When a creature experiences feeling, they are likely sensing a thing's texture.",
    "Please answer the question. You are a helpful assistant. Sure, here it is: no, that is wrong.",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_level_tokenizer(vocab_size: int = 400, chat: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few sentences."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", add_bos_token=True, name_or_path="tiny"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def chat_model(kind: str) -> LensModel:
    """A tiny random model with a chat tokenizer: one of `CHAT_MODELS`, by HuggingFace or made here."""
    tokenizer = byte_level_tokenizer(chat=True)
    if kind != "made here":
        return load_model(hf_model(kind), tokenizer=tokenizer)
    made = build(ModelConfig(d_vocab=400, n_layers=2, n_heads=4, d_model=32, d_mlp=48, n_ctx=256), tokenizer)
    draw = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw) * parameter.requires_grad
    return made


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


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Call = Callable[[str], Ended]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command in this process."""

    def run(line: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["ctlens", *line.split()])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Ended(int(end.value.code or 0), *capsys.readouterr())

    return run
