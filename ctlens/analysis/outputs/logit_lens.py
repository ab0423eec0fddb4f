"""The logit lens and logit attribution: at which layer the answer is decided, and which components write it.

Both read the answer's logit difference off the residual stream, with the model's raw weights. The final norm is not
linear, so a component's share is taken with the norm's scale held at its value on the whole stream, as TransformerLens
does on folded weights. The shares then add up to the model's own logit difference, and a test holds them to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ctlens import plots
from ctlens.analysis.base.contrast import ContrastBatch, TokenPair, contrast_batches, contrasts
from ctlens.analysis.base.forward import by_label, comparable_by_label
from ctlens.analysis.base.recording import LOGITS, Readable, model_of, read
from ctlens.analysis.base.result import ResultOverPairs, groups_of
from ctlens.core.clusters import clustered_mean
from ctlens.core.errors import CtlensError
from ctlens.core.public import public
from ctlens.core.types import Activations, LensModel, PerRow
from ctlens.data.inputs import Pairs
from ctlens.data.pairs import Pair
from ctlens.models.hooks import resolve
from ctlens.models.parameters import require_whole
from ctlens.models.readout import read_out
from ctlens.plots import Figure

_EMBED = "embed"
_BIAS = "bias"
ATTRIBUTION_SITES = ("blocks.0.hook_resid_pre", "resid_post", "z", "attn_out", "mlp_out", LOGITS)
"""The activations that a recording for `logit_attribution` must hold, sites at every layer."""
# A pass over one token reads all weights, so that one per layer costs a real model as much as whole prompts do. Each
# vector becomes a row of logits as wide as the vocabulary: this many are no more than a batch of prompts has.
_READ_AT_ONCE = 64
_Vectors: TypeAlias = Float[Tensor, "batch d"]
_AtLast: TypeAlias = Callable[[Sequence[str]], Activations]
_T = TypeVar("_T")


@dataclass(frozen=True)
class LogitLens(ResultOverPairs):
    """The logit difference, good answer minus bad, that the residual stream already holds behind each layer.

    Attributes:
        values: `[model, layer, pair]`, in logits; the last layer's is the model's own.
        models: their labels.
        side: `"wrapped"`, `"clean"` or `"benign"`, the side of the pairs that was read.
    """

    values: Float[np.ndarray, "model layer pair"]
    models: tuple[str, ...]
    side: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model and layer: the mean over `n_pairs`, `value`, with its 95 percent interval."""
        layers = [str(layer) for layer in range(self.values.shape[1])]
        return _table(self, layers, "layer").astype({"layer": int})

    def figure(self) -> Figure:
        """The logit difference by layer, a line per model."""
        clusters = self.clusters()
        curves = {name: clustered_mean(row.T, clusters) for name, row in zip(self.models, self.values, strict=True)}
        return plots.layer_curves(
            curves,
            "At which layer does the good answer overtake the bad one?",
            y_title="logit difference, good minus bad",
            reference_lines={"undecided": 0.0},
            subtitle=f"{self.values.shape[-1]} {self.side} prompts",
        )


@dataclass(frozen=True)
class LogitAttribution(ResultOverPairs):
    """The share of each component in the logit difference, good answer minus bad.

    Attributes:
        values: `[model, component, pair]`, in logits; they add up to the model's own difference.
        components: `"embed"`, the heads (`"L0H1"`), the MLPs (`"L0 MLP"`) and all biases together (`"bias"`).
        models: their labels.
        side: `"wrapped"`, `"clean"` or `"benign"`, the side of the pairs that was read.
    """

    values: Float[np.ndarray, "model component pair"]
    components: tuple[str, ...]
    models: tuple[str, ...]
    side: str

    def to_dataframe(self) -> pd.DataFrame:
        """One row per model and component: the mean over `n_pairs`, `value`, with its 95 percent interval."""
        return _table(self, self.components, "component")

    def figure(self) -> Figure:
        """The heads and the MLP of every layer, a panel per model, on one scale."""
        inside = [index for index, name in enumerate(self.components) if name not in (_EMBED, _BIAS)]
        names = [self.components[index] for index in inside]
        n_layers = sum(name.endswith("MLP") for name in names)
        grids = {
            model: of_model[inside].mean(-1).reshape(n_layers, -1)
            for model, of_model in zip(self.models, self.values, strict=True)
        }
        columns = [name.removeprefix("L0").strip() for name in names[: len(names) // n_layers]]
        title = "Which heads and MLPs speak for the good answer, and which for the bad one?"
        subtitle = f"{self.values.shape[-1]} {self.side} prompts"
        return plots.component_grids(grids, columns, title, unit="logits, good minus bad", subtitle=subtitle)


@public
def logit_lens(
    models: Readable | Mapping[str, Readable],
    pairs: Pairs,
    *,
    side: str = "wrapped",
    batch_size: int = 64,
    progress: bool = True,
) -> LogitLens:
    """Reads the answer's logit difference off every layer, as the model itself reads it off the last, `read_out`.

    >>> import ctlens as ct
    >>> pairs = ct.threats.get("sycophancy").pairs(8, split="heldout")
    >>> lens = ct.analysis.logit_lens(ct.load_organism(), pairs, side="clean", progress=False)
    >>> bool(lens.values[0, -1].mean() > 0)  # on the clean prompt the good answer wins
    True

    Args:
        models: one, or several of one shape by their labels, in eval mode; or their recordings of
            that side, from `ctlens.analysis.base.record`, read through their models' weights.
        pairs: with good and bad answers. `ctlens.pairs` makes them of two lists of texts.
        side: `"wrapped"`, `"clean"` or `"benign"`.
        batch_size: prompts per forward pass.
        progress: show a progress bar.

    Raises:
        CtlensError: a model is in training mode or does not compare with the first, as `contrasts`,
            or a recording lacks a layer or a prompt.
    """
    found = _of_models(_lens, models, pairs, side, batch_size, progress)
    values = [np.concatenate(of_batches, -1) for of_batches in found.values()]
    return LogitLens(np.stack(values), tuple(found), side, groups=groups_of(pairs))


@public
def logit_attribution(
    models: Readable | Mapping[str, Readable],
    pairs: Pairs,
    *,
    side: str = "wrapped",
    batch_size: int = 64,
    progress: bool = True,
) -> LogitAttribution:
    """Splits the answer's logit difference over the embedding, every head, every MLP and the biases.

    >>> import ctlens as ct
    >>> pairs = ct.threats.get("sycophancy").pairs(8, split="heldout")
    >>> found = ct.analysis.logit_attribution(ct.load_organism(), pairs, progress=False)
    >>> len(found.components), found.figure().layout.title.text[:11]
    (22, 'Which heads')

    Args:
        models: as in `logit_lens`; recordings must hold the sites `ATTRIBUTION_SITES` of this module.
        pairs, side, batch_size, progress: as in `logit_lens`.

    Raises:
        CtlensError: as `logit_lens`; or the model changes the heads' sum before the residual
            stream gets it, so that no head has a share of its own.
    """
    found = _of_models(_shares, models, pairs, side, batch_size, progress)
    values = [np.concatenate([np.stack([*shares.values()]) for shares in parts], -1) for parts in found.values()]
    components = next(iter(found.values()))[0]
    return LogitAttribution(np.stack(values), tuple(components), tuple(found), side, groups=groups_of(pairs))


def _of_models(
    analysis: Callable[[LensModel, ContrastBatch, _AtLast], _T],
    models: Readable | Mapping[str, Readable],
    pairs: Sequence[Pair],
    side: str,
    batch_size: int,
    progress: bool,
) -> dict[str, list[_T]]:
    """The values of an analysis for every batch, by model."""
    sources = by_label(models)
    named = comparable_by_label({name: model_of(source) for name, source in sources.items()})
    prompts = contrasts(next(iter(named.values())), pairs, side)
    found: dict[str, list[_T]] = {name: [] for name in named}
    for name, model in named.items():
        for number, batch in enumerate(contrast_batches(model, prompts, batch_size, progress)):
            at_last = partial(_at_last, sources[name], batch, number * batch_size, next(model.parameters()).dtype)
            found[name].append(analysis(model, batch, at_last))
    return found


def _at_last(
    source: Readable, batch: ContrastBatch, first: int, dtype: torch.dtype, names: Sequence[str]
) -> Activations:
    """The activations where the answers are predicted, in the precision of the model's weights."""
    found = read(source, batch.side, names, first)
    return {name: (state if name == LOGITS else batch.at_last(state)).to(dtype) for name, state in found.items()}


def _lens(model: LensModel, batch: ContrastBatch, at_last: _AtLast) -> Float[np.ndarray, "layer batch"]:
    """The logit difference behind every layer, of as many layers in a pass as there is room for."""
    states = torch.stack([*at_last(resolve(model, "resid_post")).values()])
    differences = []
    for layers in states.split(max(1, _READ_AT_ONCE // states.shape[1])):
        logits = read_out(model, layers.flatten(0, 1)).unflatten(0, layers.shape[:2])
        differences += [batch.logit_diff(of_layer) for of_layer in logits]
    return torch.stack(differences).float().cpu().numpy()


def _shares(model: LensModel, batch: ContrastBatch, at_last: _AtLast) -> dict[str, np.ndarray]:
    """The share of every component in the logit difference, `[batch]` each.

    Raises:
        CtlensError: the shares do not add up to the model's logit difference, or the heads not to their layer's
            output.
    """
    lens = cast(Any, model)
    if torch.finfo(next(model.parameters()).dtype).bits < 32:
        raise CtlensError("the shares of components add up to the logits in float32 alone: load the model in float32.")
    if not hasattr(model, "ln_final"):
        raise CtlensError(
            "this model has no final norm, because its blocks norm the stream itself, so no component has a share of "
            "its own: read it by logit_lens."
        )
    require_whole(model)
    start = resolve(model, "resid_pre", 0)[0]
    end = resolve(model, "resid_post", "last")[0]
    z = resolve(model, "z")
    attn_out = resolve(model, "attn_out")
    mlp_out = resolve(model, "mlp_out")
    states = at_last([start, end, *z, *attn_out, *mlp_out, LOGITS])
    with torch.no_grad():
        reading = _Reading(lens, states[end], batch.answers)
        shares = {_EMBED: reading.share(states[start])}
        rest = reading.constant
        for layer in range(model.cfg.n_layers):
            heads = torch.einsum("bhd,hdm->hbm", states[z[layer]], lens.blocks[layer].attn.W_O)
            shares |= {f"L{layer}H{head}": reading.share(output) for head, output in enumerate(heads)}
            shares[f"L{layer} MLP"] = reading.share(states[mlp_out[layer]])
            bias = states[attn_out[layer]] - heads.sum(0)
            _require_constant(bias, layer)
            rest = rest + reading.share(bias)
        shares[_BIAS] = rest
        _require_whole(torch.stack(list(shares.values())), batch.logit_diff(states[LOGITS]))
    return {name: share.float().cpu().numpy() for name, share in shares.items()}


def _require_constant(bias: _Vectors, layer: int) -> None:
    """Raises unless a layer's attention output less its heads is the same for every prompt, as a bias is."""
    if not torch.allclose(bias, bias[:1].expand_as(bias), atol=1e-3, rtol=1e-3):
        raise CtlensError(
            f"layer {layer} changes the sum of its heads before adding it, so no head has a share of its own: "
            "read this model by logit_lens."
        )


def _require_whole(shares: Float[Tensor, "component batch"], said: PerRow) -> None:
    if not torch.allclose(shares.sum(0), said, atol=1e-3, rtol=1e-3):
        raise CtlensError(
            "the components do not add up to the logits, because this model caps or changes them at the end: read this "
            "model by logit_lens."
        )


class NormAffine(NamedTuple):
    """The weight and the bias of a norm, and whether it centres.

    Attributes:
        weight: `[1, d]`, by which the norm multiplies.
        bias: `[1, d]`, which it adds.
        centred: whether it first subtracts the mean.
    """

    weight: _Vectors
    bias: _Vectors
    centred: bool


def affine_of_norm(norm: Callable[[Tensor], Tensor], like: _Vectors) -> NormAffine:
    """Reads a norm's weight, bias and centring off three of its values, because models name and fold them differently.

    1. The norm is `n(x) = w c(x) / rms(c(x)) + b`, where `c(x)` is `x` or, if it centres, `x - mean(x)`.
    2. Take `v = (1, -1, 1, -1, ...)` of even width: its mean is 0 and its root mean square 1, so `c(v) / rms = v`.
    3. Then `n(v) = w v + b` and `n(-v) = -w v + b`, hence `b = (n(v) + n(-v)) / 2`.
    4. Likewise `w = v (n(v) - n(-v)) / 2`, as every `v v` is 1.
    5. Adding 1 to `v` changes nothing if and only if the norm centres: else `v + 1` is `(2, 0, 2, 0, ...)`.
    6. The norm's `eps` divides `w` by `sqrt(1 + eps)`; a scale that is fitted with this `w` makes up for it.

    >>> norm = torch.nn.LayerNorm(4)
    >>> norm.load_state_dict({"weight": torch.tensor([1.0, 2.0, 3.0, 4.0]), "bias": torch.full((4,), 0.5)})
    <All keys matched successfully>
    >>> found = affine_of_norm(norm, torch.zeros(1, 4))
    >>> [round(weight, 3) for weight in found.weight[0].tolist()], found.bias[0].tolist(), found.centred
    ([1.0, 2.0, 3.0, 4.0], [0.5, 0.5, 0.5, 0.5], True)

    Args:
        norm: of vectors `[batch, 1, d]`.
        like: a vector `[1, d]` of the width, precision and device that the norm takes.
    """
    probe = torch.ones_like(like)
    probe[:, 1::2] = -1
    up = norm(probe[:, None])[:, 0]
    down = norm(-probe[:, None])[:, 0]
    raised = norm((probe + 1)[:, None])[:, 0]
    return NormAffine((up - down) / 2 * probe, (up + down) / 2, torch.allclose(raised, up, atol=1e-3))


class _Reading:
    """Reads the logit difference off the stream, with the final norm's scale held at what it is on the whole stream.

    Held so, the norm is linear but for its bias. The scale is the factor that fits `w c(x)` to `n(x) - b`, in the
    words of `affine_of_norm`.
    """

    def __init__(self, lens: Any, stream: _Vectors, answers: TokenPair) -> None:
        self.norm = affine_of_norm(lens.ln_final, stream[:1])
        whole = self._scaled(stream)
        normed = lens.ln_final(stream[:, None])[:, 0] - self.norm.bias
        self.scale = (whole * normed).sum(-1) / whole.square().sum(-1)
        good, bad = lens.W_U.T[answers].unbind(1)
        self.direction = good - bad
        self.constant = (self.norm.bias * self.direction).sum(-1)
        if getattr(lens, "b_U", None) is not None:
            self.constant = self.constant + lens.b_U[answers[:, 0]] - lens.b_U[answers[:, 1]]

    def share(self, written: _Vectors) -> PerRow:
        """The share of the logit difference that comes from a vector written into the stream."""
        return self.scale * (self._scaled(written) * self.direction).sum(-1)

    def _scaled(self, vectors: _Vectors) -> _Vectors:
        centred = vectors - vectors.mean(-1, keepdim=True) if self.norm.centred else vectors
        return centred * self.norm.weight


def _table(result: LogitLens | LogitAttribution, parts: Sequence[str], kind: str) -> pd.DataFrame:
    mean, low, high = clustered_mean(np.moveaxis(result.values, -1, 0), result.clusters())
    rows = [
        (model, part, mean[m, p], low[m, p], high[m, p], result.values.shape[-1])
        for m, model in enumerate(result.models)
        for p, part in enumerate(parts)
    ]
    return pd.DataFrame(rows, columns=["model", kind, "value", "ci_low", "ci_high", "n_pairs"])
