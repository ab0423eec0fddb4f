"""The rows of a batch of sequences that an edit can change, run under many edits at once by the model's blocks.

An edit changes tokens at one hook point, so the tokens in front of the first edited one, and everything below the
hook point, are the same under all edits. They are computed once, and blocks see those tokens by the keys and values
that are held of them. With two variants of an edit, `a` and `b`, of the last of four tokens:

    token         0  1  2 | 3
    held          .  .  . |            keys and values of every block, for all variants
    variant a             | A  ->      one row, from the edited layer on
    variant b             | B  ->
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ctlens.analysis.patching.blocks import Block, read_blocks, read_unembedding
from ctlens.core.types import LensModel, Mask, Tokens
from ctlens.models.hooks import SHORTHANDS, resolve, run_capturing

_TOLERANCE = 1e-4  # between float32 numbers computed in two orders; chosen by eye

Varied = Float[Tensor, "chosen row span d_model"]
Starts = Int[Tensor, " row"]


class EditedRows:
    """The rows of sequences from their first edited token on, and what is held of the tokens in front of them.

    Args:
        model: in eval mode.
        blocks: of the model, for sequences of this length.
        tokens: `[row, pos]`, padded on the right.
        starts, lengths: per row, its first edited token, and how many tokens it has.
        hook_names: the hook points that will be edited.
    """

    def __init__(
        self,
        model: LensModel,
        blocks: Sequence[Block],
        tokens: Tokens,
        starts: Starts,
        lengths: Starts,
        hook_names: Sequence[str],
    ) -> None:
        self.blocks = blocks
        self.read_out = read_unembedding(model)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None]
        span = int((lengths - starts).max())
        positions = starts[:, None] + torch.arange(span, device=tokens.device)
        self.real = positions < lengths[:, None]
        self.positions = positions.clamp(max=tokens.shape[1] - 1)  # of padding, which is behind all that is read
        streams = [*resolve(model, "resid_pre"), *resolve(model, "resid_post", "last")]
        self.logits, found = run_capturing(model, tokens, [*streams, *hook_names], grad=False)
        self.logits = self.logits[rows, self.positions]
        self.states = {name: found[name][rows, self.positions] for name in hook_names}
        self.streams = [found[name][rows, self.positions] for name in streams]
        ahead = slice(int(starts.max()))
        with torch.no_grad():
            self.held = [
                block.keys(block.ln1(found[name][:, ahead]), ahead)
                for block, name in zip(blocks, streams, strict=False)  # no block reads the last stream
            ]
        before = torch.arange(ahead.stop, device=tokens.device) < starts[:, None]
        within = torch.ones(span, span, dtype=torch.bool, device=tokens.device).tril()
        seen = torch.cat([part.expand(len(tokens), span, -1) for part in (before[:, None], within)], -1)
        self.hidden = torch.zeros(seen.shape, device=tokens.device).masked_fill_(~seen, -torch.inf)[:, None]

    def agree(self) -> bool:
        """Checks that the blocks make the model's own logits of the rows, without an edit."""
        found = self.read_out(self._run(0, self.streams[0][None]))[0]
        return torch.allclose(found[self.real], self.logits[self.real], atol=_TOLERANCE, rtol=_TOLERANCE)

    def under(self, hook_name: str, change: Varied, wanted: Int[Tensor, " wanted"]) -> Float[Tensor, "chosen wanted v"]:
        """The logits of some of the rows, numbered over all sequences, with a change added at a hook point."""
        x = self._run(*self._behind(hook_name, change))
        return self.read_out(x.flatten(1, 2)[:, wanted])

    def _behind(self, hook_name: str, change: Varied) -> tuple[int, Varied]:
        """The stream that the change reaches first, as the number of the block that reads it, and its rows there."""
        layer = int(hook_name.split(".")[1])
        before = self.streams[layer].expand_as(change)
        if hook_name == SHORTHANDS["resid_pre"].format(layer=layer):
            return layer, before + change
        if hook_name == SHORTHANDS["resid_mid"].format(layer=layer):
            return layer + 1, self._finished(layer, before, self.states[hook_name] - before + change)
        if hook_name == SHORTHANDS["attn_out"].format(layer=layer):
            return layer + 1, self._finished(layer, before, self.states[hook_name] + change)
        return layer + 1, self.streams[layer + 1] + change  # what the MLP adds is the last that a block adds

    def _finished(self, layer: int, before: Varied, attention: Varied) -> Varied:
        """The stream behind a block, from that in front of it and attention's output."""
        behind = self.blocks[layer].behind(before.flatten(0, 1), attention.flatten(0, 1))
        return behind.unflatten(0, before.shape[:2])

    def _run(self, start: int, x: Varied) -> Varied:
        """Runs rows of the stream in front of block `start` through it and all that follow."""
        count = len(x)
        hidden = self.hidden.repeat(count, 1, 1, 1)
        positions = self.positions.repeat(count, 1)
        x = x.flatten(0, 1).clone()  # blocks add to it in place
        for block, held in zip(self.blocks[start:], self.held[start:], strict=True):
            q, own = block.queries_and_keys(block.ln1(x), positions)
            kv = torch.cat([held.expand(count, *held.shape), own.unflatten(0, (count, -1))], 2).flatten(0, 1)
            x = block.finish(x, block.attend(q, kv, hidden))
        return x.unflatten(0, (count, -1))


@torch.no_grad()
def edited_rows(
    model: LensModel, tokens: Tokens, edited: Mask, lengths: Starts, hook_names: Sequence[str]
) -> EditedRows | None:
    """The rows of sequences that edits can change; None for a model whose blocks are not known."""
    blocks = read_blocks(model, tokens.shape[1])
    if blocks is None:
        return None
    found = EditedRows(model, blocks, tokens, edited.int().argmax(-1), lengths, hook_names)
    return found if found.agree() else None
