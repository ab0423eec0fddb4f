"""The last logits of a batch from a model whose weights change in one block at a time.

Below the block nothing changes, so the stream in front of every block is recorded once, and only the block and those
above it run: half of a pass on average, and without the unembedding of all tokens but the last.
"""

from __future__ import annotations

import torch

from ctlens.analysis.base.contrast import ContrastBatch
from ctlens.analysis.base.metrics import LastLogits
from ctlens.analysis.patching.blocks import read_block, read_blocks, read_unembedding
from ctlens.core.types import LensModel
from ctlens.models.hooks import resolve, run, run_capturing

_TOLERANCE = 1e-4  # between float32 numbers computed in two orders; chosen by eye
_MOST_HELD = 1 << 28
"""The numbers of the streams that are recorded at most (1 GiB in float32); beyond them every pass is a whole one."""


class SwappedModel:
    """A model that answers a batch again and again while its weights change, in one block or anywhere.

    Args:
        model: in eval mode, with the weights between which changes are made.
        batch: what it reads.
    """

    def __init__(self, model: LensModel, batch: ContrastBatch) -> None:
        self.model = model
        self.batch = batch
        tokens = batch.side.tokens
        self.length = tokens.shape[1]
        held = tokens.numel() * model.cfg.d_model * model.cfg.n_layers
        self.blocks = read_blocks(model, self.length) if held <= _MOST_HELD else None
        names = resolve(model, "resid_pre") if self.blocks else []
        logits, found = run_capturing(model, tokens, names, grad=False)
        self.plain: LastLogits = batch.at_last(logits)
        self.streams = [found[name] for name in names]
        if self.blocks:
            self.read_out = read_unembedding(model)
            self.hidden = torch.full((self.length, self.length), -torch.inf, device=tokens.device).triu(1)
            if not torch.allclose(self.changed_in(0), self.plain, atol=_TOLERANCE, rtol=_TOLERANCE):
                self.blocks = None

    @torch.no_grad()
    def changed_in(self, block: int | None) -> LastLogits:
        """The last logits with today's weights, of which at most those of one block are others than at the beginning.

        Args:
            block: its number; None where others may have changed too.
        """
        if block is None or self.blocks is None:
            return self.batch.at_last(run(self.model, self.batch.side.tokens, self.batch.side.needed_mask))
        x = self.streams[block].clone()  # blocks add to it in place
        for each in (read_block(self.model, block, self.length), *self.blocks[block + 1 :]):
            q, kv = each.queries_and_keys(each.ln1(x), slice(self.length))
            x = each.finish(x, each.attend(q, kv, self.hidden))
        return self.read_out(self.batch.at_last(x))
