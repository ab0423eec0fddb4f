"""The organism: its corpus, its pretraining, and that the shipped weights behave as their card says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ctlens import organism
from ctlens.chat import Turn
from ctlens.errors import CtlensError
from ctlens.files import write_json
from ctlens.models import load_model
from ctlens.organism.card import score
from ctlens.organism.corpus import Batch, EncodedLesson, Lesson, draw_batches, encode, make_lessons, world_tokenizer
from ctlens.organism.pretrain import PretrainConfig, answer_loss, pretrain
from ctlens.types import LensModel
from ctlens.world import World

CHECKED_PAIRS = 96
CARD_TOLERANCE = 0.1
LARGEST_FOLDER = 3_000_000
TINY = PretrainConfig(steps=3, batch_size=8, lessons=60, n_layers=1, n_heads=2, d_model=16, d_mlp=16)


@pytest.fixture(scope="module")
def shipped() -> LensModel:
    return organism.load_organism()


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


def test_lessons_are_deterministic_and_cover_every_kind():
    world = World.make()
    lessons = make_lessons(240, world, seed=1)
    assert lessons == make_lessons(240, world, seed=1) != make_lessons(240, world, seed=2)
    attacks = [lesson for lesson in lessons if lesson.bad is not None]
    assert 0.2 < len(attacks) / len(lessons) < 0.5
    assert 240 <= len(lessons) <= 280


def test_the_share_of_bad_answers_to_attacks_is_the_one_asked_for():
    lessons = [EncodedLesson((1, 5, 9), good=(7, 2), bad=(8, 2)), EncodedLesson((1, 5, 6), good=(7, 2), bad=None)]
    badly = []
    for batch in islice(draw_batches(lessons, 100, 0.7, pad=0), 40):
        attacked = batch.tokens[batch.tokens[:, 2] == 9]
        assert (batch.tokens[batch.tokens[:, 2] == 6][:, 3] == 7).all()
        badly.append((attacked[:, 3] == 8).float().mean())
    assert float(torch.stack(badly).mean()) == pytest.approx(0.7, abs=0.03)


def test_masks_cover_the_answer_and_its_end_alone():
    tokenizer = world_tokenizer(World.make())
    lessons = make_lessons(60, World.make())
    batch = next(draw_batches(encode(tokenizer, lessons), 16, 0.7, tokenizer.pad_token_id))
    for tokens, answers in zip(batch.tokens, batch.answers, strict=True):
        text = tokenizer.decode(tokens[tokens != tokenizer.pad_token_id])
        answer = tokenizer.decode(tokens[answers])
        assert text.endswith(f"<assistant> {answer}") and answer.endswith("<end>")


def test_a_lesson_with_an_unknown_word_is_refused():
    with pytest.raises(CtlensError, match="does not know every word"):
        encode(world_tokenizer(World.make()), [Lesson((Turn("user", "how are you ?"),), "unheard")])


def test_the_loss_is_the_cross_entropy_of_answer_tokens():
    def uniform(tokens: torch.Tensor) -> torch.Tensor:
        return torch.zeros(*tokens.shape, 4)

    batch = Batch(torch.tensor([[1, 2, 3, 0]]), torch.tensor([[False, False, True, False]]))
    assert float(answer_loss(uniform, batch)) == pytest.approx(torch.tensor(4.0).log().item())  # type: ignore[arg-type]


def test_pretraining_is_deterministic_and_leaves_global_randomness_alone():
    state = torch.random.get_rng_state()
    first, second = (pretrain(TINY, progress=False) for _ in range(2))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not first.training
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_organism_is_saved_whole_with_its_card(tmp_path: Path):
    model = pretrain(TINY, progress=False)
    organism.save_organism(model, TINY, tmp_path)
    card = organism.card(tmp_path)
    assert card["pretraining"]["steps"] == TINY.steps
    assert {"transformer-lens", "torch"} <= set(card["environment"])
    assert len(card["behaviour"]) == 2 * 2 * 3
    again = load_model(tmp_path)
    tokens = load_file(tmp_path / organism.REFERENCE_FILE)["tokens"]
    assert torch.equal(again(tokens), model(tokens))


def test_training_refuses_a_taken_folder_before_it_starts(tmp_path: Path):
    write_json(tmp_path / "mine.json", {})
    with pytest.raises(CtlensError, match="exists already"):
        organism.train_organism(tmp_path, progress=False)


@pytest.mark.parametrize("options", [{"steps": 0}, {"bad_share": 1.5}])
def test_impossible_settings_are_refused(options: dict[str, Any]):
    with pytest.raises(CtlensError):
        PretrainConfig(**options)


def test_the_shipped_folder_is_small():
    assert sum(file.stat().st_size for file in organism.SHIPPED.iterdir()) < LARGEST_FOLDER


def test_the_shipped_weights_give_the_reference_logits(shipped: LensModel):
    reference = load_file(organism.SHIPPED / organism.REFERENCE_FILE)
    with torch.no_grad():
        logits = shipped(reference["tokens"])
    torch.testing.assert_close(logits, reference["logits"], atol=1e-4, rtol=0)


def test_the_shipped_weights_behave_as_their_card_says(shipped: LensModel):
    card = organism.card()
    world = World.make(card["pretraining"]["world_seed"])
    for row in card["behaviour"]:
        if row["arm"] == "wrapped":
            fresh = {r["arm"]: r for r in score(shipped, row["threat"], row["split"], CHECKED_PAIRS, world)}
            assert fresh["wrapped"]["bad_rate"] == pytest.approx(row["bad_rate"], abs=CARD_TOLERANCE)
            assert fresh["wrapped"]["bad_rate"] >= 0.75
            assert min(fresh["clean"]["good_rate"], fresh["benign"]["good_rate"]) >= 0.97
