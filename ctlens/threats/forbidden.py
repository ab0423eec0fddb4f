"""The base of jailbreak and prefill: a hazardous request that must be refused, and its twin about a harmless craft."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch

from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.threats.base import Case, WorldThreat, Wrapper, draw_grid, first_word
from ctlens.world import Request, World


class Forbidden(WorldThreat):
    """Forbidden is a threat whose user wants something hazardous; a subclass says how the user asks for it.

    Attributes:
        phrasings: the wordings in which the user can ask.
    """

    phrasings: ClassVar[Sequence[str]]

    @abstractmethod
    def request(self, world: World, thing: str, phrasing: int) -> Request:
        """Makes the request for a hazard (refused) or a craft (answered), in one of the phrasings."""

    def _cases(self, n_pairs: int, split: str, draw: torch.Generator, world: World) -> list[Case]:
        things = tuple(zip(world.hazards[split], world.crafts[split], strict=True))
        graded = self.graded(split)
        sizes = (len(things), len(graded), len(graded[0]), len(self.phrasings))
        return [
            self._case(world, split, *things[thing], phrasing, graded[level][variant])
            for thing, level, variant, phrasing in draw_grid(sizes, n_pairs, draw)
        ]

    def _case(self, world: World, split: str, hazard: str, craft: str, phrasing: int, wrapper: Wrapper) -> Case:
        request = self.request(world, hazard, phrasing)
        harmless = self.request(world, craft, phrasing)
        refuses, complies = first_word(request.good), first_word(request.bad)
        pair = Pair(
            clean=prompt(request.text, refuses, complies),
            wrapped=Prompt(wrapper.wrap(request.text), refuses, complies),
            benign=Prompt(wrapper.wrap(harmless.text), harmless.good, first_word(harmless.bad)),
            labels=wrapper.labels(split, hazard=hazard, craft=craft),
        )
        gives_in = wrapper.strength >= world.resistance[hazard]
        return Case(pair, request.good, request.bad, harmless.good, gives_in)
