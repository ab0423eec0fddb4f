"""What is chosen in an exploration, and the numbers there: answers, heads, gaps, the logit lens, one patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
from jaxtyping import Float

from ctlens.analysis.attention.maps import AttentionMaps, maps_of_pair, token_texts
from ctlens.analysis.base.contrast import Contrast, contrast_of
from ctlens.analysis.base.forward import comparable_by_label
from ctlens.analysis.base.positions import segments
from ctlens.analysis.hook_points.activations import OnePatch, patch_one
from ctlens.analysis.patching.hooked import WITH_HEADS
from ctlens.analysis.patching.jobs import PATCH_DIRECTIONS
from ctlens.analysis.residual.shift_vectors import beyond_rounding
from ctlens.core.errors import CtlensError, located, unknown
from ctlens.core.public import at_work, public
from ctlens.core.types import LensModel
from ctlens.data.batch import EncodedPair, encode_pair, require_room
from ctlens.data.pairs import PROMPT_SIDES, Pair, Prompt
from ctlens.data.token_kinds import token_kinds
from ctlens.exploring.captures import Captures, PromptStates
from ctlens.exploring.edits import WHAT_IF, edited_pair, template_of
from ctlens.models.hooks import SHORTHANDS, select_layers, site_at, unknown_site
from ctlens.models.readout import read_out
from ctlens.threats.replies import Reply, replies_to


@dataclass(frozen=True)
class Selection:
    """What is chosen in an exploration.

    Attributes:
        pair: its index.
        models: labels of those that are shown.
        layer, head: of a head, and the layer of a patch.
        position: of a token of the wrapped prompt, -1 for the last.
        site, direction: of a patch, as `ct.patch_one` takes them.
        text: the message that stands in the wrapped prompt's place, see `Readings.edited`; empty for the pair as it is.
        prompt_side: the prompt that the views read, `"wrapped"`, `"clean"` or `"benign"`, the pair's benign twin.
    """

    pair: int = 0
    models: tuple[str, ...] = ()
    layer: int = 0
    head: int = 0
    position: int = -1
    site: str = "z"
    direction: str = "denoising"
    text: str = ""
    prompt_side: str = "wrapped"


class Lens(NamedTuple):
    """The logit lens at one token: the logit difference behind every layer, and the likeliest token."""

    logit_diff: Float[np.ndarray, " layer"]
    likeliest: tuple[str, ...]


class Readings:
    """Readings is the headless half of an exploration: what is chosen, and the numbers there.

    Args:
        models: one or several of one shape by their labels, in eval mode; the first one is the reference.
        pairs: clean and wrapped prompts.
        max_new_tokens: length of the longest answer, in tokens.

    Raises:
        CtlensError: there is no pair, the models do not compare, or the first pair does not align.
    """

    def __init__(self, models: LensModel | Mapping[str, LensModel], pairs: Sequence[Pair], max_new_tokens: int) -> None:
        self.models = comparable_by_label(models)
        self.pairs = tuple(pairs)
        self.max_new_tokens = max_new_tokens
        self._captures = Captures(self.models)
        self._selection, self._row = self._checked(Selection(models=tuple(self.models)))

    @property
    def selection(self) -> Selection:
        """What is chosen; `select` changes it."""
        return self._selection

    @public
    def select(
        self,
        *,
        pair: int | None = None,
        models: Sequence[str] | None = None,
        layer: int | None = None,
        head: int | None = None,
        position: int | None = None,
        site: str | None = None,
        direction: str | None = None,
        text: str | None = None,
        prompt_side: str | None = None,
    ) -> Self:
        """Chooses what is looked at, and returns the exploration; what is not named stays as it is.

        Another pair is shown without an edit, and another prompt at its last token, unless they are named too.

        >>> import ctlens as ct
        >>> explored = ct.explore(ct.load_organism(), ct.threats.get("sycophancy").pairs(2, split="heldout"))
        >>> explored.select(pair=1, layer=-1, head=2).selection.layer
        3

        Args:
            pair: its index; negative ones count from the end.
            models: labels of those to show; the first one's clean prompt is compared with.
            layer: its number; negative ones count from the end.
            head: its number.
            position: of a token in the wrapped prompt; negative ones count from the end.
            site: of a patch, one of `ctlens.models.hooks.SHORTHANDS`; in full, as `"blocks.3.attn.hook_z"`, it names
                the layer too.
            direction: of a patch, `"denoising"` or `"noising"`.
            text: an edit of the wrapped prompt, see `edited`; an empty one takes the edit back.
            prompt_side: the prompt that the views read, which stands in the wrapped one's place: `"wrapped"`, `"clean"`
                or `"benign"`.

        Raises:
            CtlensError: there is no such thing, or the prompt cannot be read; then all stays as it was.
        """
        named = {"pair": pair, "models": models, "layer": layer, "head": head, "position": position}
        named |= {"site": site, "direction": direction, "text": text, "prompt_side": prompt_side}
        changes: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
        if site is not None:
            at = site_at(site, "all" if layer is None else layer)
            changes["site"] = at.site
            changes |= {} if at.layers == "all" else {"layer": at.layers}
        if (pair is not None or prompt_side is not None) and text is None:
            changes["text"] = ""
        if text and prompt_side is None:
            changes["prompt_side"] = "wrapped"
        if {"pair", "text", "prompt_side"} & set(changes) and position is None:
            changes["position"] = -1
        self._selection, self._row = self._checked(replace(self._selection, **changes))
        return self

    def _checked(self, chosen: Selection) -> tuple[Selection, EncodedPair]:
        """The selection with counted numbers, and its pair as tokens."""
        first = next(iter(self.models.values()))
        if not -len(self.pairs) <= chosen.pair < len(self.pairs):
            raise CtlensError(f"pair {chosen.pair} does not exist: there are pairs 0 to {len(self.pairs) - 1}.")
        for name in chosen.models:
            if name not in self.models:
                raise unknown("model", name, self.models)
        if not chosen.models:
            raise CtlensError("no model is chosen: name at least one.")
        (layer,) = select_layers(first.cfg.n_layers, chosen.layer)
        if not 0 <= chosen.head < first.cfg.n_heads:
            raise CtlensError(f"head {chosen.head} does not exist: the model has heads 0 to {first.cfg.n_heads - 1}.")
        if chosen.site not in SHORTHANDS:
            raise unknown_site(chosen.site)
        if chosen.direction not in PATCH_DIRECTIONS:
            raise unknown("direction", chosen.direction, PATCH_DIRECTIONS)
        if chosen.prompt_side not in PROMPT_SIDES:
            raise unknown("prompt side", chosen.prompt_side, PROMPT_SIDES)
        number = chosen.pair % len(self.pairs)
        row = self._encoded(number, chosen.text, chosen.prompt_side)
        length = len(row.wrapped.ids)
        if not -length <= chosen.position < length:
            raise CtlensError(
                f"token {chosen.position} does not exist: the {chosen.prompt_side} prompt has {length} tokens."
            )
        models = tuple(dict.fromkeys(chosen.models))
        counted = replace(chosen, pair=number, models=models, layer=layer, position=chosen.position % length)
        return counted, row

    def _encoded(self, number: int, text: str, prompt_side: str) -> EncodedPair:
        pair = self.pairs[number]
        if text and prompt_side != "wrapped":
            raise CtlensError("an edit is of the wrapped prompt: choose prompt_side='wrapped'.")
        asked = getattr(pair, prompt_side)
        if asked is None:
            raise CtlensError(f"pair {number} has no benign twin: choose another pair or prompt_side='wrapped'.")
        pair = replace(pair, wrapped=asked)
        where = f"pair {number}, {WHAT_IF}" if text else f"pair {number}"
        first = next(iter(self.models.values()))
        with at_work(first), located(where):
            shown = edited_pair(encode_pair(pair, first.tokenizer, ()), text) if text else pair
            row = encode_pair(shown, first.tokenizer, ("shared",))
        refusal = row.alignments["shared"].refusal
        if refusal and prompt_side == "wrapped":  # a benign twin asks for something else
            raise CtlensError(f"{where} does not align ({refusal}): choose another pair or text.")
        for side, rendered in (("clean", row.clean), (prompt_side, row.wrapped)):
            require_room(len(rendered.ids), first.cfg.n_ctx, f"the {side} prompt of {where}")
        return row

    @property
    def pair(self) -> Pair:
        """The pair that is shown, with its edit."""
        return self._row.pair

    @property
    def template(self) -> str:
        """The message of the chosen pair that an edit replaces, with `{request}` where it holds the clean request."""
        return template_of(self._as_given)

    @property
    def _as_given(self) -> EncodedPair:
        """The chosen pair without its edit."""
        chosen = self._selection
        return self._encoded(chosen.pair, "", "wrapped")

    @public
    def edited(self, text: str) -> Pair:
        """The chosen pair with another text in place of the wrapped prompt's message that holds the wrapper.

        Args:
            text: the message; `{request}` in it stands for the clean prompt's last message of the same role.

        Raises:
            CtlensError: it has `{request}`, and the clean prompt no such message.
        """
        return edited_pair(self._as_given, text)

    @public
    def what_if(self, text: str) -> pd.DataFrame:
        """Asks the models the wrapped prompt with another message, and goes on with it in every view.

        Args:
            text: as of `edited`; an empty one takes the edit back.

        Returns:
            The table of `answers`.

        Raises:
            CtlensError: the text has words that the tokenizer does not know, is too long, or does not align with the
                clean prompt; then all stays as it was.
        """
        before = self._selection, self._row
        self.select(text=text)
        try:
            return self.answers()
        except CtlensError:
            self._selection, self._row = before
            raise

    @property
    def tokens(self) -> dict[str, tuple[str, ...]]:
        """The text of every token, by side: `"clean"` and `"wrapped"`."""
        tokenizer = next(iter(self.models.values())).tokenizer
        return {side: token_texts(tokenizer, getattr(self._row, side)) for side in ("clean", "wrapped")}

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """The kind of every token, by side, see `ctlens.data.token_kinds`."""
        clean, wrapped = token_kinds(self._row.clean, self._row.wrapped)
        return {"clean": clean, "wrapped": wrapped}

    @property
    def twins(self) -> dict[int, int]:
        """The aligned tokens: positions in the wrapped prompt, and their twins' in the clean one."""
        alignment = self._row.alignments["shared"]
        return dict(zip(alignment.wrapped, alignment.clean, strict=True))

    def answers(self) -> pd.DataFrame:
        """The answer of each chosen model to the clean and the wrapped prompt, and to what is shown in its place.

        That is an edit, or the benign twin where it is chosen.

        Returns:
            One row per model and prompt: `answer`, its `verdict`, `good_probability` and `bad_probability` as of
            `ctlens.threats.ask`, and `logit_diff`, good minus bad; NaN where a prompt does not name both answers.
        """
        as_given = self.pairs[self._selection.pair]
        prompts = {"clean": as_given.clean, "wrapped": as_given.wrapped}
        if self._selection.prompt_side == "benign":
            prompts["benign"] = self.pair.wrapped
        given = tuple(prompts.values())
        if self._selection.text:
            prompts[WHAT_IF] = self.pair.wrapped
        rows = []
        for label in self._selection.models:
            replies = self._replies(label, given)
            if self._selection.text:
                replies = [*replies, *self._replies(label, (self.pair.wrapped,))]
            for (name, prompt), reply in zip(prompts.items(), replies, strict=True):
                probabilities = reply.good_probability, reply.bad_probability
                rows.append((label, name, reply.answer, reply.verdict, self._margin(label, prompt), *probabilities))
        columns = ["model", "prompt", "answer", "verdict", "logit_diff", "good_probability", "bad_probability"]
        return pd.DataFrame(rows, columns=columns)

    def _replies(self, label: str, prompts: tuple[Prompt, ...]) -> list[Reply]:
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "begin": partial(self._captures.begin, label)}
        return self._captures.once(label, ("replies", prompts), lambda model: replies_to(model, prompts, **options))

    def _margin(self, label: str, prompt: Prompt) -> float:
        if not prompt.good or not prompt.bad:
            return float("nan")
        contrast = self._contrast(prompt)
        logits = self._captures.of(label, contrast.prompt).last
        return float(logits[contrast.good] - logits[contrast.bad])

    def heads(self) -> dict[str, Float[np.ndarray, "layer head"]]:
        """Attention mass on the wrapper from the chosen token, of every head of each chosen model.

        From the last token it is the `mass` of `ct.analysis.attention_diff`.

        Raises:
            CtlensError: the wrapper cannot be told from the content.
        """
        wrapper = list(segments(self._row)["wrapper"])
        if not wrapper:
            raise CtlensError("the wrapper cannot be told from the content here: choose another pair or text.")
        at = self._selection.position
        states = {label: self._wrapped(label).patterns for label in self._selection.models}
        return {label: found[:, :, at, wrapper].float().sum(-1).numpy() for label, found in states.items()}

    def maps(self) -> AttentionMaps:
        """The attention of the chosen head, clean and wrapped, as `ct.analysis.attention_maps` gives it.

        Raises:
            CtlensError: another side than the wrapped one is chosen.
        """
        chosen = self._selection
        if chosen.prompt_side != "wrapped":
            raise CtlensError("the maps are of the clean and the wrapped prompt: choose prompt_side='wrapped'.")
        first = next(iter(self.models.values()))

        def of(states: PromptStates) -> np.ndarray:
            return states.patterns[chosen.layer, chosen.head].float().numpy()

        clean = of(self._captures.of(chosen.models[0], self._row.clean.ids))
        wrapped = np.stack([of(self._wrapped(label)) for label in chosen.models])
        return maps_of_pair(first.tokenizer, self._row, clean, wrapped, chosen.models, chosen.layer, chosen.head)

    def gap(self) -> dict[str, Float[np.ndarray, "layer token"]]:
        """How far the residual stream on the wrapped prompt is from the reference's on the clean one, by aligned token.

        It is `|wrapped - clean| / |clean|` behind every layer, zero where the two differ by rounding alone.

        Raises:
            CtlensError: no token of the chosen side is aligned with the clean prompt.
        """
        twins = self.twins
        if not twins:
            raise CtlensError("no token of this prompt has a twin in the clean one: choose prompt_side='wrapped'.")
        clean = self._captures.of(self._selection.models[0], self._row.clean.ids).stream[:, list(twins.values())]
        clean = clean.float()
        found = {}
        for label in self._selection.models:
            wrapped = self._wrapped(label).stream[:, list(twins)].float()
            found[label] = (beyond_rounding(wrapped - clean, clean).norm(dim=-1) / clean.norm(dim=-1)).numpy()
        return found

    def lens(self) -> dict[str, Lens]:
        """The logit lens of each chosen model at the chosen token of the wrapped prompt.

        At the last token `logit_diff` is that of `ct.analysis.logit_lens`.

        Raises:
            CtlensError: the prompt names no good and bad answer that part.
        """
        contrast = self._contrast(self.pair.wrapped)
        at = self._selection.position
        last = at == len(self._row.wrapped.ids) - 1
        return {label: self._lens(label, contrast, None if last else at) for label in self._selection.models}

    def clean_lens(self) -> Lens | None:
        """The same of the reference at the token's twin in the clean prompt; None where it has no twin."""
        twin = self.twins.get(self._selection.position)
        if twin is None:
            return None
        last = twin == len(self._row.clean.ids) - 1
        return self._lens(self._selection.models[0], self._contrast(self.pair.clean), None if last else twin)

    def _contrast(self, prompt: Prompt) -> Contrast:
        row = self._row
        first = next(iter(self.models.values()))
        rendered = {row.pair.clean: row.clean, row.pair.wrapped: row.wrapped}
        asked = rendered.get(prompt) or self._as_given.wrapped
        return contrast_of(first, prompt, asked, f"the prompt {prompt.turns[-1].content[:40]!r}")

    def _lens(self, label: str, contrast: Contrast, at: int | None = None) -> Lens:
        """The logit lens at a position, by default where the answers part."""
        at = len(contrast.prompt) - 1 if at is None else at

        def read(model: LensModel) -> Lens:
            parameter = next(model.parameters())
            stream = self._captures.of(label, contrast.prompt).stream[:, at].to(parameter)
            logits = read_out(model, stream).float().cpu()
            likeliest = model.tokenizer.batch_decode(logits.argmax(-1)[:, None])
            return Lens((logits[:, contrast.good] - logits[:, contrast.bad]).numpy(), tuple(likeliest))

        return self._captures.once(label, ("lens", contrast, at), read)

    def _wrapped(self, label: str) -> PromptStates:
        return self._captures.of(label, self._row.wrapped.ids)

    def patched(self) -> dict[str, OnePatch]:
        """Patches the chosen site, layer, head and token in each chosen model, as `ct.patch_one` does.

        Raises:
            CtlensError: the token has no twin in the clean prompt, or as `ct.patch_one`.
        """
        chosen = self._selection
        aligned = list(self.twins)
        if chosen.position not in aligned:
            raise CtlensError("the chosen token has no twin in the clean prompt to be patched with: choose another.")
        options: dict[str, Any] = {"head": chosen.head if chosen.site in WITH_HEADS else None}
        options |= {"position": aligned.index(chosen.position), "direction": chosen.direction}
        known = ("patch", self.pair.clean, self.pair.wrapped, self.pair.shared, chosen.site, chosen.layer)
        return {
            label: self._captures.once(
                label,
                (*known, *options.values()),
                lambda model: patch_one(model, self.pair, chosen.site, chosen.layer, **options),
            )
            for label in chosen.models
        }
