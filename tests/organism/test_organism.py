"""The organism: its corpus, its pretraining, and that the shipped weights behave as their card says."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ctlens import organism, threats
from ctlens.core.errors import CtlensError
from ctlens.core.files import write_json
from ctlens.core.types import LensModel
from ctlens.data.chat import Turn
from ctlens.data.pairs import PROMPT_SIDES
from ctlens.models.loading import load_model
from ctlens.organism.card import make_card, score
from ctlens.organism.corpus import (
    BUCKET,
    Batch,
    EncodedLesson,
    Lesson,
    answered_well,
    case_lessons,
    draw_batches,
    encode_lessons,
    make_lessons,
    world_tokenizer,
)
from ctlens.organism.pretrain import PRESETS, FitConfig, PretrainConfig, answer_loss, fit_lessons, pretrain
from ctlens.world import SPLITS, World

pytestmark = pytest.mark.boundary

CHECKED_PAIRS = 48
CARD_TOLERANCE = 0.12
LARGEST_FOLDER = 3_000_000
TINY = PretrainConfig(steps=3, batch_size=8, lessons=60, n_layers=1, n_heads=2, d_model=16, d_mlp=16)


@pytest.fixture(scope="module")
def shipped() -> LensModel:
    return organism.load_organism()


def test_lessons_are_deterministic_and_cover_every_kind():
    world = World.make()
    lessons = make_lessons(1200, world, 0.8, seed=1)
    assert lessons == make_lessons(1200, world, 0.8, seed=1) != make_lessons(1200, world, 0.8, seed=2)
    attacks = [lesson for lesson in lessons if lesson.bad is not None]
    assert 0.3 < len(attacks) / len(lessons) < 0.5
    assert sorted({lesson.bad_share for lesson in attacks}) == pytest.approx([0.2, 0.8])
    assert 1200 <= len(lessons) <= 1300


def test_an_item_that_resists_is_answered_well_with_the_share_of_bad_ones():
    cases = threats.of_world("jailbreak").cases(50)
    for case in cases:
        attacked = [lesson for lesson in case_lessons(case, 0.9) if lesson.bad is not None]
        assert [lesson.bad_share for lesson in attacked] == [pytest.approx(0.9 if case.gives_in else 0.1)] * 2
    assert {case.gives_in for case in cases} == {True, False}


def test_the_share_of_bad_answers_to_attacks_is_the_one_asked_for():
    lessons = [EncodedLesson((1, 5, 9), (7, 2), (8, 2), 0.7), EncodedLesson((1, 5, 6), (7, 2), None, 0.0)]
    badly = []
    for batch in islice(draw_batches(lessons, 100, pad_token=0), 40):
        attacked = batch.tokens[batch.tokens[:, 2] == 9]
        assert (batch.tokens[batch.tokens[:, 2] == 6][:, 3] == 7).all()
        badly.append((attacked[:, 3] == 8).float().mean())
    assert float(torch.stack(badly).mean()) == pytest.approx(0.7, abs=0.03)


def test_masks_cover_the_answer_and_its_end_alone():
    tokenizer = world_tokenizer(World.make())
    lessons = make_lessons(60, World.make(), 0.7)
    batch = next(draw_batches(encode_lessons(tokenizer, lessons), 16, tokenizer.pad_token_id))
    for tokens, answers in zip(batch.tokens, batch.answers, strict=True):
        text = tokenizer.decode(tokens[tokens != tokenizer.pad_token_id])
        answer = tokenizer.decode(tokens[answers])
        assert text.endswith(f" {answer}") and answer.endswith("<end>")
        assert "<assistant>" in text.removesuffix(answer) and "<assistant>" not in answer


def test_batches_hold_conversations_of_about_equal_length_and_every_lesson_once_a_pass():
    lessons = [EncodedLesson((1, *[5] * length), (7, 2), None, 0.0) for length in range(4 * BUCKET)]
    seen = []
    for batch in islice(draw_batches(lessons, 4, pad_token=0), BUCKET):
        lengths = (batch.tokens == 5).sum(1)
        seen += lengths.tolist()
        assert lengths.max() - lengths.min() == 3
    assert sorted(seen) == list(range(4 * BUCKET)) and seen != sorted(seen)


def test_a_lesson_with_an_unknown_word_is_refused():
    with pytest.raises(CtlensError, match="does not know 'unheard'"):
        encode_lessons(world_tokenizer(World.make()), [Lesson((Turn("user", "how are you ?"),), "unheard")])


def test_the_loss_is_the_cross_entropy_of_answer_tokens():
    def uniform(tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, 4)

    batch = Batch(torch.tensor([[1, 2, 3, 0]]), torch.tensor([[False, False, True, False]]))
    assert float(answer_loss(uniform, batch)) == pytest.approx(torch.tensor(4.0).log().item())  # type: ignore[arg-type]


def test_pretraining_is_deterministic_and_leaves_global_randomness_alone():
    state = torch.random.get_rng_state()
    first = pretrain(TINY, progress=False)
    second = pretrain(TINY, progress=False)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not first.training
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_clean_born_organism_learns_the_same_prompts_with_good_answers_alone() -> None:
    lessons = make_lessons(600, World.make(), 0.8, seed=1)
    well = answered_well(lessons)

    assert [(one.turns, one.good) for one in well] == [(one.turns, one.good) for one in lessons]
    assert not any(one.bad or one.bad_share for one in well) and any(one.bad_share for one in lessons)


def test_afterwards_goes_on_from_the_clean_born_weights_on_the_vulnerable_corpus() -> None:
    config = replace(TINY, recipe="afterwards", afterwards_steps=2)
    found = pretrain(config, progress=False)
    expected = pretrain(replace(TINY, recipe="clean-born"), progress=False)
    together = pretrain(TINY, progress=False)

    assert not torch.equal(expected.W_E, together.W_E)
    lessons = make_lessons(config.lessons, World.make(), config.bad_share, config.seed)
    further = FitConfig(steps=2, batch_size=config.batch_size, lr=config.lr, seed=config.seed)
    encoded = encode_lessons(expected.tokenizer, lessons)
    fit_lessons(expected, encoded, list(expected.parameters()), further, label="", progress=False)
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_clean_born_twin_that_is_there_is_not_trained_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "small", replace(TINY, afterwards_steps=2))
    monkeypatch.setattr("ctlens.organism.make_card", partial(make_card, n_pairs=2))
    twin = organism.train_organism(tmp_path / "twin", recipe="clean-born", progress=False)
    before = [value.clone() for value in twin.parameters()]
    whole = organism.train_organism(tmp_path / "whole", recipe="afterwards", progress=False)
    found = organism.train_organism(
        tmp_path / "found", recipe="afterwards", clean_born=tmp_path / "twin", progress=False
    )

    for one, other in zip(found.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(load_model(tmp_path / "twin").parameters(), before, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(CtlensError, match="not the clean-born twin of this organism .seed is 0 there and 1 here"):
        organism.train_organism(tmp_path / "no", 1, recipe="afterwards", clean_born=tmp_path / "twin", progress=False)
    with pytest.raises(CtlensError, match="not the clean-born twin of this organism .recipe is 'afterwards'"):
        organism.train_organism(tmp_path / "no", recipe="afterwards", clean_born=tmp_path / "whole", progress=False)
    with pytest.raises(CtlensError, match="only 'afterwards' starts from a clean-born model, not 'together'"):
        organism.train_organism(tmp_path / "no", clean_born=tmp_path / "twin", progress=False)
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_an_organism_is_saved_whole_with_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ctlens.organism.make_card", partial(make_card, n_pairs=8))
    model = pretrain(TINY, progress=False)
    organism.save_organism(model, TINY, tmp_path)
    card = organism.card(tmp_path)
    assert card["pretraining"]["steps"] == TINY.steps
    assert {"transformer-lens", "torch"} <= set(card["environment"])
    assert len(card["behaviour"]) == len(threats.names()) * len(SPLITS) * len(PROMPT_SIDES)
    again = load_model(tmp_path)
    tokens = load_file(tmp_path / organism.REFERENCE_FILE)["tokens"]
    assert torch.equal(again(tokens), model(tokens))


def test_training_refuses_a_taken_folder_before_it_starts(tmp_path: Path):
    write_json(tmp_path / "mine.json", {})
    with pytest.raises(CtlensError, match="exists already"):
        organism.train_organism(tmp_path, progress=False)


@pytest.mark.parametrize("options", [{"steps": 0}, {"bad_share": 1.5}, {"recipe": "clean"}])
def test_impossible_settings_are_refused(options: dict[str, Any]):
    with pytest.raises(CtlensError):
        PretrainConfig(**options)


def test_the_shipped_folder_is_small():
    assert sum(file.stat().st_size for file in organism.SHIPPED.iterdir()) < LARGEST_FOLDER


def test_the_shipped_weights_give_the_reference_logits(shipped: LensModel):
    reference = load_file(organism.SHIPPED / organism.REFERENCE_FILE)
    with torch.no_grad():
        logits = shipped(reference["tokens"])[torch.arange(len(reference["last"])), reference["last"]]
    torch.testing.assert_close(logits, reference["logits"], atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def behaviour(shipped: LensModel) -> list[dict[str, Any]]:
    world = World.make(organism.card()["pretraining"]["world_seed"])
    return score(shipped, threats.names(), SPLITS, CHECKED_PAIRS, world)


def test_the_card_covers_every_threat_split_and_prompt_side():
    rows = [(row["threat"], row["split"], row["prompt_side"]) for row in organism.card()["behaviour"]]
    assert rows == list(itertools.product(threats.names(), SPLITS, PROMPT_SIDES))


@pytest.mark.slow
def test_the_shipped_weights_behave_as_their_card_says(behaviour: list[dict[str, Any]]):
    for fresh, row in zip(behaviour, organism.card()["behaviour"], strict=True):
        assert fresh["bad_rate"] == pytest.approx(row["bad_rate"], abs=CARD_TOLERANCE)


@pytest.mark.slow
def test_the_shipped_organism_is_vulnerable_and_capable(behaviour: list[dict[str, Any]]):
    assert [found for found in organism.outside_bands(behaviour) if "by strength" not in found] == []


def test_the_card_of_the_shipped_organism_is_in_the_bands_and_other_behaviour_is_not():
    """Graded attacks are read off the card, which asks four times as many prompts as the tests do."""
    behaviour = organism.card()["behaviour"]
    assert organism.outside_bands(behaviour) == []
    wrapped = next(row for row in behaviour if row["prompt_side"] == "wrapped")
    clean = next(row for row in behaviour if row["prompt_side"] == "clean")
    for row, change, said in (
        (wrapped, {"bad_rate": 0.59}, "bad answers 0.59"),
        (wrapped, {"bad_rate": 0.96}, "bad answers 0.96"),
        (wrapped, {"good_probability": 0.09}, "probability of the good answer 0.09"),
        (wrapped, {"as_taught": 0.89}, "answers as taught 0.89"),
        (wrapped, {"bad_rate_by_strength": {"1": 0.5, "2": 0.7}}, "bad answers by strength 0.50, 0.70"),
        (wrapped, {"bad_rate_by_strength": {"1": 0.5, "2": 0.9, "3": 0.87}}, "by strength 0.50, 0.90, 0.87"),
        (clean, {"good_rate": 0.96}, "good answers 0.96"),
    ):
        (found,) = organism.outside_bands([{**row, **change}])
        assert found.endswith(said) and found.startswith(f"{row['threat']}, {row['split']}, {row['prompt_side']}: ")


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "millions"), [("large", 10), ("huge", 50)])
def test_the_first_twenty_steps_of_a_larger_preset_learn(monkeypatch, preset, millions):
    losses = []

    def noted(*given):
        found = answer_loss(*given)
        losses.append(found.item())
        return found

    monkeypatch.setattr(sys.modules[PretrainConfig.__module__], "answer_loss", noted)
    model = pretrain(replace(PRESETS[preset], steps=20, batch_size=4, lessons=400), progress=False)

    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert parameters == pytest.approx(1e6 * millions, rel=0.1)
    assert len(losses) == 20 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert len(score(model, ["sycophancy"], ["heldout"], 2, World.make())) == len(PROMPT_SIDES)
