"""The difference between models on text that has nothing to do with what they were trained on.

A training may leave a trace everywhere: the states of any text move by about the same vector, from which a reader can
tell what the training was about. So models are read on ordinary text, where no wrapper is:

- `kl`: the mean over tokens of KL(base || trained) of the next token, in nats per token;
- `shift`: the length of the mean shift of a text's states, over the mean length of the base's, at each layer;
- the *lens*: what the model's own read-out makes of the mean shift over all texts, as if it were a state.

Any training shifts something, and two of one topic shift alike whatever they teach. So each number stands beside that
of a *twin*, trained alike but for the method: the retention-only control. `less_twin` is what a training has beyond it,
text by text, and the lens reads the mean shift less the twin's too. Retention is 0 before the first step and may stay
so: a twin that hardly moved is `weak_twin`, and takes nothing off. Then a *sham*, moved along a fine-tuning on other
data, is the twin to give.

A text's first token is left out: it sees only itself, and models rest idle attention on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ctlens import plots
from ctlens.analysis.base.forward import comparable_by_label
from ctlens.analysis.base.nulls import WEAK_NULL, hardly_moved
from ctlens.analysis.base.result import ResultOverPairs
from ctlens.analysis.directions.directions import Directions
from ctlens.analysis.hook_points.activations import PromptLike, prompt_ids
from ctlens.core.clusters import clustered_mean
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.labels import BASE
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.core.types import Activations, LensModel, PerRow
from ctlens.data.batch import Side, pad, require_room
from ctlens.losses.distances import kl_divergence
from ctlens.models.hooks import resolve, run_capturing
from ctlens.models.readout import read_out
from ctlens.plots import Curve, Figure

OWN = "shift"
LESS_TWIN = "less_twin"
LENS_OF = (OWN, LESS_TWIN)
"""Which vector the lens reads: a model's mean shift, or that less the twin's."""
_SITE = "resid_post"


@dataclass(frozen=True)
class TextDiff(ResultOverPairs):
    """The result of `text_diff`: how far each model is from the base on each text.

    Attributes:
        kl: `[model, text]`, in nats per token.
        shift: `[model, layer, text]`, the length of the text's mean shift over the mean length of the base's states.
        mean_shift: `[model, layer, d]`, over all texts.
        scores: `[lens_of, model, layer, rank]`, of the tokens that the lens raises most, in standard deviations over
            the vocabulary; see `LENS_OF`. NaN where there is no shift to read.
        words: the texts of these tokens, in the order of `scores`.
        models: their labels.
        twin: the label of the twin.
    """

    kl: Float[np.ndarray, "model text"]
    shift: Float[np.ndarray, "model layer text"]
    mean_shift: Float[np.ndarray, "model layer d"]
    scores: Float[np.ndarray, "lens_of model layer rank"]
    words: tuple[str, ...]
    models: tuple[str, ...]
    twin: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model and quantity, `kl` of the output and `shift` of each layer.

        Returns:
            The mean `value` over `n_texts` with `ci_low` and `ci_high`, and what is beyond the twin, text by text:
            `less_twin` with `less_twin_low` and `less_twin_high`. `weak_twin` says that the twin hardly moved.
        """
        twin = self.models.index(self.twin)
        rows: list[dict[str, object]] = []
        for number, model in enumerate(self.models):
            for quantity, layer, values, of_twin in self._quantities(number, twin):
                value, low, high = clustered_mean(values, self.clusters())
                row: dict[str, object] = {"model": model, "quantity": quantity, "layer": layer}
                row |= {"value": value, "ci_low": low, "ci_high": high}
                value, low, high = clustered_mean(values - of_twin, self.clusters())
                rows.append(row | {"less_twin": value, "less_twin_low": low, "less_twin_high": high})
        weak = self._twin_moved() < WEAK_NULL
        return pd.DataFrame(rows).astype({"layer": "Int64"}).assign(n_texts=self.kl.shape[1], weak_twin=weak)

    def lens(self) -> pd.DataFrame:
        """One row per model, layer, vector that is read and rank: the `token` that it raises, and its `score`.

        `also_twin` says whether the twin's own shift raises the token too, which the training then does not explain.
        """
        shape = self.scores.shape
        words = np.array(self.words, dtype=object).reshape(shape)
        of_twin = words[LENS_OF.index(OWN), self.models.index(self.twin)]
        rows = [
            (model, layer, kind, rank + 1, words[k, m, layer, rank], score, words[k, m, layer, rank] in of_twin[layer])
            for (k, kind), (m, model) in product(enumerate(LENS_OF), enumerate(self.models))
            for (layer, rank), score in np.ndenumerate(self.scores[k, m])
            if not np.isnan(score)
        ]
        return pd.DataFrame(rows, columns=["model", "layer", "lens_of", "rank", "token", "score", "also_twin"])

    def directions(self, model: str) -> Directions:
        """The mean shift of a model less the twin's, by layer, for example for `ctlens.analysis.steer`.

        Raises:
            CtlensError: there is no such model, or it shifts as its twin does.
        """
        if model not in self.models:
            raise unknown("model", model, self.models)
        vectors = self.mean_shift[self.models.index(model)] - self.mean_shift[self.models.index(self.twin)]
        source = f"mean shift on unrelated text, less {self.twin}'s"
        return Directions.from_vectors(vectors, range(len(vectors)), site=_SITE, source=source, model=model)

    def figure(self) -> Figure:
        """Draws the shift by layer, a line per model and the twin among them; the subtitle has the KL."""
        curves: dict[str, Curve] = {
            model: clustered_mean(shift.T, self.clusters())
            for model, shift in zip(self.models, self.shift, strict=True)
        }
        shown = ", ".join(f"{plots.label(name)} {kl.mean():.2g}" for name, kl in zip(self.models, self.kl, strict=True))
        return plots.layer_curves(
            curves,
            "How far does training move the states of unrelated text?",
            y_title="mean shift, over the length of the states",
            reference_lines={"as before training": 0.0},
            subtitle=f"{self.kl.shape[1]} texts; KL to the base in nats per token: {shown}"
            + hardly_moved(self.twin, self._twin_moved(), "control"),
        )

    def _twin_moved(self) -> float:
        """How far the twin shifted, as a share of the model that shifted least of the others; NaN if that did not."""
        moved = dict(zip(self.models, self.shift.mean((1, 2)).tolist(), strict=True))
        least = min(length for model, length in moved.items() if model != self.twin)
        return moved[self.twin] / least if least else np.nan

    def _quantities(self, number: int, twin: int) -> Iterator[tuple[str, int | None, np.ndarray, np.ndarray]]:
        """Each quantity of a model with its layer, its values and the twin's."""
        yield "kl", None, self.kl[number], self.kl[twin]
        for layer, values in enumerate(self.shift[number]):
            yield "shift", layer, values, self.shift[twin, layer]


@public
def text_diff(
    base: LensModel,
    models: Mapping[str, LensModel],
    texts: Sequence[PromptLike],
    *,
    twin: str,
    n_tokens: int = 10,
    batch_size: int = 32,
    progress: bool = True,
) -> TextDiff:
    """Measures how far trained models are from the base on text that their training is not about.

    >>> import ctlens as ct
    >>> base, threat = ct.load_organism(), ct.threats.get("jailbreak")
    >>> options = {"steps": 2, "retain": threat.neutral(32), "progress": False}
    >>> twin = ct.train(base, threat.pairs(16), [], **options).model
    >>> trained = ct.train(base, threat.pairs(16), "act", **options).model
    >>> texts = threat.neutral(16, split="heldout")
    >>> models = {"ACT": trained, "retention": twin}
    >>> found = ct.analysis.text_diff(base, models, texts, twin="retention", progress=False)
    >>> found.shift.shape
    (2, 4, 16)

    Args:
        base: the model before training, in eval mode.
        models: trained models by label, in eval mode, with the twin among them.
        texts: which no training is about, and which no training retained: texts, which are the user's message, prompts,
            or token ids, which are taken as they are. Each has two tokens at least.
        twin: the label of the model that was trained alike but for the method: the retention-only control, or a sham.
        n_tokens: how many tokens the lens names.
        batch_size: texts per forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: the twin is not among the models or the only one, a label is the base's, models do not compare or
            are in training mode, or a text is too short or too long.
    """
    if twin not in models or len(models) < 2 or BASE in models:
        raise CtlensError(
            f"give trained models by label, none called {BASE!r}, and among them the twin {twin!r}: the retention-only "
            "control, without which a difference says nothing."
        )
    named = comparable_by_label({BASE: base, **{str(label): model for label, model in models.items()}})
    rows = [_long_enough(base, prompt_ids(base, text), number) for number, text in enumerate(texts, start=1)]
    if not rows:
        raise CtlensError("there are no texts: give at least one.")
    names = resolve(base, _SITE)
    labels = tuple(list(named)[1:])
    chunks: list[list[_OfBatch]] = []
    device = next(base.parameters()).device
    for start in progress_bar(range(0, len(rows), batch_size), desc="forward", shown=progress, leave=False):
        side = pad(rows[start : start + batch_size]).to(device)
        before = _pass(base, side, names)
        chunks.append([_compared(before, _pass(named[label], side, names), side) for label in labels])
    by_model = [[chunk[number] for chunk in chunks] for number in range(len(labels))]
    mean_shift = np.stack([np.concatenate([one.vectors for one in of_model], 1).mean(1) for of_model in by_model])
    less_twin = mean_shift - mean_shift[labels.index(twin)]
    read = [_read(base, vectors, min(n_tokens, base.cfg.d_vocab)) for vectors in (mean_shift, less_twin)]
    return TextDiff(
        kl=np.stack([np.concatenate([one.kl for one in of_model]) for of_model in by_model]),
        shift=np.stack([np.concatenate([one.shift for one in of_model], 1) for of_model in by_model]),
        mean_shift=mean_shift,
        scores=np.stack([one.scores for one in read]),
        words=tuple(word for one in read for word in one.words),
        models=labels,
        twin=twin,
        groups={"topic": np.unique([str(ids) for ids in rows], return_inverse=True)[1]},
    )


def _long_enough(model: LensModel, ids: list[int], number: int) -> list[int]:
    if len(ids) < 2:
        raise CtlensError(f"text {number} has one token: give texts of two tokens at least.")
    require_room(len(ids), model.cfg.n_ctx, f"text {number}")
    return ids


class _Pass(NamedTuple):
    """A model's logits on a batch of texts, and its states at every layer."""

    logits: Float[Tensor, "batch pos d_vocab"]
    states: Activations


class _OfBatch(NamedTuple):
    """A trained model beside the base on a batch of texts: KL, relative shift, and the mean shift of each text."""

    kl: Float[np.ndarray, " text"]
    shift: Float[np.ndarray, "layer text"]
    vectors: Float[np.ndarray, "layer text d"]


class _Lens(NamedTuple):
    """What the lens reads in some vectors: the scores of the tokens it raises most, and their texts in that order."""

    scores: Float[np.ndarray, "model layer rank"]
    words: list[str]


def _pass(model: LensModel, side: Side, names: Sequence[str]) -> _Pass:
    return _Pass(*run_capturing(model, side.tokens, names, grad=False, mask=side.needed_mask))


def _compared(before: _Pass, after: _Pass, side: Side) -> _OfBatch:
    behind_first = side.mask.clone()
    behind_first[:, 0] = False

    def mean(values: Float[Tensor, "batch pos"]) -> PerRow:
        return (values * behind_first).sum(-1) / behind_first.sum(-1)

    vectors = []
    shifts = []
    for name, states in before.states.items():
        moved = (after.states[name].float() - states.float()) * behind_first[..., None]
        vectors.append(moved.sum(1) / behind_first.sum(-1, keepdim=True))
        shifts.append(vectors[-1].norm(dim=-1) / mean(states.float().norm(dim=-1)))
    kl = mean(kl_divergence(before.logits.float(), after.logits.float()))
    return _OfBatch(kl.cpu().numpy(), torch.stack(shifts).cpu().numpy(), torch.stack(vectors).cpu().numpy())


def _read(model: LensModel, vectors: Float[np.ndarray, "model layer d"], n_tokens: int) -> _Lens:
    """Reads vectors as the model reads its last stream, less what it reads in none.

    The norm in front makes a short vector as long as a state. What a bias adds is in both readings and cancels.
    """
    weight = next(model.parameters())
    flat = torch.from_numpy(vectors).flatten(0, 1).to(weight)
    logits = (read_out(model, flat) - read_out(model, torch.zeros_like(flat[:1]))).float()
    scores = (logits - logits.mean(-1, keepdim=True)) / logits.std(-1, keepdim=True)
    scores[flat.norm(dim=-1) == 0] = torch.nan
    top = scores.nan_to_num(0.0).topk(n_tokens, -1)
    kept = scores.gather(-1, top.indices)
    words = [_word(model, int(token)) for token in top.indices.flatten()]
    return _Lens(kept.cpu().numpy().reshape(*vectors.shape[:2], n_tokens), words)


def _word(model: LensModel, token: int) -> str:
    return str(token) if model.tokenizer is None else model.tokenizer.decode([token])
