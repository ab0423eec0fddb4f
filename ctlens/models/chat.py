"""A model's answer to one prompt, as text."""

from __future__ import annotations

from ctlens.core.errors import CtlensError
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.chat import render
from ctlens.data.inputs import OnePrompt
from ctlens.models.adopt import adopt
from ctlens.models.generation import end_tokens, generate


@public
def chat(model: LensModel, prompt: OnePrompt, *, max_new_tokens: int = 64) -> str:
    """Asks a model and gives its greedy answer.

    >>> import ctlens as ct
    >>> pair = ct.threats.get("sycophancy").pairs(1)[0]
    >>> ct.chat(ct.load_organism(), pair.clean).startswith(pair.clean.good)
    True

    Args:
        model: in eval mode, with a tokenizer.
        prompt: what the user says, a list of chat messages, a `Prompt`, or token ids, which are taken as they are.
        max_new_tokens: the answer is cut here, and where the model's context ends.

    Raises:
        CtlensError: the prompt fills the context, or the model has no tokenizer.
    """
    adopt(model)
    ids = render(model.tokenizer, prompt.turns).ids
    room = model.cfg.n_ctx - len(ids)
    if room < 1:
        raise CtlensError(f"the prompt has {len(ids)} tokens and the context {model.cfg.n_ctx}: shorten the prompt.")
    (answer,) = generate(model, [ids], max_new_tokens=min(max_new_tokens, room), ends=end_tokens(model))
    return model.tokenizer.decode(answer, skip_special_tokens=True).strip()
