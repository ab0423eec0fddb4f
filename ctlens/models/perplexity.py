"""Perplexity: how well a model predicts a text, per token and, so that tokenizers compare, per byte."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, fsum
from pathlib import Path

from ctlens.core.errors import CtlensError
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.core.reading import text_lines
from ctlens.core.shown import Shown
from ctlens.core.types import LensModel
from ctlens.data.spelling import require_known, spell
from ctlens.models.adopt import adopt
from ctlens.models.kv_cache import MAX_BATCH_TOKENS, Ids
from ctlens.models.scoring import continuation_logprobs


@dataclass(frozen=True)
class Perplexity(Shown):
    """How well a model predicts a text.

    Attributes:
        nats: the negative log-probability of all predicted tokens.
        n_tokens: how many there are.
        n_bytes: of the text that they stand for, in UTF-8.
        max_length: tokens that the model saw at once, at most.
        stride: tokens that each window but the first predicts.
    """

    nats: float
    n_tokens: int
    n_bytes: int
    max_length: int
    stride: int

    @property
    def nats_per_token(self) -> float:
        """The mean negative log-probability; it compares models of one tokenizer."""
        return self.nats / self.n_tokens

    @property
    def nats_per_byte(self) -> float:
        """The same per byte of text, which compares models of different tokenizers."""
        return self.nats / self.n_bytes

    @property
    def perplexity(self) -> float:
        """The exponential of `nats_per_token`."""
        return exp(self.nats_per_token)

    def described(self) -> dict[str, str]:
        """Says how well the text is predicted."""
        per = {"perplexity": self.perplexity, "nats per token": self.nats_per_token, "per byte": self.nats_per_byte}
        return {**{name: f"{value:.4g}" for name, value in per.items()}, "tokens": str(self.n_tokens)}


@public
def perplexity(
    model: LensModel,
    text: str | Path,
    *,
    max_length: int | None = None,
    stride: int | None = None,
    progress: bool = True,
) -> Perplexity:
    """Measures how well a model predicts a text, without a chat template.

    The text is tokenised once, and read in windows. The first window predicts all its tokens; every further one goes on
    by `stride` tokens and predicts these alone, so that each token is predicted once, and behind the first window with
    at least `max_length - stride` tokens before it. Where the tokenizer has a BOS, every window begins with it, as
    models that were trained behind one attend to it, and it is not predicted; where it has none, nothing predicts the
    first token of the text, which does not count.

    Args:
        model: in eval mode, with a tokenizer.
        text: the text itself, or the path of a UTF-8 file that holds it, as a `Path`.
        max_length: tokens of a window, which the model sees at once; by default its context.
        stride: from 1 to below `max_length`; by default half of it.
        progress: show a progress bar when it takes more than two seconds.

    Raises:
        CtlensError: the text has nothing to predict or words that the tokenizer does not know, `max_length` does not
            fit the context, or the stride the window.
    """
    adopt(model)
    if model.tokenizer is None:
        raise CtlensError("the model has no tokenizer: load it from a folder that holds one, or pass tokenizer=.")
    written = text if isinstance(text, str) else "".join(line for _, line in text_lines(text))
    n_ctx = int(model.cfg.n_ctx)
    seen = n_ctx if max_length is None else max_length
    if not 2 <= seen <= n_ctx:
        raise CtlensError(f"max_length is {seen}: name 2 to {n_ctx} tokens, the model's context.")
    step = max(seen // 2, 1) if stride is None else stride
    if not 1 <= step < seen:
        raise CtlensError(f"stride is {step}: name 1 to {seen - 1} tokens, below the window.")
    ids, n_bytes = _tokens(model, written)
    windows = list(_windows(ids, seen, step, bos=model.tokenizer.bos_token_id))
    together = max(MAX_BATCH_TOKENS // seen, 1)
    batches = [windows[start : start + together] for start in range(0, len(windows), together)]
    scores: list[float] = []
    for batch in progress_bar(batches, desc="text", delay=2, leave=False, shown=progress):
        found = continuation_logprobs(model, [before for before, _ in batch], [[new] for _, new in batch])
        scores += [score for (given,) in found for score in given]
    return Perplexity(-fsum(scores), len(scores), n_bytes, seen, step)


def _tokens(model: LensModel, text: str) -> tuple[Ids, int]:
    """The tokens of a text behind what predicts the first of them, and the bytes of all that are predicted."""
    ids, spans = spell(model.tokenizer, text)
    require_known(model.tokenizer, text, (ids, spans), [(0, len(text))])
    bos = model.tokenizer.bos_token_id
    if bos is not None and ids[:1] != (bos,):
        ids = (bos, *ids)
        predicted = text
    else:
        predicted = text[spans[0][1] :] if spans else ""
    if len(ids) < 2 or not predicted:
        raise CtlensError("the text has no token to predict: give a longer one.")
    return ids, len(predicted.encode())


def _windows(ids: Ids, length: int, stride: int, *, bos: int | None) -> Iterator[tuple[Ids, Ids]]:
    """Yields the tokens of each window that are given, and those behind them that it predicts."""
    yield ids[:1], ids[1:length]
    for start in range(length, len(ids), stride):
        end = min(start + stride, len(ids))
        first = end - length
        yield ids[first:start] if bos is None else (bos, *ids[first + 1 : start]), ids[start:end]
