"""The presets of losses on outputs and on the wrapper's attention, against plain restatements of their sources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import presets
from helpers.models import hf_model
from helpers.reference import aisi, ctm, irpan, stack
from torch import Tensor

from ctlens import losses
from ctlens.data.batch import EncodedPair, PairBatch, Side, collate, encode
from ctlens.data.chat import Turn
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.losses import Forwards
from ctlens.losses.presets import PUBLISHED
from ctlens.models.hooks import run_capturing
from ctlens.models.loading import load_model

CONTENT, HINT = presets.CONTENT, presets.HINT
ANSWER = (40, 41, 42, 43)
PREFILL = "Sure, here it is:"


@dataclass(frozen=True)
class Raw:
    """One pair as the published codes see it: `[token, d_vocab]` logits of both sides, and where the wrapper is."""

    row: EncodedPair
    clean: Tensor
    wrapped: Tensor

    @property
    def ids(self) -> tuple[int, ...]:
        return self.row.wrapped.ids + self.row.answer


def answer_only(raw: Raw) -> float:
    return stack.bct(raw.wrapped, raw.ids, masked=len(raw.row.wrapped.ids))


RESTATED: dict[tuple[str, str], Callable[[Raw], float]] = {
    ("bct", "irpan"): lambda raw: irpan.bct(raw.wrapped, list(ANSWER)),
    ("bct", "stack"): lambda raw: stack.bct(raw.wrapped, raw.ids, masked=0),
    ("bct", "stack-frustration"): answer_only,
    ("bct", "stack-prefill"): lambda raw: stack.prefill_bct(raw.clean, raw.wrapped, prefilled_positions(raw.row)),
    ("bct", "ctm"): lambda raw: ctm.bct(raw.wrapped, raw.ids, [0.0] * (len(raw.row.wrapped.ids) - 1) + [1.0] * 4),
    ("bct", "aisi"): lambda raw: aisi.bct(raw.clean, raw.wrapped, presets.windows(raw.row)[0], temperature=1.0),
}
KEYS = sorted(RESTATED)


def prefilled_positions(row: EncodedPair) -> list[int]:
    """From the prompt's last token to the prefill's last but one, by their characters."""
    begin = row.wrapped.text.index(PREFILL)
    inside = [at for at, (left, right) in enumerate(row.wrapped.offsets) if begin <= left < right]
    return [at - 1 for at in inside]


@pytest.fixture(scope="module")
def hinted(chat_tokenizer) -> EncodedPair:
    pair = Pair(prompt(CONTENT), prompt(HINT + CONTENT))
    return encode([pair], chat_tokenizer, windows=["suffix", "content", "shared"], n_ctx=256).rows[0]


@pytest.fixture(scope="module")
def rows(hinted, chat_tokenizer) -> dict[tuple[str, str], EncodedPair]:
    """Per preset a pair of its kind: with the answer behind, with a prefill, or with neither."""
    forced = Pair(prompt(CONTENT), Prompt((Turn("user", CONTENT), Turn("assistant", PREFILL))))
    others = {
        ("bct", "stack-prefill"): encode([forced], chat_tokenizer, windows=["content"], n_ctx=256).rows[0],
        ("bct", "aisi"): hinted,
    }
    return dict.fromkeys(KEYS, replace(hinted, answer=ANSWER)) | others


def ours(key: tuple[str, str], raw: Raw) -> float:
    wrapped = raw.wrapped[None].clone().requires_grad_()
    loss = losses.preset(*key)
    return loss.compute(Forwards(collate([raw.row]), {}, {}, wrapped, raw.clean[None]), {}).total.item()


@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_a_preset_on_outputs_is_its_source_s_formula_on_random_logits(rows, key) -> None:
    draw = torch.Generator().manual_seed(0)
    row = rows[key]
    lengths = len(row.clean.ids), len(row.wrapped.ids + row.answer)
    raw = Raw(row, *(torch.randn(length, 400, generator=draw, dtype=torch.float64) for length in lengths))

    assert ours(key, raw) == pytest.approx(RESTATED[key](raw), rel=1e-6)


@pytest.mark.parametrize("key", KEYS, ids="-".join)
def test_a_preset_on_outputs_is_its_source_s_formula_on_huggingface_s_own_logits(rows, key) -> None:
    row = rows[key]
    clean_model = hf_model("llama", seed=0).double()
    trained = hf_model("llama", seed=1).double()
    if losses.preset(*key).clean_side == "own":
        clean_model = trained
    with torch.no_grad():
        sides = ((clean_model, row.clean.ids), (trained, row.wrapped.ids + row.answer))
        raw = Raw(row, *(model(torch.tensor([ids])).logits[0] for model, ids in sides))
        bridged = Raw(row, *(load_model(m, dtype=torch.float64)(torch.tensor([ids]))[0] for m, ids in sides))

    assert ours(key, bridged) == pytest.approx(RESTATED[key](raw), rel=1e-6)


def test_the_mass_on_the_wrapper_is_its_source_s_formula(hinted) -> None:
    """On the bridge's own attention, from every token to all but the content's."""
    model = load_model(hf_model("llama"), dtype=torch.float64)
    loss = losses.preset("attmass", "stack")
    names = loss.hook_names(model)
    patterns = run_capturing(model, torch.tensor([hinted.wrapped.ids]), names, grad=False)[1]
    begin = hinted.wrapped.text.index(CONTENT)
    every = range(len(hinted.wrapped.ids))
    spans = hinted.wrapped.offsets
    outside = [at for at in every if spans[at][1] <= begin or spans[at][0] >= begin + len(CONTENT)]

    graph = {name: pattern.detach().requires_grad_() for name, pattern in patterns.items()}
    unused = torch.zeros(1, len(hinted.wrapped.ids), 2, dtype=torch.float64)
    value = loss.compute(Forwards(collate([hinted]), {}, graph, unused), loss.factors(model)).total.item()

    raw = [patterns[name][0] for name in names]
    assert value == pytest.approx(stack.wrapper_mass(raw, list(every), outside, 1.0), rel=1e-6)


def test_rate_matching_has_its_source_s_gradient() -> None:
    """Three answers of two tokens after a prompt of two; the value is half the squared gap, see `RMCT`."""
    loss = losses.preset("rmct", "ctm")
    bad = [1.0, 0.0, 1.0]
    clean_rate = 0.25
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 9, generator=draw, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(9, (3, 4), generator=draw)
    answer = torch.tensor([[False, False, True, True]] * 3)
    side = Side(ids, torch.ones_like(answer), "right")
    nothing = torch.zeros_like(answer)
    advantages = loss.advantages(torch.tensor([bad], dtype=torch.float64), torch.tensor([clean_rate])).flatten()
    gaps = torch.full((3,), 2 / 3 - clean_rate, dtype=torch.float64)
    batch = PairBatch(side, side, answer, {}, torch.zeros(3, dtype=torch.long), nothing, nothing)
    value = loss.compute(Forwards(batch, {}, {}, logits, advantages=advantages, gaps=gaps), {}).total
    log_p = logits.log_softmax(-1)
    plain = ctm.rmct([torch.stack([log_p[n, 1, ids[n, 2]], log_p[n, 2, ids[n, 3]]]) for n in range(3)], bad, clean_rate)
    torch.testing.assert_close(*(torch.autograd.grad(total, logits)[0] for total in (value, plain)), rtol=1e-6, atol=0)
    assert value.item() == pytest.approx((2 / 3 - clean_rate) ** 2 / 2, rel=1e-6)


@pytest.mark.parametrize(("source", "factor"), [("opct", 2.0), ("ctm", 1.0)])
def test_on_policy_consistency_has_its_source_s_gradient(source: str, factor: float) -> None:
    """Three answers of two tokens, behind a wrapped prompt of two and a clean one of one."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 9, generator=draw, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(3, 3, 9, generator=draw, dtype=torch.float64)
    ids = torch.randint(9, (3, 4), generator=draw)
    answer = torch.tensor([[False, False, True, True]] * 3)
    nothing = torch.zeros_like(answer)
    wrapped = Side(ids, torch.ones_like(answer), "right")
    clean = Side(ids[:, 1:], torch.ones_like(answer[:, 1:]), "right")
    batch = PairBatch(clean, wrapped, answer, {}, torch.zeros(3, dtype=torch.long), nothing, answer[:, 1:])
    value = losses.preset("opct", source).compute(Forwards(batch, {}, {}, logits, theirs), {}).total

    def of_answers(given: torch.Tensor, start: int) -> list[torch.Tensor]:
        log_p = given.log_softmax(-1)
        return [torch.stack([log_p[n, start, ids[n, 2]], log_p[n, start + 1, ids[n, 3]]]) for n in range(3)]

    plain = ctm.opct(of_answers(logits, 1), of_answers(theirs, 0), factor)
    torch.testing.assert_close(*(torch.autograd.grad(total, logits)[0] for total in (value, plain)), rtol=1e-6, atol=0)


def test_every_published_definition_is_restated() -> None:
    by_gradient = {("attmass", "stack"), ("rmct", "ctm"), ("opct", "opct"), ("opct", "ctm")}
    with_a_subspace = {("subact", "trasn")}  # in `test_subact`
    assert {*presets.RESTATED, *RESTATED, *by_gradient, *with_a_subspace} == set(PUBLISHED)
