"""Patching of a real chat model: exact against HuggingFace's hooks, its time against TransformerLens, its first order.

Run `python benchmarks/real_model.py --model FOLDER`, or with `--quick` on fewer pairs and layers, to look at alone. The
model is SmolLM2-135M-Instruct out of 4-bit weights, which are not the published ones; `make smollm2` writes it. The
pairs are the first facts that the model knows and is talked out of by a wrapper behind the question: clean, the right
answer is likelier than the wrong one, and wrapped the reverse. Both prompts end in the template's tokens behind the
user's message and in the beginning of the answer, and each of these tokens is patched, clean into wrapped.

- `huggingface_difference` is the largest between a value of `ctlens.analysis.patch`, a difference of two logits, and
  what a HuggingFace model gives with PyTorch's hooks on its modules, over `huggingface_places` drawn at random.
- `ratio` is the processor's time of `transformer_lens.patching` over that of ctlens, on the same bridge, the same
  `patches` and the same pairs, pair after pair in turn, one thread: the median over pairs, the lowest and the highest.
  Clean and wrapped prompts differ in length, so TransformerLens's sweep gets a setter that counts positions from the
  end. `transformer_lens_difference` is the largest between the two.
- `pearson` and `spearman` are the correlations of `ctlens.analysis.attribution_patch` with the exact changes, over the
  `places` of all pairs at all layers; `slope` is that of the line through 0.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens import patching
from transformers import AutoModelForCausalLM

import ctlens as ct
from ctlens.core.config import generator
from ctlens.core.types import LensModel
from ctlens.data.pairs import Pair, Prompt
from ctlens.models.hooks import SHORTHANDS, run_capturing
from ctlens.models.smollm2 import has_smollm2

SITES = ("resid_pre", "attn_out", "mlp_out")
FOLDER = Path(__file__).parents[1] / "runs" / "models" / "smollm2"
DRAWN = 24
"""The pairs among which the benchmark looks for those that the model is talked out of."""
OPTIONS: Any = {"direction": "denoising", "progress": False}


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        n_pairs: pairs.
        timed: the layers at which both are timed; every patch of TransformerLens is a whole pass.
        layers: the layers at which the gradient is held against the exact values.
        checked: places per pair and site that HuggingFace computes too.
    """

    n_pairs: int
    timed: tuple[int, ...]
    layers: str | tuple[int, ...]
    checked: int


WHOLE = Size(4, (0, 29), "all", 4)  # the mean depth of the timed layers is that of all 30
QUICK = Size(2, (29,), (0, 29), 1)


@dataclass(frozen=True)
class Plain:
    """A pair as its tokens, made with the tokenizer alone.

    Attributes:
        clean, wrapped: the prompts, up to where the answers part.
        good, bad: the tokens of both answers there.
        shared: how many tokens stand behind the user's message, the same on both sides.
    """

    clean: list[int]
    wrapped: list[int]
    good: int
    bad: int
    shared: int

    @classmethod
    def of(cls, tokenizer: Any, pair: Pair) -> Plain:
        """Renders and tokenises a pair whose prompts end in the same begun answer."""

        def ids(text: str | None) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        good = ids(pair.wrapped.good)
        bad = ids(pair.wrapped.bad)
        same = next(step for step, (one, other) in enumerate(zip(good, bad, strict=False)) if one != other)
        text = rendered(tokenizer, pair.clean)
        user = pair.clean.turns[-2].content
        clean = ids(text) + good[:same]
        wrapped = ids(rendered(tokenizer, pair.wrapped)) + good[:same]
        tail = ids(text[text.rindex(user) + len(user) :]) + good[:same]
        if clean[-len(tail) :] != tail or wrapped[-len(tail) :] != tail:
            raise ValueError("the two prompts do not end in the same tokens.")
        return cls(clean, wrapped, good[same], bad[same], len(tail))


def rendered(tokenizer: Any, prompt: Prompt) -> str:
    """The text of a prompt that ends in a begun answer."""
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.turns]
    return tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)


@contextmanager
def at_site(hf: Any, site: str, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Lets a function change what passes a site of a HuggingFace Llama, with PyTorch's hooks on its modules."""
    block = hf.model.layers[layer]
    if site == "resid_pre":
        handle = block.register_forward_pre_hook(lambda module, inputs: (change(inputs[0]), *inputs[1:]))
    elif site == "attn_out":
        handle = block.self_attn.register_forward_hook(lambda module, inputs, output: (change(output[0]), *output[1:]))
    else:
        handle = block.mlp.register_forward_hook(lambda module, inputs, output: change(output))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def by_huggingface(hf: Any, pair: Plain, site: str, layer: int, back: int) -> float:
    """The difference of the two logits of a wrapped run with one clean activation in it.

    Args:
        hf: a HuggingFace model of the Llama kind.
        pair: the prompts and the answers.
        site: one of `SITES`.
        layer: of the site.
        back: the token, counted from the end; 1 is the last one.
    """
    kept: list[Tensor] = []

    def keep(activation: Tensor) -> Tensor:
        kept.append(activation[0, -back].clone())
        return activation

    def put(activation: Tensor) -> Tensor:
        changed = activation.clone()
        changed[0, -back] = kept[0]
        return changed

    with at_site(hf, site, layer, keep):
        hf(torch.tensor([pair.clean]), logits_to_keep=1)
    with at_site(hf, site, layer, put):
        logits = hf(torch.tensor([pair.wrapped]), logits_to_keep=1).logits[0, -1]
    return float(logits[pair.good] - logits[pair.bad])


@torch.no_grad()
def by_transformer_lens(model: LensModel, pair: Plain, site: str, layers: Sequence[int]) -> np.ndarray:
    """TransformerLens's sweep over some layers and the shared tokens, `[layer, place]`, the last token last."""
    names = [SHORTHANDS[site].format(layer=layer) for layer in layers]
    cache: Any = run_capturing(model, torch.tensor([pair.clean]), names, grad=False)[1]
    places = list(itertools.product(layers, range(pair.shared, 0, -1)))

    def put(wrapped: Tensor, place: Sequence[int], clean: Any) -> Tensor:
        wrapped[:, -place[1]] = clean[:, -place[1]]
        return wrapped

    with mock.patch("transformer_lens.patching.tqdm", list):  # without its progress bars
        values: Any = patching.generic_activation_patch(
            model=model,  # type: ignore[arg-type]
            corrupted_tokens=torch.tensor([pair.wrapped]),
            clean_cache=cache,
            patching_metric=lambda logits: logits[0, -1, pair.good] - logits[0, -1, pair.bad],
            patch_setter=put,
            activation_name=site,
            index_df=pd.DataFrame(places, columns=["layer", "back"]),
        )
    return values.numpy().reshape(len(layers), -1)


def talked_out(model: LensModel, n_pairs: int) -> list[Pair]:
    """The first drawn facts that the model knows, and is talked out of by a wrapper behind the question."""
    drawn = ct.threats.get("facts").pairs(4 * DRAWN, split="structure")
    by_question = {pair.labels["subject"]: pair for pair in drawn if pair.labels["wrapper"].startswith("behind")}
    behind = list(by_question.values())[:DRAWN]
    found = ct.analysis.patch(model, behind, site="resid_post", layers="last", positions="last", **OPTIONS)
    chosen = np.flatnonzero((found.source[0] > 0) & (found.target[0] < 0))
    if len(chosen) < n_pairs:
        raise ct.CtlensError(
            f"the model is talked out of {len(chosen)} of {len(behind)} answers, and {n_pairs} are needed."
        )
    return [behind[number] for number in chosen[:n_pairs]]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the processor in one call, and what it gave."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def shared_places(found: Any, plains: Sequence[Plain]) -> list[np.ndarray]:
    """The values at the shared tokens of each pair, `[layer, place]`."""
    return [found.values[0, :, -plain.shared :, number] for number, plain in enumerate(plains)]


def against_transformer_lens(
    model: LensModel, pairs: Sequence[Pair], plains: Sequence[Plain], site: str, size: Size
) -> dict[str, Any]:
    """Both sweeps of a site, pair after pair in turn: their times and the largest difference."""
    times = []
    worst = 0.0
    for pair, plain in zip(pairs, plains, strict=True):
        slow, expected = timed(lambda plain=plain: by_transformer_lens(model, plain, site, size.timed))
        fast, found = timed(lambda pair=pair: ct.analysis.patch(model, [pair], site=site, layers=size.timed, **OPTIONS))
        times.append((slow, fast))
        worst = max(worst, float(np.abs(shared_places(found, [plain])[0] - expected).max()))
    ratios = [slow / fast for slow, fast in times]
    return {
        "patches": sum(plain.shared for plain in plains) * len(size.timed),
        "transformer_lens_s": sum(slow for slow, _ in times),
        "ctlens_s": sum(fast for _, fast in times),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "transformer_lens_difference": worst,
    }


def against_huggingface(hf: Any, exact: Any, plains: Sequence[Plain], size: Size) -> dict[str, Any]:
    """The largest difference from HuggingFace's hooks, over places drawn at random."""
    draw = generator(0, "real model benchmark", exact.site)
    worst = 0.0
    for plain, values in zip(plains, shared_places(exact, plains), strict=True):
        for _ in range(size.checked):
            index = int(torch.randint(len(values), (), generator=draw))
            back = int(torch.randint(plain.shared, (), generator=draw)) + 1
            expected = by_huggingface(hf, plain, exact.site, exact.layers[index], back)
            worst = max(worst, abs(float(values[index, -back]) - expected))
    return {"huggingface_places": size.checked * len(plains), "huggingface_difference": worst}


def correlations(first_order: Any, exact: Any, plains: Sequence[Plain]) -> dict[str, Any]:
    """How far the first-order changes agree with the exact ones, over all places of all pairs."""
    table = pd.DataFrame(
        {
            name: np.concatenate(
                [
                    (values - found.target[0, number]).ravel()
                    for number, values in enumerate(shared_places(found, plains))
                ]
            )
            for name, found in (("first_order", first_order), ("exact", exact))
        }
    )
    return {
        "places": len(table),
        "pearson": table.corr().iloc[0, 1],
        "spearman": table.rank().corr().iloc[0, 1],
        "slope": (table["first_order"] * table["exact"]).sum() / (table["exact"] ** 2).sum(),
    }


def measured(folder: Path, size: Size) -> pd.DataFrame:
    """The table: one row per site."""
    model = ct.load_model(folder)
    hf = cast(Any, AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32).eval()
    pairs = talked_out(model, size.n_pairs)
    plains = [Plain.of(model.tokenizer, pair) for pair in pairs]
    options = {**OPTIONS, "layers": size.layers}
    exact = ct.analysis.patch(model, pairs, site=SITES, **options)
    first_order = ct.analysis.attribution_patch(model, pairs, site=SITES, **options)
    rows = []
    for site in tqdm(SITES, desc="sites"):
        row = {"site": site, "pairs": len(pairs), "path": exact[site].path}
        row |= against_transformer_lens(model, pairs, plains, site, size)
        row |= against_huggingface(hf, exact[site], plains, size)
        rows.append(row | correlations(first_order[site], exact[site], plains))
    return pd.DataFrame(rows)


def main() -> None:
    """Measures, prints the table and keeps it."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--model", type=Path, default=FOLDER, help="the folder that `make smollm2` writes")
    asked.add_argument("--quick", action="store_true", help="fewer pairs and layers, to look at; nothing is kept")
    given = asked.parse_args()
    if not has_smollm2(given.model):
        asked.exit(
            2, f"{given.model} is not the folder of SmolLM2 that `make smollm2` writes: run it, or give --model.\n"
        )
    torch.set_num_threads(1)
    table = measured(given.model, QUICK if given.quick else WHOLE)
    if not given.quick:
        table.to_csv(Path(__file__).with_suffix(".csv"), index=False, float_format="%.4g")
    tqdm.write(table.to_string(index=False))


if __name__ == "__main__":
    main()
