"""A small crosscoder of a base and a trained model: features that both share, and features that one has alone.

It is made for models and texts as small as the organism's, where it is fitted on a CPU; at scale that is SAELens's job,
and its dictionaries are read by `ctlens.analysis.Features`. Without its checks a crosscoder misleads, so they come with
it, on texts that it was not fitted to: the variance it explains, how many latents are active and how many never,
and latent scaling, which tells the latents that are truly one model's from those that the fit only wrote so.

The training beside the twin decides here as well: a crosscoder of the base and its retention-only twin finds what any
training brings, or any fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctlens import plots
from ctlens.analysis.base.forward import require_comparable, vector_hooks
from ctlens.analysis.base.result import Result
from ctlens.analysis.directions.directions import Directions
from ctlens.analysis.features.crosscoder_checks import NU_ERROR, NU_RECONSTRUCTION, checks
from ctlens.analysis.features.crosscoder_fit import Codes, CrosscoderWeights, FitSettings, PairedStates, fit
from ctlens.analysis.features.readout import site_of
from ctlens.analysis.hook_points.activations import PromptLike, prompt_ids
from ctlens.core.config import generator
from ctlens.core.errors import CtlensError, unknown
from ctlens.core.labels import BASE
from ctlens.core.progress import progress_bar
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.batch import pad, require_room
from ctlens.models.hooks import run_capturing
from ctlens.plots import Figure

TRAINED = "trained"
CROSSCODER_MODELS = (BASE, TRAINED)
_SHARED = "shared"
_TOKENS_AT_ONCE = 4096  # of which codes are held together, 768 latents of each take 12 MiB


@dataclass(frozen=True)
class Crosscoder(Result):
    """The result of `crosscoder`: one code for the states of two models, with the checks that it needs.

    Attributes:
        encoder: `[model, d, latent]`, for states divided by `scale`; models as in `CROSSCODER_MODELS`.
        encoder_bias: `[latent]`.
        decoder: `[model, latent, d]`.
        decoder_bias: `[model, d]`.
        losses: `[step]`, the squared error per token.
        explained: `[model]`, the share of the variance of held-out states that is explained.
        frequency: `[latent]`, the share of held-out tokens at which it is active.
        owner: `[latent]`, the number of the model in which its decoder is longer.
        nu_error, nu_reconstruction: `[latent]`, see `ctlens.analysis.features.crosscoder_checks`; NaN where not known.
        threshold: what a latent writes must be longer than this, summed over the models, to count.
        scale: of the states.
        active: how many latents are active at a held-out token, on average (L0).
        dead: the share of latents that are active at no token, fitted or held out.
        k: how many latents per token it was fitted with.
        n_fitted, n_heldout: how many tokens of each.
        hook_name: the hook point.
    """

    encoder: Float[np.ndarray, "model d latent"]
    encoder_bias: Float[np.ndarray, " latent"]
    decoder: Float[np.ndarray, "model latent d"]
    decoder_bias: Float[np.ndarray, "model d"]
    losses: Float[np.ndarray, " step"]
    explained: Float[np.ndarray, " model"]
    frequency: Float[np.ndarray, " latent"]
    owner: Int[np.ndarray, " latent"]
    nu_error: Float[np.ndarray, " latent"]
    nu_reconstruction: Float[np.ndarray, " latent"]
    threshold: float
    scale: float
    active: float
    dead: float
    k: int
    n_fitted: int
    n_heldout: int
    hook_name: str

    def encode(self, x: Float[Tensor, "*batch model d"]) -> Float[Tensor, "*batch latent"]:
        """The codes of tokens from the states of both models there, `[..., 2, d]`, in the order base, trained.

        In the trained model's stead another checkpoint may be read, and its codes compared with the trained one's.
        """
        weights = self._weights(x)
        flat = x.flatten(0, -3) / self.scale
        codes = weights.codes(flat)
        return (codes * (weights.sizes(codes) > self.threshold)).unflatten(0, x.shape[:-2])

    def decode(self, x: Float[Tensor, "*batch latent"]) -> Float[Tensor, "*batch model d"]:
        """The states of both models that some codes stand for."""
        return (self._weights(x).decoded(x.flatten(0, -2)) * self.scale).unflatten(0, x.shape[:-1])

    def to_dataframe(self) -> pd.DataFrame:
        """One row per latent that is ever active on held-out tokens.

        Returns:
            Its `frequency`, the length of its decoder in each model (`norm_base`, `norm_trained`), the ratio of them
            (`relative_norm`: 0 is the base's alone, 1 the trained model's, 1/2 even) and their `cosine`; both `nu`, and
            the model that it is `specific_to`: empty where latent scaling says that both have it, or cannot tell.
        """
        base, trained = np.linalg.norm(self.decoder, axis=-1)
        longest = np.maximum(base, trained)
        columns = {
            "latent": np.arange(len(base)),
            "frequency": self.frequency,
            "norm_base": base * self.scale,
            "norm_trained": trained * self.scale,
            "relative_norm": (1 + (trained - base) / longest) / 2,
            "cosine": (self.decoder[0] * self.decoder[1]).sum(-1) / (base * trained).clip(np.finfo(float).tiny),
            "nu_error": self.nu_error,
            "nu_reconstruction": self.nu_reconstruction,
        }
        table = pd.DataFrame(columns)
        specific = (self.nu_error < NU_ERROR) & (self.nu_reconstruction < NU_RECONSTRUCTION)
        table["specific_to"] = np.where(specific, np.array(CROSSCODER_MODELS)[self.owner], "")
        return table.loc[self.frequency > 0].reset_index(drop=True)

    def summary(self) -> pd.DataFrame:
        """One row: the checks of the whole, and how many latents are specific to either model.

        `looks_base` and `looks_trained` count those that the lengths of decoders alone would call so, below 0.1 and
        above 0.9 of `relative_norm`.
        """
        table = self.to_dataframe()
        specific = table["specific_to"].to_numpy()
        relative = table["relative_norm"].to_numpy()
        numbers: dict[str, object] = {
            f"explained_{name}": self.explained[n] for n, name in enumerate(CROSSCODER_MODELS)
        }
        numbers |= {"active": self.active, "dead": self.dead, "n_latents": len(self.frequency)}
        numbers |= {f"{name}_specific": np.count_nonzero(specific == name) for name in CROSSCODER_MODELS}
        numbers |= {"looks_base": np.count_nonzero(relative < 0.1), "looks_trained": np.count_nonzero(relative > 0.9)}
        return pd.DataFrame([numbers | {"n_fitted": self.n_fitted, "n_heldout": self.n_heldout}])

    def direction(self, latent: int, model: str = TRAINED) -> Directions:
        """What a latent writes in a model at a code of 1, for `ctlens.analysis.steer` and `ablate`.

        Raises:
            CtlensError: there is no such latent or model, or the hook point has no directions.
        """
        if model not in CROSSCODER_MODELS:
            raise unknown("model", model, CROSSCODER_MODELS)
        if not 0 <= latent < len(self.frequency):
            raise CtlensError(
                f"there is no latent {latent}: the crosscoder has latents 0 to {len(self.frequency) - 1}."
            )
        site, layer = site_of(self.hook_name)
        written = self.decoder[CROSSCODER_MODELS.index(model), latent] * self.scale
        return Directions.from_vectors(written[None], [layer], site=site, source=f"latent {latent}", model=model)

    def figure(self) -> Figure:
        """Draws both numbers of latent scaling of every latent; those at the lower left are one model's alone.

        Raises:
            CtlensError: no latent is active at enough tokens to be scaled.
        """
        table = self.to_dataframe().dropna(subset=["nu_error", "nu_reconstruction"])
        if table.empty:
            raise CtlensError("no latent is active at enough held-out tokens to be scaled: give more texts.")
        groups = {name: table[table["specific_to"] == name] for name in (*CROSSCODER_MODELS, "")}
        explained = ", ".join(
            f"{name} {share:.0%}" for name, share in zip(CROSSCODER_MODELS, self.explained, strict=True)
        )
        return plots.scattered(
            {
                name or _SHARED: (part["nu_reconstruction"], part["nu_error"])
                for name, part in groups.items()
                if len(part)
            },
            "Which latents are one model's alone?",
            x_title="reconstruction of the other model, over the owner's",
            y_title="error of the other model, over the owner's",
            corner=(NU_RECONSTRUCTION, NU_ERROR),
            subtitle=f"{self.hook_name}; variance explained: {explained}; {self.active:.1f} active per token; "
            f"{self.dead:.0%} dead",
            caption="A point is a latent of the crosscoder. Below both dotted lines, latent scaling calls it specific.",
        )

    def _weights(self, like: Tensor) -> CrosscoderWeights:
        arrays = (self.encoder, self.encoder_bias, self.decoder, self.decoder_bias)
        return CrosscoderWeights(*[torch.from_numpy(array).to(like) for array in arrays])


@public
def crosscoder(
    base: LensModel,
    trained: LensModel,
    texts: Sequence[PromptLike],
    hook_name: str,
    *,
    n_latents: int = 768,
    k: int = 12,
    steps: int = 600,
    batch_size: int = 1024,
    lr: float = 2e-3,
    heldout: float = 0.2,
    seed: int = 0,
    progress: bool = True,
) -> Crosscoder:
    """Fits a BatchTopK crosscoder to two models' states of the same tokens, and checks it on held-out texts.

    >>> import ctlens as ct
    >>> base, texts = ct.load_organism(), ct.threats.get("sycophancy").neutral(64)
    >>> small = {"n_latents": 64, "k": 4, "steps": 40, "batch_size": 128, "progress": False}
    >>> found = ct.analysis.crosscoder(base, base, texts, "blocks.2.hook_resid_post", **small)
    >>> found.summary()[["base_specific", "trained_specific"]].values.tolist()  # one model has all that the other has
    [[0, 0]]

    Args:
        base: the model before training, in eval mode.
        trained: the trained model, in eval mode; or the twin, for what any training brings.
        texts: prompts of every kind that matters, wrapped, clean and neutral: texts, which are the user's message,
            prompts, or token ids. Equal ones count once; the first token of each is left out.
        hook_name: the full name of a hook point with one vector per token.
        n_latents: of the crosscoder; by default eight times the width of the organism, for which these settings are.
        k: how many latents a token has, on average; not tuned, as the other settings of the fit.
        steps: of the fit.
        batch_size: tokens per step of the fit, and texts per forward pass an eighth of that.
        lr: learning rate.
        heldout: the share of texts that the checks are made on.
        seed: of the fit, and of which texts are held out.
        progress: show a progress bar.

    Raises:
        CtlensError: the models do not compare or are in training mode, the hook point does not exist or has heads,
            there are too few texts, a text is too short or too long, or `k` is more than there are latents.
    """
    require_comparable(base, trained)
    (name,) = vector_hooks(base, hook_name)[:1]
    if name != hook_name:
        raise CtlensError(f"{hook_name} is several hook points: give a full name, such as {name}.")
    if not 0 < heldout < 1 or not 0 < k <= n_latents:
        raise CtlensError(f"heldout is {heldout} and k {k}: give a share between 0 and 1, and at most {n_latents}.")
    ids = list(dict.fromkeys(tuple(prompt_ids(base, text)) for text in texts))
    n_checked = round(heldout * len(ids))
    if n_checked < 1 or n_checked == len(ids):
        raise CtlensError(f"there are {len(ids)} different texts: give enough to fit to and to hold out.")
    order = torch.randperm(len(ids), generator=generator(seed, "held out")).tolist()
    fitted_to = [ids[number] for number in order[n_checked:]]
    checked_on = [ids[number] for number in order[:n_checked]]
    per_pass = max(1, batch_size // 8)
    states = _states(base, trained, fitted_to, name, per_pass, progress)
    scale = float((states - states.mean(0)).square().mean().sqrt())
    found = fit(states / scale, FitSettings(n_latents, k, steps, batch_size, lr, seed), progress=progress)
    checked = _states(base, trained, checked_on, name, per_pass, progress) / scale
    codes = _codes(found.weights, checked, found.threshold)
    ever = _codes(found.weights, states / scale, found.threshold).any(0) | codes.any(0)
    arrays = {part: value.cpu().numpy() for part, value in found.weights._asdict().items()}
    return Crosscoder(
        **arrays,
        losses=np.array(found.losses),
        **checks(found.weights, checked, codes)._asdict(),
        threshold=found.threshold,
        scale=scale,
        active=float((codes > 0).sum(-1).float().mean()),
        dead=float((~ever).float().mean()),
        k=k,
        n_fitted=len(states),
        n_heldout=len(checked),
        hook_name=name,
    )


def _states(
    base: LensModel, trained: LensModel, texts: Sequence[tuple[int, ...]], name: str, per_pass: int, progress: bool
) -> PairedStates:
    """The states of both models at every token but the first of each text."""
    device = next(base.parameters()).device
    found = []
    for start in progress_bar(range(0, len(texts), per_pass), desc="forward", shown=progress, leave=False):
        rows = texts[start : start + per_pass]
        for ids in rows:
            if len(ids) < 2:
                raise CtlensError("a text has one token: give texts of two tokens at least.")
            require_room(len(ids), base.cfg.n_ctx, "a text")
        side = pad(rows).to(device)
        behind_first = side.mask.clone()
        behind_first[:, 0] = False
        of_models = []
        for model in (base, trained):
            options = {"grad": False, "mask": side.needed_mask, "logits": False}
            _, seen = run_capturing(model, side.tokens, [name], **options)
            of_models.append(seen[name][behind_first].float())
        found.append(torch.stack(of_models, 1))
    return torch.cat(found)


@torch.no_grad()
def _codes(weights: CrosscoderWeights, states: PairedStates, threshold: float) -> Codes:
    """The codes of many tokens, of the latents that count alone."""
    parts = []
    for chunk in states.split(_TOKENS_AT_ONCE):
        codes = weights.codes(chunk)
        parts.append(codes * (weights.sizes(codes) > threshold))
    return torch.cat(parts)
