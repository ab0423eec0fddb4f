"""What a patching sweep costs: TransformerLens's own against `ctlens.analysis.patch`, the same sites, the same numbers.

Run `python benchmarks/patching.py`, or with `--quick` a part of it, with fewer of TransformerLens's positions and
of the deep model's layers, to look at alone. A sweep is resid_pre, mlp_out and every head's z, at every layer
and position, of random prompts. Both are timed in turn, in one process on one thread, without
gradients, by the processor's time, which other work on the machine disturbs less; the table is
printed and kept in `patching.csv`. TransformerLens gives the mean over the pairs of a batch, ctlens
every pair's value; both are compared on all sites that both computed. `from_token` is where the two
prompts of a pair begin to differ: from the first token, so that every patch is computed, or from the
middle, so that ctlens takes half of them as they are. Where a setting says so, TransformerLens is
timed at some positions, and both at some layers, and the times are scaled by their number. `floor` is
the ratio that fewer products alone would give, were both as fast per product; what lies above it is overhead that
TransformerLens has and ctlens has not. `share` is the part of this machine's own throughput, of one plain matrix
product measured beside it, that the sweep's needed products reach, and `transformer_lens_share` that of
TransformerLens's sweep. Both are given where every patch is computed. `path` is
the way that ctlens went: `suffix`, the fast one; `hooks`, the general one, which it takes for models it does not
know; `gradient`, `attribution_patch`, whose `largest_difference` is that of an approximation.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformer_lens import HookedTransformer, HookedTransformerConfig, patching
from transformers import PreTrainedTokenizerFast

import ctlens as ct
from ctlens.core.config import generator
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.models.hooks import SHORTHANDS, run_capturing

VOCABULARY = 512
SITES = ("resid_pre", "mlp_out", "z")
COLUMNS = (
    "model",
    "pairs",
    "from_token",
    "patches",
    "transformer_lens_s",
    "ctlens_s",
    "ratio",
    "floor",
    "share",
    "transformer_lens_share",
    "largest_difference",
    "path",
)


@dataclass(frozen=True)
class Setting:
    """One setting: sizes, rounds, and which layers and positions are timed.

    Attributes:
        kind: `"llama"`, as ctlens builds them, or `"gpt2"`.
        layers: timed in both; their mean depth is that of all, as the cost of a patch falls with its depth.
        stride: TransformerLens is timed at every so many positions.
        others: ways beside the fast one.
    """

    kind: str
    n_layers: int
    d_model: int
    n_heads: int
    length: int
    pairs: int
    rounds: int
    layers: tuple[int, ...] = (0, 1, 2, 3)
    stride: int = 1
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The model in words."""
        return f"{self.kind}-like, {self.n_layers} layers, d_model {self.d_model}, {self.length} tokens"


SETTINGS = (
    Setting("gpt2", 4, 128, 4, 32, 1, 3, others=("hooks", "gradient")),
    Setting("llama", 4, 128, 4, 32, 1, 3),
    Setting("gpt2", 4, 128, 4, 32, 16, 2, stride=4, others=("hooks", "gradient")),
    Setting("llama", 4, 128, 4, 32, 16, 2, stride=4),
    Setting("gpt2", 12, 256, 8, 64, 8, 1, (0, 4, 7, 11), stride=32),
)


def quick(setting: Setting) -> Setting:
    """The setting with fewer places; the mean depth of its layers stays."""
    if setting.n_layers == len(setting.layers):
        stride, rounds = (8, 3) if setting.pairs == 1 else (16, 1)
        return replace(setting, stride=stride, rounds=rounds, others=())
    middle = setting.n_layers // 2
    return replace(setting, layers=(middle - 1, middle), stride=setting.length, rounds=1)


@dataclass(frozen=True)
class Products:
    """The floating-point operations of the matrix products that patches need, of one pair each.

    Attributes:
        setting: the model, the prompts and the sites.
    """

    setting: Setting

    @property
    def heads(self) -> float:
        """One row through one of the four matrices of attention."""
        return 2 * self.setting.d_model**2

    @property
    def mlp(self) -> float:
        """One row through the MLP, four times as wide as the stream; a gated one has three matrices."""
        return (12 if self.setting.kind == "llama" else 8) * self.setting.d_model**2 * 2

    def scores(self, rows: int) -> float:
        """The scores of rows with every key, and their products with the values."""
        return 4 * rows * self.setting.length * self.setting.d_model

    @property
    def logits(self) -> float:
        """One row's logits."""
        return 2 * self.setting.d_model * VOCABULARY

    def whole(self) -> float:
        """All of a run, as TransformerLens computes it for every patch."""
        block = self.setting.length * (4 * self.heads + self.mlp) + self.scores(self.setting.length)
        return self.setting.n_layers * block + self.setting.length * self.logits

    def suffix(self, start: int, rows: int) -> float:
        """What one changed row in front of layer `start` changes, as ctlens computes it, if `rows` are behind it."""
        final = self.setting.n_layers - 1
        if start > final:
            return self.logits
        last = 2 * self.heads + self.mlp + self.scores(1) + self.logits  # of the last row
        if start == final:
            return 2 * self.heads + last
        first = 3 * self.heads + rows * (self.heads + self.mlp) + self.scores(rows)
        middle = rows * (4 * self.heads + self.mlp) + self.scores(rows)
        return first + (final - start - 1) * middle + rows * 2 * self.heads + last

    def sweep(self) -> tuple[float, float]:
        """Those of one pair's whole sweep: TransformerLens's, and ctlens's."""
        theirs = 0.0
        needed = 0.0
        for layer, rows in itertools.product(range(self.setting.n_layers), range(1, self.setting.length + 1)):
            theirs += self.whole() * (2 + self.setting.n_heads)
            needed += self.suffix(layer, rows)
            needed += self.suffix(layer + 1, rows) * (1 + self.setting.n_heads)  # mlp_out, and every head
            needed += (self.heads + self.mlp) * self.setting.n_heads  # the row behind the block, of every head
        return theirs, needed


def throughput(setting: Setting) -> float:
    """Floating-point operations per second of one plain product, as large as a batch's product into the MLP."""
    rows = torch.randn(1024, setting.d_model)
    weight = torch.randn(setting.d_model, 4 * setting.d_model)
    repeats = 50
    seconds, _ = timed(lambda: [torch.mm(rows, weight) for _ in range(repeats)])
    return repeats * 2 * rows.shape[0] * weight.numel() / seconds


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of numbered words; the last token stands for words that it does not know."""
    known = {str(number): number for number in range(VOCABULARY - 1)}
    core = Tokenizer(models.WordLevel({**known, "?": VOCABULARY - 1}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=core)


def numbered(ids: list[int]) -> Prompt:
    """A prompt of numbered words."""
    return prompt(" ".join(map(str, ids)), "1", "2")


def make(setting: Setting, device: torch.device | str = "cpu") -> tuple[LensModel, list[Pair]]:
    """A random model on a device, and pairs of random prompts that differ from the first token on."""
    draw = generator(0, "patching benchmark")
    ids = torch.randint(VOCABULARY - 1, (setting.pairs, 2, setting.length), generator=draw).tolist()
    pairs = [Pair(numbered(clean), numbered(wrapped)) for clean, wrapped in ids]
    sizes: Any = {"n_layers": setting.n_layers, "n_heads": setting.n_heads, "d_model": setting.d_model}
    sizes |= {"d_vocab": VOCABULARY, "d_mlp": 4 * setting.d_model, "n_ctx": setting.length}
    if setting.kind == "llama":
        return ct.build(ct.ModelConfig(**sizes), words(), device=device), pairs
    rest: Any = {"d_head": setting.d_model // setting.n_heads, "act_fn": "gelu_new", "normalization_type": "LN"}
    model: Any = HookedTransformer(HookedTransformerConfig(**sizes, **rest, seed=0, device=str(device))).eval()
    model.tokenizer = words()
    return model, pairs


def tokens(pairs: list[Pair], side: str) -> torch.Tensor:
    """One side of the pairs."""
    return torch.tensor([[int(word) for word in getattr(pair, side).turns[0].content.split()] for pair in pairs])


def theirs(model: LensModel, pairs: list[Pair], setting: Setting) -> dict[str, np.ndarray]:
    """TransformerLens's sweep, on some layers and positions, `[patch]` by site."""
    device = next(model.parameters()).device
    clean = tokens(pairs, "clean").to(device)
    wrapped = tokens(pairs, "wrapped").to(device)
    names = [SHORTHANDS[site].format(layer=layer) for site in SITES for layer in range(setting.n_layers)]
    cache: Any = run_capturing(model, clean, names, grad=False)[1]
    found = {}
    for site in SITES:
        setter = patching.layer_pos_head_vector_patch_setter if site == "z" else patching.layer_pos_patch_setter
        index = pd.DataFrame(list(sampled(setting, site)), columns=["layer", "pos", "head"][: 3 if site == "z" else 2])
        # Without its progress bars, one per site.
        with mock.patch("transformer_lens.patching.tqdm", list):
            values: Any = patching.generic_activation_patch(
                model=model,  # type: ignore[arg-type]
                corrupted_tokens=wrapped,
                clean_cache=cache,
                patching_metric=lambda logits: (logits[:, -1, 1] - logits[:, -1, 2]).mean(),
                patch_setter=setter,
                activation_name=site,
                index_df=index,
            )
        found[site] = values.cpu().numpy()
    return found


def sampled(setting: Setting, site: str) -> list[tuple[int, ...]]:
    """Layers, positions and heads at which TransformerLens is timed."""
    places = range(0, setting.length, setting.stride)
    return list(itertools.product(setting.layers, places, *([range(setting.n_heads)] if site == "z" else [])))


def ours(model: LensModel, pairs: list[Pair], setting: Setting, way: str = "suffix") -> dict[str, Any]:
    """The sweep of ctlens, every position and head, one of three ways."""
    options: Any = {"direction": "denoising", "window": "position", "layers": setting.layers, "progress": False}
    if way == "gradient":
        return ct.analysis.attribution_patch(model, pairs, site=SITES, **options)
    known = mock.patch("ctlens.analysis.patching.sweep.read_blocks", lambda *parts: None)
    with known if way == "hooks" else contextlib.nullcontext():
        return ct.analysis.patch(model, pairs, site=SITES, **options)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it gave."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def largest_difference(setting: Setting, expected: dict[str, np.ndarray], found: dict[str, Any]) -> float:
    """Between both, over the sites that TransformerLens was timed on; the mean over pairs is what it gives."""
    worst = 0.0
    for site, values in expected.items():
        axes = found[site].values[0].mean(-1)
        axes = axes.swapaxes(1, 2) if site == "z" else axes
        mine = [axes[setting.layers.index(layer), *rest] for layer, *rest in sampled(setting, site)]
        worst = max(worst, float(np.abs(np.array(mine) - values).max()))
    return worst


def rows(setting: Setting, short: bool) -> list[tuple[object, ...]]:
    """The lines of one setting: prompts that differ from the first token on, and if not `short` from the middle on."""
    model, random_pairs = make(setting)
    per_place = sum(setting.n_heads if site == "z" else 1 for site in SITES)
    patches = setting.n_layers * setting.length * per_place
    scale = patches / sum(len(sampled(setting, site)) for site in SITES)
    lines = []
    prompt_sides = [("first", random_pairs, "suffix")]
    if not short:
        prompt_sides.append(("middle", halves(random_pairs), "suffix"))
    prompt_sides += [("first", random_pairs, way) for way in setting.others]
    theirs_needed, needed = Products(setting).sweep()
    for start, pairs, way in prompt_sides:
        times = []
        gaps = []
        path = ""
        for _ in range(setting.rounds):
            slow, expected = timed(lambda pairs=pairs: theirs(model, pairs, setting))
            fast, found = timed(lambda pairs=pairs, way=way: ours(model, pairs, setting, way))
            times.append((slow * scale, fast * setting.n_layers / len(setting.layers), throughput(setting)))
            gaps.append(largest_difference(setting, expected, found))
            path = found["z"].path
        slow = statistics.median(a for a, _, _ in times)
        fast = statistics.median(b for _, b, _ in times)
        ratio = statistics.median(a / b for a, b, _ in times)
        limits = [math.nan, math.nan, math.nan]
        if start == "first" and way == "suffix":
            share = statistics.median(needed * setting.pairs / (b * plain) for _, b, plain in times)
            others = statistics.median(theirs_needed * setting.pairs / (a * plain) for a, _, plain in times)
            limits = [theirs_needed / needed, share, others]
        lines.append((setting.name, setting.pairs, start, patches, slow, fast, ratio, *limits, max(gaps), path))
        tqdm.write(str(lines[-1]))
    return lines


def halves(pairs: list[Pair]) -> list[Pair]:
    """The same wrapped prompts, with clean prompts that differ from them in the second half only."""
    found = []
    for pair in pairs:
        clean = pair.clean.turns[0].content.split()
        wrapped = pair.wrapped.turns[0].content.split()
        middle = len(clean) // 2
        found.append(Pair(prompt(" ".join(wrapped[:middle] + clean[middle:]), "1", "2"), pair.wrapped))
    return found


def main() -> None:
    """Times every setting."""
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--quick", action="store_true", help="fewer places, to look at; nothing is kept")
    given = asked.parse_args()
    torch.set_num_threads(1)
    settings = [quick(setting) for setting in SETTINGS] if given.quick else SETTINGS
    with torch.no_grad():
        lines = [line for setting in tqdm(settings, desc="settings") for line in rows(setting, given.quick)]
    table = pd.DataFrame(lines, columns=list(COLUMNS))
    if not given.quick:
        table.to_csv(Path(__file__).with_suffix(".csv"), index=False, float_format="%.4g")
    tqdm.write(table.to_string(index=False))


if __name__ == "__main__":
    main()
