"""Parity: does a lens model compute what HuggingFace's model computes? Both answer a few short random prompts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from ctlens.core.config import generator
from ctlens.core.errors import CtlensError, NotFinite
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.batch import PaddingSide, pad
from ctlens.models.bridges import huggingface_config
from ctlens.models.finite import advice, is_finite

# The names under which configurations keep how far a token sees, which HuggingFace reads at every forward pass.
_WINDOWS = ("sliding_window", "attention_chunk_size")
_NARROW = 4  # tokens: shorter than the long prompts, so that a window is seen to be kept

PromptIds: TypeAlias = Sequence[Int[Tensor, " pos"]]
Answers: TypeAlias = Sequence[Float[Tensor, "pos d_vocab"]]
"""The logits of each prompt."""


@dataclass(frozen=True)
class Difference:
    """Difference says how far the logits of two models are apart.

    Attributes:
        largest: the largest absolute difference of a logit; NaN where a logit is.
        spread: the farthest that an expected logit is from the mean of its position.
        allowed: what rounding explains.
    """

    largest: float
    spread: float
    allowed: float

    @property
    def is_rounding(self) -> bool:
        """Whether the two compute the same."""
        return self.largest <= self.allowed


@public
def parity(model: LensModel, hf: PreTrainedModel, *, length: int = 12, seed: int = 0) -> float:
    """Measures the largest absolute difference of logits between a model and a HuggingFace model.

    HuggingFace's model answers each prompt by itself, without padding; `model` answers them in a batch, padded on the
    left and on the right. The prompts are longer than the windows, which are narrowed for the comparison.

    Args:
        model: from `load_model`.
        hf: the HuggingFace model, not wrapped by a bridge.
        length: tokens of the longest of the random prompts.
        seed: of the random tokens.
    """
    return apart_from(model, hf, length=length, seed=seed).largest


def apart_from(model: LensModel, hf: PreTrainedModel, *, length: int = 12, seed: int = 0) -> Difference:
    """Compares a model with a HuggingFace model as `parity` does, and says what of their difference is rounding."""
    prompts = probe_prompts(hf.config, length, seed)
    with narrowed(hf.config, huggingface_config(model)):
        return compared(lens_answers(model, prompts), original_answers(hf, prompts))


def probe_prompts(config: Any, length: int = 12, seed: int = 0) -> PromptIds:
    """Draws three prompts for a model: two long ones, which begin alike, and a short one.

    Args:
        config: HuggingFace's, or TransformerLens's.
        length: tokens of the long prompts, if the context has room for them.
        seed: of the tokens.
    """
    sizes = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(sizes, "vocab_size", None) or sizes.d_vocab
    context = getattr(sizes, "max_position_embeddings", None) or getattr(sizes, "n_ctx", None) or length
    draw = torch.randint(vocabulary, (2, min(length, context)), generator=generator(seed, "parity"))
    first, other = draw
    begin = _begin(first)
    return first, torch.cat([first[:begin], other[begin:]]), other[:begin]


def _begin(long: Tensor) -> int:
    """How many tokens of the two long prompts are the same, and how many the short one has."""
    return max(1, len(long) // 3)


@contextmanager
def narrowed(*configs: Any) -> Iterator[None]:
    """Narrows the windows of these configurations inside the block, so that short prompts are longer than they are."""
    every = {id(each): each for config in configs if config is not None for each in (config, config.get_text_config())}
    wide = [
        (each, name, value)
        for each in every.values()
        for name in _WINDOWS
        if type(value := getattr(each, name, None)) is int and value > _NARROW
    ]
    try:
        for config, name, _ in wide:
            setattr(config, name, _NARROW)
        yield
    finally:
        for config, name, value in wide:
            setattr(config, name, value)


@torch.no_grad()
def original_answers(hf: PreTrainedModel, prompts: PromptIds) -> Answers:
    """The logits of a HuggingFace model, each prompt without padding."""
    model = cast(Any, hf)
    *long, short = prompts
    logits = model(torch.stack(long).to(hf.device), use_cache=False).logits
    return *logits, model(short[None].to(hf.device), use_cache=False).logits[0]


@torch.no_grad()
def lens_answers(model: LensModel, prompts: PromptIds) -> Answers:
    """The logits of a lens model, for each side of the padding and each prompt in turn."""
    first = next(model.parameters())
    # In float64 HuggingFace itself answers NaN behind padding: its masks overflow the softmax, which is of float32.
    paddings: tuple[PaddingSide, ...] = ("right",) if first.dtype == torch.float64 else ("right", "left")
    answers = []
    for padding in paddings:
        side = pad([prompt.tolist() for prompt in prompts], padding).to(first.device)
        # As `hooks.run` does: no cache, and no mask on the right, where padding is invisible to causal attention.
        options: dict[str, Any] = {} if huggingface_config(model) is None else {"use_cache": False}
        if side.needed_mask is not None:
            options["attention_mask"] = side.needed_mask.long()
        answers += [row[real] for row, real in zip(model(side.tokens, **options), side.mask, strict=True)]
    return answers


def compared(found: Answers, expected: Answers) -> Difference:
    """Compares answers; the expected ones are repeated where they are given once for both sides of the padding."""
    dtypes = {torch.float32, *(answer.dtype for answer in (*found, *expected))}
    # Two ways to compute one model round at every layer; the root, chosen by eye, is a hundred times what was measured.
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    repeated = [*expected] * (len(found) // len(expected))
    pairs = [(ours.double().cpu(), theirs.double().cpu()) for ours, theirs in zip(found, repeated, strict=True)]
    # Minus infinity masks a token: it is no difference where both have it, and no part of the spread.
    apart = [torch.where(ours == theirs, 0.0, ours - theirs).abs().max() for ours, theirs in pairs]
    finite = [theirs.masked_fill(theirs.isinf(), torch.nan) for _, theirs in pairs]
    spread = max(float((logits - logits.nanmean(-1, keepdim=True)).nan_to_num().abs().max()) for logits in finite)
    return Difference(float(torch.stack(apart).max()), spread, rounding * spread)


def require_finite_answers(hf: PreTrainedModel, answers: Answers) -> None:
    """Refuses a model with logits of NaN, or without a largest one.

    Raises:
        NotFinite: there are such logits; the first weight that is not finite is named.
    """
    if not all(map(is_finite, answers)):
        raise NotFinite(f"{type(hf).__name__} computes nan or infinity: {advice(hf)}.")


def require_causal(hf: PreTrainedModel, answers: Answers) -> None:
    """Refuses encoders: every loss and analysis relies on each token seeing only the tokens before it.

    Args:
        hf: the model.
        answers: its own, from `original_answers`.

    Raises:
        CtlensError: a token sees the ones after it.
    """
    begin = _begin(answers[0])
    if not compared([answers[0][:begin]], [answers[1][:begin]]).is_rounding:
        raise not_causal(hf)


def not_causal(hf: PreTrainedModel) -> CtlensError:
    """The error for a model that is no decoder."""
    return CtlensError(
        f"{type(hf).__name__} is no causal language model: its tokens see the tokens after them; load a decoder."
    )


def require_parity(kind: str, found: Answers, expected: Answers) -> None:
    """Refuses a lens model that computes something else.

    Args:
        kind: the class of the HuggingFace model.
        found: its answers as a lens model, from `lens_answers`.
        expected: its own, from `original_answers`.

    Raises:
        CtlensError: the logits differ by more than rounding.
    """
    apart = compared(found, expected)
    if not apart.is_rounding:
        raise CtlensError(
            f"TransformerLens does not compute what HuggingFace computes for {kind}: logits that spread over "
            f"{apart.spread:.2g} differ by {apart.largest:.2g}, where rounding allows {apart.allowed:.1g}; take "
            "another model or another TransformerLens, or load it with check=False to look at it as it is."
        )
