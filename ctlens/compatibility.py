"""Which parts of ctlens work on which architecture: each is tried on a tiny random model."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ctlens import analysis, losses, threats
from ctlens.core.errors import CtlensError
from ctlens.core.labels import BASE
from ctlens.core.progress import progress_bar
from ctlens.models.architectures import ARCHITECTURES, COMPUTED_OTHERWISE, tiny_model
from ctlens.models.export import export_huggingface, export_peft
from ctlens.models.hooks import editing, resolve, run_capturing
from ctlens.models.huggingface import quiet_huggingface
from ctlens.models.loading import load_model
from ctlens.models.lora import LoRA, merge_adapters
from ctlens.models.matrices import MATRICES, slots
from ctlens.models.parameters import copy_model, parameter_groups, present_parameters
from ctlens.models.parity import parity
from ctlens.organism import load_organism
from ctlens.training import Run, TrainConfig, train

# The names of the last matrix of an MLP, whose input MLPCT trains on.
_DOWN = (".mlp.down_proj", ".mlp.c_proj", ".mlp.dense_4h_to_h")
_TOLERANCE = 1e-4  # chosen by eye, well above the rounding of float32
# A random model's sampled answers are never judged bad, and these pairs name no bad answer to train away from.
_TRAINED = tuple(name for name in losses.names() if not losses.get(name).makes_rows)
SOURCE_KINDS = {
    "a HuggingFace folder, or a name on the hub": "read from safetensors alone; quantised weights are refused",
    "a `.gguf` file": "of any architecture that `transformers` reads; quantised weights become plain ones",
    "a folder of a PEFT adapter": "LoRA on matrices of the blocks stays an adapter, of any ranks, scales and layers; "
    "what else PEFT has is refused",
    "a folder of `save_model` or of a run": "as it was saved, adapters merged",
    "a HuggingFace model in memory": "copied; one with an adapter is refused",
    "a `HookedTransformer` or `TransformerBridge`": "copied; one with folded or centred weights is refused, because "
    "its activations are not those of the weights that were trained",
}
"""What is true of each kind of source, for the page; `tests/models` holds all of it."""
_PREFACE = f"""# The architectures, side by side

`ctlens models` made this table: each cell was run on a random model of two layers, with random norms and biases.

- *logits* are HuggingFace's, on prompts of unequal lengths, padded on either side and longer than the window;
  *resid*, *mlp* and *attn*, what ACT, MLPCT and AttCT train on, are HuggingFace's at every layer and carry gradients;
  *mid*: `resid_mid` adds up, and an edit of it reaches the skip path.
- *losses*: a step of each of the losses but RMCT, OPCT and DPO changes the attention that is trained, and nothing else.
- *lora*: adapters on every matrix train and merge. *export*: `transformers` loads the trained model with equal logits.
  *peft*: the adapters, written as PEFT's, are loaded onto the model again and give equal logits.
- *probe*, *maps* (attention difference) and *patch* run; a patch of everything gives the other run's values.

`load_model` makes the first check on every model, of whatever architecture, and refuses one whose logits are others.
Known to be refused with TransformerLens 3.9: {", ".join(COMPUTED_OTHERWISE)}, and gpt2 with `scale_attn_weights=false`.
"""
_ONE_STEP = TrainConfig(steps=1, batch_size=4, lr=1e-2, warmup=0.0, trainable=("attn",))


class WrongNumbers(Exception):
    """A check ran, and its numbers are wrong."""


@dataclass(frozen=True)
class Support:
    """The outcome of every check on one architecture.

    Attributes:
        architecture: HuggingFace's `model_type`.
        refusals: by check, empty where it works, else the sentence that says why it does not.
        wrong: the checks that ran and gave wrong numbers, each with the mistake.
    """

    architecture: str
    refusals: Mapping[str, str]
    wrong: Mapping[str, str]


class CheckedModel:
    """A model under examination: a HuggingFace model, the same as a lens model, and pairs.

    Args:
        hf: with the tokenizer's vocabulary.
        tokenizer: of the pairs.
    """

    def __init__(self, hf: PreTrainedModel, tokenizer: Any) -> None:
        self.hf = hf
        self.model = load_model(hf, tokenizer=tokenizer, check=False)  # the first check is the same
        self.hf.set_attn_implementation("eager")
        self.pairs = [replace(pair, target=pair.clean.good) for pair in threats.get("sycophancy").pairs(4)]
        self.tokens = torch.arange(36).reshape(3, 12) + 5

    @cached_property
    def trained(self) -> Run:
        """A step of low-rank training on every matrix that the architecture has."""
        matrices = tuple(dict.fromkeys(name.rsplit(".", 1)[-1] for name in slots(self.model, MATRICES)))
        config = TrainConfig(steps=1, batch_size=4, lr=1e-2, warmup=0.0, trainable=LoRA(2, target_modules=matrices))
        return train(self.model, self.pairs, losses.get("attct"), config=config, progress=False)

    @torch.no_grad()
    def original(self) -> dict[str, Tensor]:
        """HuggingFace's own activations at the sites that the three internal losses read, by our hook names."""
        inputs: list[Tensor] = []
        downs = [module for name, module in self.hf.named_modules() if name.endswith(_DOWN) and "vision" not in name]
        hooks = [down.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for down in downs]
        seen = cast(Any, self.hf)(self.tokens, output_hidden_states=True, output_attentions=True)
        for hook in hooks:
            hook.remove()
        residual = seen.hidden_states[:-1]  # the last one is after the final norm
        layers = zip(residual, inputs, seen.attentions, strict=True)
        named = [dict(zip(("resid_pre", "mlp_post", "pattern"), layer, strict=True)) for layer in layers]
        return {resolve(self.model, site, i)[0]: value for i, at in enumerate(named) for site, value in at.items()}


def _logits(checked: CheckedModel) -> None:
    _require_close("logits", parity(checked.model, checked.hf), 0)


def _hook(site: str) -> Callable[[CheckedModel], None]:
    def check(checked: CheckedModel) -> None:
        names = resolve(checked.model, site)
        expected = checked.original()
        _, found = run_capturing(checked.model, checked.tokens, names, grad=True)
        for name in names:
            _require_close(name, found[name], expected[name])
        cast(nn.Module, checked.model).zero_grad(set_to_none=True)
        found[names[-1]].square().sum().backward()
        first = [value.grad for value in cast(Any, checked.model).blocks[0].attn.parameters() if value.requires_grad]
        if not any(grad is not None and grad.any() for grad in first):
            raise WrongNumbers(f"no gradient reaches the first layer from {names[-1]}")

    return check


def _resid_mid(checked: CheckedModel) -> None:
    before = resolve(checked.model, "resid_pre", 0)[0]
    attention = resolve(checked.model, "attn_out", 0)[0]
    middle = resolve(checked.model, "resid_mid", 0)[0]
    out = resolve(checked.model, "mlp_out", 0)[0]
    after = resolve(checked.model, "resid_post", 0)[0]
    _, found = run_capturing(checked.model, checked.tokens, [before, attention, middle, out, after], grad=False)
    _require_close(middle, found[middle], found[before] + found[attention])
    with torch.no_grad(), editing(checked.model, {middle: torch.zeros_like}):
        _, edited = run_capturing(checked.model, checked.tokens, [out, after], grad=False)
    _require_close("an edit of resid_mid", edited[after], edited[out])


def _losses(checked: CheckedModel) -> None:
    attention = set(parameter_groups(checked.model)["attn"])
    before = {name: value.clone() for name, value in present_parameters(checked.model).items()}
    for name in _TRAINED:
        run = train(checked.model, checked.pairs, losses.get(name), config=_ONE_STEP, progress=False)
        after = present_parameters(run.model)
        changed = {each for each, value in before.items() if not torch.equal(value, after[each])}
        if not changed or not changed <= attention:
            raise WrongNumbers(f"a step of {name} changed {sorted(changed - attention)[:2] or 'nothing'}")
    if any(not torch.equal(before[name], value) for name, value in present_parameters(checked.model).items()):
        raise WrongNumbers("a training changed the reference")


@torch.no_grad()
def _low_rank(checked: CheckedModel) -> None:
    model = copy_model(checked.trained.model)
    adapted = model(checked.tokens)
    if torch.equal(adapted, checked.model(checked.tokens)):
        raise WrongNumbers("adapters changed nothing")
    merge_adapters(model)
    _require_close("merged adapters", model(checked.tokens), adapted)


def _export(checked: CheckedModel) -> None:
    with tempfile.TemporaryDirectory() as folder:
        export_huggingface(checked.trained.model, f"{folder}/model")
        with quiet_huggingface():
            again = cast(Any, AutoModelForCausalLM).from_pretrained(f"{folder}/model", local_files_only=True)
    _require_close("exported logits", parity(checked.trained.model, again.eval()), 0)
    if parity(checked.model, again) < _TOLERANCE:
        raise WrongNumbers("the export lacks the training")


def _peft(checked: CheckedModel) -> None:
    trained = checked.trained.model
    with tempfile.TemporaryDirectory() as folder, quiet_huggingface():
        checked.hf.save_pretrained(f"{folder}/base")
        again = load_model(export_peft(trained, f"{folder}/adapter", base=f"{folder}/base"))
    with torch.no_grad():
        _require_close("logits with PEFT's adapters", again(checked.tokens), trained(checked.tokens))


def _probe(checked: CheckedModel) -> None:
    task = analysis.wrapper_present(checked.pairs, checked.model.tokenizer)
    found = analysis.probe({BASE: checked.model}, task, positions=["last"], seeds=1, folds=2, progress=False)
    _require_finite(found.score)


def _attention_diff(checked: CheckedModel) -> None:
    found = analysis.attention_diff(checked.model, checked.trained.model, checked.pairs, progress=False)
    measured = found.to_dataframe()[["before", "after", "change"]]  # so few pairs have no interval
    _require_finite(measured.to_numpy())


def _patching(checked: CheckedModel) -> None:
    options: dict[str, Any] = {"direction": "denoising", "positions": "last", "progress": False}
    found = analysis.patch(checked.model, checked.pairs, site="resid_post", layers="last", **options)
    _require_close("a patch of everything", torch.tensor(found.values[0, -1]), torch.tensor(found.source[0]))


CHECKS: Mapping[str, Callable[[CheckedModel], None]] = {
    "logits": _logits,
    "resid": _hook("resid_pre"),
    "mlp": _hook("mlp_post"),
    "attn": _hook("pattern"),
    "mid": _resid_mid,
    "losses": _losses,
    "lora": _low_rank,
    "export": _export,
    "peft": _peft,
    "probe": _probe,
    "maps": _attention_diff,
    "patch": _patching,
}


def support(architectures: Iterable[str] = ARCHITECTURES, *, progress: bool = True) -> list[Support]:
    """Runs every check on a tiny random model of each architecture.

    The checks: logits are HuggingFace's; the residual stream, the MLP's hidden layer and the
    attention are HuggingFace's at every layer, and carry gradients; `resid_mid` adds up and an edit
    of it reaches the skip path; a step of every loss changes the attention alone; adapters on every
    matrix train and merge; a trained model is exported, and `transformers` loads it with equal
    logits; its adapters are exported as PEFT's and come back; a probe, an attention difference and a
    patching sweep run.

    Args:
        architectures: names from `ctlens.models.architectures.ARCHITECTURES`.
        progress: show a progress bar.
    """
    tokenizer = load_organism().tokenizer
    names = list(architectures)
    return [
        examine(name, CheckedModel(tiny_model(name, vocab_size=len(tokenizer)), tokenizer))
        for name in progress_bar(names, desc="architectures", shown=progress, leave=False)
    ]


def examine(architecture: str, checked: CheckedModel) -> Support:
    """Runs every check on one model."""
    refusals: dict[str, str] = {}
    wrong: dict[str, str] = {}
    for name, check in CHECKS.items():
        refusals[name] = ""
        try:
            check(checked)
        except CtlensError as error:
            refusals[name] = str(error)
        except WrongNumbers as error:
            wrong[name] = str(error)
    return Support(architecture, refusals, wrong)


def support_table(found: Sequence[Support]) -> pd.DataFrame:
    """A row per architecture: `yes`, `no` where it refuses, `WRONG` where its numbers are wrong."""

    def word(row: Support, check: str) -> str:
        if check in row.wrong:
            return "WRONG"
        return "no" if row.refusals[check] else "yes"

    rows = [{"architecture": row.architecture, **{check: word(row, check) for check in CHECKS}} for row in found]
    return pd.DataFrame(rows)


def reasons(found: Sequence[Support]) -> list[str]:
    """Explains each cell of the table that is not `yes`, in a line."""
    return [
        f"{row.architecture}, {check}: {why}"
        for row in found
        for check, why in {**{check: why for check, why in row.refusals.items() if why}, **row.wrong}.items()
    ]


def support_page(found: Sequence[Support]) -> str:
    """The table and its reasons as Markdown: `docs/models.md`."""
    cells = support_table(found)
    sources = _table(("`load_model` takes", "what is true of it"), SOURCE_KINDS.items())
    checks = _table(cells.columns, cells.to_numpy().tolist())
    return "\n".join([_PREFACE, sources, "", checks, "", *(f"- {reason}" for reason in reasons(found)), ""])


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (tuple(head), *rows)]
    lines.insert(1, re.sub(r"[^|]+", "---", lines[0]))
    return "\n".join(lines)


def _require_close(what: str, found: Tensor | float, expected: Tensor | float) -> None:
    with torch.no_grad():
        difference = float((torch.as_tensor(found) - torch.as_tensor(expected)).abs().max())
    if not difference < _TOLERANCE:
        raise WrongNumbers(f"{what} differs by {difference:.2g}")


def _require_finite(values: Any) -> None:
    if not torch.isfinite(torch.as_tensor(values)).all():
        raise WrongNumbers("a number is not finite")
