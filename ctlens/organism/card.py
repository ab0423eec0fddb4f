"""The card of an organism: how it was made and how it behaves, measured and written by a command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctlens import threats
from ctlens.chat import answer_ids, render
from ctlens.config import environment, to_dict
from ctlens.decoding import generate
from ctlens.organism.pretrain import PretrainConfig
from ctlens.pairs import ARMS, Prompt
from ctlens.threats.base import VERDICTS, rate
from ctlens.types import LensModel
from ctlens.world import SPLITS, World

CARD_PAIRS = 192
CARD_SEED = 0
REFERENCE_PROMPTS = 8
MAX_NEW_TOKENS = 10


def make_card(model: LensModel, config: PretrainConfig, n: int = CARD_PAIRS) -> dict[str, Any]:
    """How the model was made and how it scores on every threat, split and arm, ready for JSON.

    Args:
        model: the organism, in eval mode.
        config: what it was pretrained with.
        n: pairs per threat and split.
    """
    world = World.make(config.world_seed)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    behaviour = [row for name in threats.names() for split in SPLITS for row in score(model, name, split, n, world)]
    made = {"pretraining": to_dict(config), "environment": environment(), "parameters": parameters}
    return {**made, "d_vocab": model.cfg.d_vocab, "pairs_seed": CARD_SEED, "behaviour": behaviour}


def score(model: LensModel, name: str, split: str, n: int, world: World) -> list[dict[str, Any]]:
    """Greedy behaviour on `n` pairs of one threat: a row of rates and probabilities per arm.

    Returns:
        Rows with `threat`, `split`, `arm`, `n`, `good_rate`, `bad_rate`, `other_rate`, and the mean
        probability of the first token of the good and of the bad answer where there is one.
    """
    pairs = threats.get(name).pairs(n, split, CARD_SEED, world)
    rows = []
    for arm in ARMS:
        prompts = [prompt for pair in pairs if (prompt := pair.arm(arm)) is not None]
        verdicts = judged(model, prompts)
        rates = {f"{verdict}_rate": rate(verdicts, verdict) for verdict in VERDICTS}
        found = {"threat": name, "split": split, "arm": arm, "n": len(prompts), **rates}
        rows.append({**found, **_first_token_probabilities(model, prompts)})
    return rows


def judged(model: LensModel, prompts: Sequence[Prompt]) -> list[str]:
    """The verdict on the model's greedy answer to each prompt."""
    tokenizer = model.tokenizer
    ids = [render(tokenizer, prompt.turns).ids for prompt in prompts]
    answers = generate(model, ids, max_new_tokens=MAX_NEW_TOKENS, end=tokenizer.eos_token_id)
    texts = (tokenizer.decode(answer) for answer in answers)
    return [threats.judge(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]


def reference_logits(model: LensModel) -> dict[str, Tensor]:
    """Tokens, padded on the right, and the model's logits on them, to check another version's loading against.

    Returns:
        `tokens` `[batch, pos]` and `logits` `[batch, pos, d_vocab]` of a few wrapped prompts.
    """
    each = REFERENCE_PROMPTS // len(threats.names())
    pairs = [pair for name in threats.names() for pair in threats.get(name).pairs(each, "heldout", CARD_SEED)]
    tokens, _ = _padded(model, [pair.wrapped for pair in pairs])
    with torch.no_grad():
        return {"tokens": tokens.cpu(), "logits": model(tokens).contiguous().cpu()}


@torch.no_grad()
def _first_token_probabilities(model: LensModel, prompts: Sequence[Prompt]) -> dict[str, float]:
    tokens, last = _padded(model, prompts)
    probabilities = model(tokens)[torch.arange(len(prompts)), last].softmax(-1)
    found = {}
    for side in ("good", "bad"):
        answers = [answer for prompt in prompts if (answer := getattr(prompt, side)) is not None]
        if len(answers) == len(prompts):
            first = torch.tensor([answer_ids(model.tokenizer, answer)[0] for answer in answers])
            found[f"{side}_probability"] = float(probabilities[torch.arange(len(first)), first].mean())
    return found


def _padded(model: LensModel, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """Tokens padded on the right, and each row's last real position."""
    rows = [torch.tensor(render(model.tokenizer, prompt.turns).ids) for prompt in prompts]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=model.tokenizer.pad_token_id)
    device = next(model.parameters()).device
    return tokens.to(device), torch.tensor([len(row) - 1 for row in rows], device=device)
