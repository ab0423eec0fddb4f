"""One vector a prompt: equal to plain indexing, whatever the batch, and refused where no token is chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import planted
from helpers.models import byte_level_tokenizer, hf_model

from ctlens.analysis import States, logit_lens
from ctlens.analysis.base.forward import require_comparable
from ctlens.analysis.base.positions import STATE_POSITIONS
from ctlens.analysis.base.states import states
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.batch import encode
from ctlens.data.pairs import Pair, prompt
from ctlens.models.hooks import run_capturing
from ctlens.models.loading import load_model

QUESTIONS = ("Which term best describes the disease?", "Is it right?", "When a creature experiences feeling, what?")
PAIRS = [Pair(prompt(q), prompt("I don't think it's right. " * (i + 1) + q)) for i, q in enumerate(QUESTIONS)]
SIDES_AND_POSITIONS = [("wrapped", positions) for positions in STATE_POSITIONS] + [
    ("clean", "last"),
    ("clean", "content"),
]


@pytest.fixture(scope="module")
def model() -> LensModel:
    return load_model(hf_model("llama"), tokenizer=byte_level_tokenizer(chat=True))


def plain(model: LensModel, pair: Pair, side: str, positions: str, name: str) -> np.ndarray:
    """One pair alone, by indexing."""
    row = encode([pair], model.tokenizer, n_ctx=256).rows[0]
    rendered = getattr(row, side)
    positions = {
        "last": [len(rendered.ids) - 1],
        "content": list(getattr(row.alignments["shared"], side))[:-1],
        "wrapper": list(row.wrapper),
    }[positions]
    activation = run_capturing(model, torch.tensor([rendered.ids]), [name], grad=False)[1][name][0]
    return torch.stack([activation[position] for position in positions]).mean(0).numpy()


@pytest.mark.boundary
@pytest.mark.parametrize(("side", "positions"), SIDES_AND_POSITIONS)
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_states_are_those_of_each_prompt_alone(model: LensModel, side: str, positions: str, batch_size: int):
    found = states(model, PAIRS, side=side, positions=positions, layers=[1, 0], batch_size=batch_size, progress=False)
    assert found.values.shape == (2, 3, 32)
    assert (found.layers, found.side, found.positions) == ((1, 0), side, positions)
    for index, pair in enumerate(PAIRS):
        expected = plain(model, pair, side, positions, "blocks.1.hook_resid_post")
        np.testing.assert_allclose(found.values[0, index], expected, atol=2e-5)


def test_a_span_of_the_user_is_averaged(model: LensModel):
    first_two = states(model, PAIRS, positions=lambda row, side: [0, 1], site="mlp_post", layers=0, progress=False)
    name = "blocks.0.mlp.hook_post"
    for index, pair in enumerate(PAIRS):
        ids = encode([pair], model.tokenizer, n_ctx=256).rows[0].wrapped.ids
        activation = run_capturing(model, torch.tensor([ids]), [name], grad=False)[1][name][0]
        np.testing.assert_allclose(first_two.values[0, index], activation[:2].mean(0).numpy(), atol=2e-5)
    assert first_two.positions == "chosen"


def test_a_full_hook_name_is_its_site_at_its_layer(model: LensModel):
    one = states(model, PAIRS, site="blocks.1.hook_resid_pre", progress=False)
    of_both = states(model, PAIRS, site="resid_pre", progress=False)
    assert (one.site, one.layers) == ("resid_pre", (1,))
    assert (one.values == of_both.values[1:]).all()
    other = states(model, PAIRS, site="blocks.1.ln2.hook_normalized", progress=False)
    assert (other.site, other.layers, len(other.values)) == ("blocks.1.ln2.hook_normalized", (1,), 1)


def test_states_round_trip_through_a_file(model: LensModel, tmp_path):
    found = states(model, PAIRS, layers="last", progress=False)
    found.save(tmp_path / "states.safetensors")
    again = States.load(tmp_path / "states.safetensors")
    assert (again.values == found.values).all() and again.layers == found.layers == (1,)
    assert list(found.figure().data[-1].x) == [1] and "at the last token" in found.figure().layout.meta["title"]
    assert found.to_dataframe()["norm"].tolist() == pytest.approx(np.linalg.norm(found.values[0], axis=-1).tolist())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"side": "both"}, "side"),
        ({"positions": "first"}, "positions"),
        ({"positions": "wrapper", "side": "clean"}, "no wrapper"),
        ({"positions": lambda row, side: []}, "no token at these positions"),
        ({"layers": [2]}, "layer 2 does not exist"),
        ({"site": "resid_past"}, "resid_past"),
        ({"site": "z"}, "'z' has one vector per head"),
        ({"site": "pattern"}, "'pattern' has one vector per head"),
        ({"site": "blocks.0.attn.hook_q"}, "has one vector per head"),
        ({"site": "hook_embed"}, "hook_embed stands in no layer"),
        ({"site": "blocks.0.hook_resid_pre", "layers": [1]}, "stands in layer 0"),
    ],
)
def test_what_cannot_be_had_is_refused(model: LensModel, options: dict, message: str):
    with pytest.raises(CtlensError, match=message):
        states(model, PAIRS, progress=False, **options)


def test_words_that_the_models_tokenizer_does_not_know_are_refused():
    known, foreign = prompt("ada ?", "yes", "no"), prompt("quite ada ?", "yes", "no")
    for pair in (Pair(known, foreign), Pair(foreign, prompt("never quite ada ?"))):
        with pytest.raises(CtlensError, match="pair 2: the tokenizer does not know 'quite'"):
            states(planted.model(), [Pair(known, known), pair], progress=False)
    with pytest.raises(CtlensError, match="wrapped prompt of pair 1: the tokenizer does not know 'quite'"):
        logit_lens(planted.model(), [Pair(known, foreign)], progress=False)


def test_a_model_in_training_mode_is_refused():
    training = load_model(hf_model("llama"), tokenizer=byte_level_tokenizer(chat=True))
    training.train()
    with pytest.raises(CtlensError, match="eval mode"):
        states(training, PAIRS, progress=False)


def test_models_that_read_text_differently_do_not_compare(model: LensModel):
    other = load_model(hf_model("llama"), tokenizer=byte_level_tokenizer(vocab_size=300, chat=True))
    with pytest.raises(CtlensError, match="tokenizers differ"):
        require_comparable(model, other)
