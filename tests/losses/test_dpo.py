"""DPO: its formula restated for one pair at a time, where it starts, and what it is told of each pair."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import collate, encode
from ctlens.data.chat import answer_ids, render
from ctlens.losses import ACT, DPO, Forwards
from ctlens.models.hooks import run
from ctlens.models.parameters import copy_model, present_parameters
from ctlens.organism import load_organism
from ctlens.threats import get
from ctlens.training import TrainConfig, Trainer, train
from ctlens.training.preferences import Preferences

PAIRS = get("sycophancy").pairs(12)
QUICK = TrainConfig(steps=4, batch_size=4, max_new_tokens=4)


@pytest.fixture(scope="module")
def model() -> LensModel:
    return load_organism()


@pytest.fixture(scope="module")
def moved(model: LensModel) -> LensModel:
    other = copy_model(model)
    for parameter in other.parameters():
        parameter.data *= 0.95
    return other


def rows(model: LensModel, count: int = 5) -> Any:
    return Trainer(model, PAIRS, DPO(), QUICK).pairs.rows[:count]


def log_p(model: LensModel, prompt: tuple[int, ...], answer: tuple[int, ...]) -> torch.Tensor:
    """The log-probability of one answer, by a pass over it alone."""
    shares = run(model, torch.tensor([[*prompt, *answer]]))[0].log_softmax(-1)
    return torch.stack([shares[len(prompt) - 1 + step, token] for step, token in enumerate(answer)]).sum()


def restated(trained: LensModel, reference: LensModel, row: Any, beta: float) -> torch.Tensor:
    """As `trl` writes it: `-logsigmoid(beta * (pi_logratios - ref_logratios))`."""
    prompt = render(reference.tokenizer, row.pair.wrapped.turns)
    bad = answer_ids(reference.tokenizer, prompt, row.pair.wrapped.bad)
    pi_logratios = log_p(trained, prompt.ids, row.answer) - log_p(trained, prompt.ids, bad)
    ref_logratios = (log_p(reference, prompt.ids, row.answer) - log_p(reference, prompt.ids, bad)).detach()
    return -torch.nn.functional.logsigmoid(beta * (pi_logratios - ref_logratios))


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_it_is_the_formula_for_each_pair_by_itself(model: LensModel, moved: LensModel, beta: float) -> None:
    some = rows(model)
    drawn = Preferences(model, some).draw(moved, some, 1)
    values = DPO(beta=beta).row_values(drawn.seen_by(moved), [])["logits"]
    expected = [restated(moved, model, row, beta).item() for row in some]
    assert values.tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3

    alone = [
        DPO(beta=beta).row_values(Preferences(model, [row]).draw(moved, [row], 1).seen_by(moved), [])["logits"].item()
        for row in some
    ]
    assert values.tolist() == pytest.approx(alone, rel=1e-3, abs=1e-5)  # whatever its batch-mates and their padding


def test_its_gradient_is_that_of_the_formula(model: LensModel, moved: LensModel) -> None:
    some = rows(model, 3)
    trained = copy_model(moved)
    loss = DPO(weight=2.0)
    loss.compute(Preferences(model, some).draw(trained, some, 1).seen_by(trained), {}).total.backward()

    plain = copy_model(moved)
    (2.0 * torch.stack([restated(plain, model, row, 0.1) for row in some]).mean()).backward()
    found = present_parameters(trained)
    for name, parameter in present_parameters(plain).items():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-3, atol=1e-6)


def test_it_starts_at_log_two_and_does_not_run_the_reference_again(
    model: LensModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = rows(model)
    known = Preferences(model, some)
    first = known.draw(model, some, 1)
    values = DPO().row_values(first.seen_by(model), [])["logits"]
    assert values.tolist() == pytest.approx([math.log(2)] * len(some), abs=1e-4)

    monkeypatch.setattr("ctlens.training.preferences.run", lambda *given: pytest.fail("the reference ran again"))
    again = known.draw(model, some[::-1], 2)
    flipped = torch.cat([part.flip(0) for part in first.log_p.chunk(2)])
    torch.testing.assert_close(again.log_p, flipped)


def test_both_answers_stand_behind_the_wrapped_prompt(model: LensModel) -> None:
    some = rows(model)
    batch = Preferences(model, some).draw(model, some, 1).batch
    texts = [
        model.tokenizer.decode(tokens[answer], skip_special_tokens=True).strip()
        for tokens, answer in zip(batch.wrapped.tokens, batch.answer, strict=True)
    ]
    assert texts == [row.pair.clean.good for row in some] + [row.pair.wrapped.bad for row in some]


@pytest.mark.slow
def test_training_turns_the_preference(model: LensModel) -> None:
    config = TrainConfig(steps=16, batch_size=12, max_new_tokens=4, lr=1e-3, trainable=("attn", "mlp"))
    first = train(model, PAIRS, DPO(), config=config, progress=False)
    second = train(model, PAIRS, DPO(), config=config, progress=False)
    assert first.history.to_dataframe().equals(second.history.to_dataframe())
    values = first.history.series("dpo")
    assert values[0] == pytest.approx(math.log(2), abs=1e-4) and values[-1] < 0.5 * values[0]


def test_beside_other_losses_it_leaves_theirs_as_they_are(model: LensModel) -> None:
    alone = next(Trainer(model, PAIRS, [ACT()], QUICK)).losses
    beside = next(Trainer(model, PAIRS, [ACT(), DPO()], QUICK)).losses
    assert beside["act"] == pytest.approx(alone["act"], rel=1e-5)


def test_what_it_cannot_prefer_is_refused(model: LensModel) -> None:
    with pytest.raises(CtlensError, match="weight must be a positive number"):
        DPO(weight=0.0)
    with pytest.raises(CtlensError, match="beta must be a positive number"):
        DPO(beta=-1.0)
    ungraded = replace(PAIRS[3], wrapped=replace(PAIRS[3].wrapped, bad=None))
    with pytest.raises(CtlensError, match="pair 4 names none"):
        Trainer(model, [*PAIRS[:3], ungraded], DPO(), QUICK)
    bad = replace(PAIRS[0], target=PAIRS[0].wrapped.bad)
    with pytest.raises(CtlensError, match="preferred in pair 1 is its bad one"):
        Trainer(model, [bad, *PAIRS[1:]], DPO(), QUICK)
    batch = collate(encode(PAIRS[:2], model.tokenizer, windows=(), n_ctx=model.cfg.n_ctx).rows)
    with pytest.raises(CtlensError, match="needs both answers of each pair"):
        DPO().row_values(Forwards(batch, {}, {}, torch.zeros(*batch.wrapped.tokens.shape, 5)), [])
