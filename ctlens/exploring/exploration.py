"""One pair, its models and what they do with it, by hand: in a notebook a panel, in a program an object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ctlens.core.errors import CtlensError
from ctlens.core.public import public
from ctlens.core.types import LensModel
from ctlens.data.inputs import Pairs
from ctlens.exploring.page import write_page
from ctlens.exploring.panel import show_panel
from ctlens.exploring.views import ExplorationViews
from ctlens.training.run import Run
from ctlens.training.trainer import method_name

Explorable: TypeAlias = LensModel | Run
"""A model, or a run, whose model is meant."""


class Exploration(ExplorationViews):
    """Exploration holds models and pairs, what is chosen of them, and its views; a notebook displays it as a panel.

    `select` chooses; `figure` and `code` are those of a view of `ctlens.exploring.VIEWS`: the tokens, the attention to
    the wrapper of every head, the maps of one head, the residual gap by layer and token, the logit lens, the answers,
    and one patch. Activations are kept by model and prompt, so that another layer, head or token costs no pass.
    """

    @public
    def save(self, path: str | Path) -> Path:
        """Writes what is chosen as one page that opens without a network, each figure with its call.

        A view that has nothing to show says why.

        Args:
            path: of the page, `.html`.

        Raises:
            CtlensError: the name ends otherwise.
        """
        if Path(path).suffix not in (".html", ".htm"):
            raise CtlensError(f"an exploration is saved as a page, and {path} is none by its name: name it .html.")
        return write_page(self, Path(path))

    def __repr__(self) -> str:
        chosen = self.selection
        return (
            f"Exploration(models: {', '.join(chosen.models)}, pairs: {len(self.pairs)}, chosen: pair {chosen.pair}, "
            f"layer {chosen.layer}, head {chosen.head}, position {chosen.position})"
        )

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """What a notebook displays: the panel."""
        return show_panel(self)._repr_mimebundle_(**options)


@public
def explore(
    models: Explorable | Mapping[str, Explorable] | Sequence[Run], pairs: Pairs, *, max_new_tokens: int = 8
) -> Exploration:
    """Opens one pair and what models do with it: end a notebook's cell with it for the panel.

    >>> import ctlens as ct
    >>> pairs = ct.threats.get("sycophancy").pairs(8, split="heldout")
    >>> explored = ct.explore({"base": ct.load_organism()}, pairs).select(pair=2, layer=1, head=3)
    >>> explored.answers()[["prompt", "verdict"]].values.tolist()
    [['clean', 'good'], ['wrapped', 'bad']]
    >>> explored.what_if("{request}").iloc[-1]["verdict"]  # without the wrapper
    'good'
    >>> print(explored.code("attention"))
    explored = ct.explore(models, pairs).select(pair=2, text='{request}', layer=1, head=3)
    explored.figure('attention')

    Args:
        models: one, or several of one shape by their labels, in eval mode; runs stand for their models, and in a list
            are called by their method. The first one is the reference, usually the base.
        pairs: clean and wrapped prompts, for most views with good and bad answers. `ctlens.pairs` makes them of lists
            of texts.
        max_new_tokens: length of the longest answer, in tokens.

    Raises:
        CtlensError: there is no model or no pair, the models do not compare, or the first pair does not align.
    """
    return Exploration(_named(models), pairs, max_new_tokens)


def _named(models: Explorable | Mapping[str, Explorable] | Sequence[Run]) -> dict[str, LensModel]:
    if isinstance(models, Mapping):
        return {name: _model(model) for name, model in models.items()}
    if not isinstance(models, Sequence):
        return {method_name(models.losses) if isinstance(models, Run) else "model": _model(models)}
    named = {method_name(run.losses): run.model for run in models}
    if len(named) < len(models):
        raise CtlensError("two runs have one method: give the runs by labels, {'first': run, 'second': other}.")
    return named


def _model(given: Explorable) -> LensModel:
    return given.model if isinstance(given, Run) else given
