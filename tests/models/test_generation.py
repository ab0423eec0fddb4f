"""Decoding of many prompts gives what one prompt at a time gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers.models import hf_model
from helpers.tiers import unit_first

from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.chat import render
from ctlens.models import kv_cache as sequences
from ctlens.models.bridges import is_bridge
from ctlens.models.generation import Decoded, Ids, Sampling, decode, generate
from ctlens.models.hooks import editing
from ctlens.models.loading import build, load_model
from ctlens.models.weights import ModelConfig
from ctlens.organism import load_organism
from ctlens.threats import get, names

pytestmark = pytest.mark.boundary

N_CTX = 24
Answers = dict[tuple[int, ...], tuple[int, ...]]

PROMPTS = ((1, 2, 3), (4,), (5, 6, 7, 8, 9, 10, 11), (3, 2, 1), (0, 0, 12))


@pytest.fixture(scope="module")
def model() -> LensModel:
    config = ModelConfig(n_layers=2, d_model=32, n_heads=4, d_mlp=48, d_vocab=20, n_ctx=N_CTX)
    model = build(config, seed=0)
    for parameter in model.parameters():
        parameter.data *= 3
    return model


def naive(model: LensModel, prompt: Sequence[int]) -> tuple[int, ...]:
    """Six tokens, one prompt, one forward a token."""
    tokens = list(prompt)
    for _ in range(6):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tuple(tokens[len(prompt) :])


@pytest.fixture(scope="module")
def expected(model: LensModel) -> Answers:
    return {prompt: naive(model, prompt) for prompt in PROMPTS}


def test_the_answers_of_these_tests_differ(expected: Answers):
    assert len(set(expected.values())) == len(PROMPTS)
    assert max(len(set(answer)) for answer in expected.values()) > 2


def test_decoding_equals_one_prompt_at_a_time(model: LensModel, expected: Answers):
    assert generate(model, PROMPTS, max_new_tokens=6) == list(expected.values())


@pytest.mark.parametrize("max_batch_tokens", [1, 6, 8, 999])
def test_batch_mates_and_order_change_nothing(model: LensModel, expected: Answers, max_batch_tokens: int):
    for order in (PROMPTS[::-1], PROMPTS[2:] + PROMPTS[:2], (PROMPTS[1],) * 3):
        wanted = [(prompt[0], 5) for prompt in order]
        found = decode(model, order, first_tokens=wanted, max_new_tokens=3, max_batch_tokens=max_batch_tokens)
        assert found.answers == [expected[prompt][:3] for prompt in order]
        for prompt, tokens, probabilities in zip(order, wanted, found.first_probabilities, strict=True):
            assert probabilities == pytest.approx(next_token(model, prompt)[list(tokens)].tolist(), abs=1e-6)


def begun_before(model: LensModel, prompts: Sequence[Ids]) -> sequences.Begin:
    """Begins prompts with what was run of each alone."""
    alone = {prompt: sequences.begin(model, [prompt]) for prompt in prompts}

    def begin(model: LensModel, prompts: Sequence[Ids]) -> sequences.Begun:
        found = [alone[prompt] for prompt in prompts]
        joined = sequences.Sequences.joined([one.sequences for one in found])
        return sequences.Begun(joined, torch.cat([one.logits for one in found]))

    return begin


def continues_what_was_run_before(model: LensModel, prompts: Sequence[Ids]) -> None:
    expected = decode(model, prompts, first_tokens=[(5, 2)] * len(prompts), max_new_tokens=6)
    known = begun_before(model, prompts)
    for order in (prompts, prompts[::-1], prompts):  # what was run stays as it was
        found = decode(model, order, first_tokens=[(5, 2)] * len(order), max_new_tokens=6, begin=known)
        assert dict(zip(order, found.answers, strict=True)) == dict(zip(prompts, expected.answers, strict=True))
    assert found.first_probabilities == [pytest.approx(row, abs=1e-6) for row in expected.first_probabilities]


def test_prompts_that_were_run_one_by_one_are_continued_together(model: LensModel):
    continues_what_was_run_before(model, PROMPTS)
    begun = sequences.begin(model, [(1, 2, 3)]).sequences
    held = 2 * 2 * 3 * 32 * 4  # layers, keys and values, tokens, width, bytes of a number
    assert begun.n_bytes == (held if sequences.has_cache(model) else 0)


def test_equal_prompts_go_through_the_model_once_until_their_answers_begin(model: LensModel):
    seen: list[int] = []
    many = [*PROMPTS, *PROMPTS[:2] * 3, PROMPTS[4]]

    sampling = Sampling(generator(0, "answers"))
    with model.hooks(fwd_hooks=[("hook_embed", lambda value, hook: seen.append(len(value)))]):
        answers = generate(model, many, max_new_tokens=5, ends=(7,), sampling=sampling)

    assert seen[0] == len(PROMPTS) and max(seen[1:]) == len(many)
    assert answers[0] != answers[5] or answers[1] != answers[6]  # each of them draws its own answer


def without_cache(model: LensModel, prompts: Sequence[Ids], **options: Any) -> Decoded:
    """Every pass over the whole sequences."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sequences, "_cache", lambda model, rows: None)
        return decode(model, prompts, **options)


@pytest.mark.parametrize("ends", [(), (3,), (3, 7)])
def test_the_cache_changes_no_answer(model: LensModel, ends: Ids):
    draw = generator(0, "prompts")
    lengths = torch.randint(1, 13, (60,), generator=draw).tolist()
    prompts = [tuple(torch.randint(20, (length,), generator=draw).tolist()) for length in lengths]
    options: dict[str, Any] = {
        "first_tokens": [(0, 1)] * 60,
        "ends": ends,
        "max_new_tokens": 10,
        "max_batch_tokens": 99,
    }

    cached = decode(model, prompts, **options)
    full = without_cache(model, prompts, **options)

    assert cached.answers == full.answers
    assert cached.first_probabilities == [pytest.approx(row, abs=1e-6) for row in full.first_probabilities]
    assert (len(set(map(len, full.answers))) > 1) == bool(ends)


@pytest.mark.slow
def test_the_cache_changes_no_answer_of_the_organism():
    organism = load_organism()
    pairs = [pair for name in names() for pair in get(name).pairs(12, "heldout")]
    ids = [render(organism.tokenizer, prompt.turns).ids for pair in pairs for prompt in (pair.clean, pair.wrapped)]
    end = organism.tokenizer.eos_token_id

    cached = decode(organism, ids, ends=(end,), max_batch_tokens=200)

    assert cached == without_cache(organism, ids, ends=(end,))
    assert len({len(answer) for answer in cached.answers}) > 1


def test_a_prompt_is_run_once_and_then_one_token_a_pass(model: LensModel):
    if is_bridge(model):
        pytest.skip("a bridge has no cache")
    shapes: list[tuple[int, ...]] = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda embedded, hook: shapes.append(tuple(embedded.shape[:2])))]):
        generate(model, [(1, 2, 3), (4,)], max_new_tokens=4)

    assert shapes == [(2, 3), (2, 1), (2, 1), (2, 1)]


def test_an_ended_row_is_not_run_on(model: LensModel, expected: Answers):
    end = expected[PROMPTS[0]][0]
    assert end not in expected[PROMPTS[1]][:3]
    rows: list[int] = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda embedded, hook: rows.append(len(embedded)))]):
        generate(model, PROMPTS[:2], max_new_tokens=3, ends=(end,))

    assert rows == [2, 1, 1]


def next_token(model: LensModel, prompt: Ids) -> torch.Tensor:
    """The probabilities of the first token of the answer to one prompt."""
    with torch.no_grad():
        return model(torch.tensor([prompt]))[0, -1].softmax(-1)


def test_probabilities_of_first_tokens_come_as_they_were_asked_for(model: LensModel):
    wanted = [(), (7,), (3, 3, 0), tuple(range(20)), ()]

    found = decode(model, PROMPTS, first_tokens=wanted, max_new_tokens=1)

    assert [len(row) for row in found.first_probabilities] == [0, 1, 3, 20, 0]
    # Two ways to the same float32 logits, at a probability of 6e-7: how far they round apart depends on the processor.
    assert found.first_probabilities[1] == pytest.approx((float(next_token(model, PROMPTS[1])[7]),), rel=1e-4)
    assert found.first_probabilities[2][0] == found.first_probabilities[2][1]
    assert sum(found.first_probabilities[3]) == pytest.approx(1)
    most = max(range(20), key=lambda token: found.first_probabilities[3][token])
    assert found.answers[3] == (most,)
    assert decode(model, PROMPTS, max_new_tokens=1) == Decoded(found.answers, [()] * 5)


def test_an_answer_is_cut_at_the_longest(model: LensModel, expected: Answers):
    assert generate(model, PROMPTS, max_new_tokens=3) == [answer[:3] for answer in expected.values()]


def test_an_answer_stops_at_the_end_token_and_its_mates_go_on(model: LensModel, expected: Answers):
    end = expected[PROMPTS[0]][2]
    cut = [answer[: answer.index(end) + 1] if end in answer else answer for answer in expected.values()]
    assert len({len(answer) for answer in cut}) > 1
    assert generate(model, PROMPTS, max_new_tokens=6, ends=(end,)) == cut


def test_an_end_token_at_once_is_the_whole_answer(model: LensModel, expected: Answers):
    end = expected[PROMPTS[0]][0]

    assert generate(model, PROMPTS[:1], ends=(end,)) == [(end,)]


def test_nothing_asked_for_is_nothing_given(model: LensModel):
    assert generate(model, []) == []
    assert generate(model, PROMPTS[:2], max_new_tokens=0) == [(), ()]


def test_decoding_leaves_no_gradient_and_no_change_of_the_gradient_mode(model: LensModel):
    before = [parameter.detach().clone() for parameter in model.parameters()]
    generate(model, PROMPTS, max_new_tokens=2)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_a_model_in_training_mode_is_refused(model: LensModel):
    model.train()
    try:
        with pytest.raises(CtlensError, match=r"eval mode: call model\.eval\(\) first"):
            generate(model, PROMPTS)
    finally:
        model.eval()


def test_a_prompt_that_leaves_no_room_is_refused_and_one_that_just_fits_is_not(model: LensModel):
    assert len(generate(model, [(1,) * (N_CTX - 4)], max_new_tokens=4)[0]) == 4
    with pytest.raises(CtlensError, match="a prompt of 21 tokens and 4 new ones exceed the model's context of 24"):
        generate(model, [(1,), (1,) * (N_CTX - 3)], max_new_tokens=4)


def test_an_empty_prompt_is_refused(model: LensModel):
    with pytest.raises(CtlensError, match="an empty prompt cannot be continued"):
        generate(model, [(1,), ()])


def test_sampled_tokens_come_as_often_as_the_model_says(model: LensModel):
    count = 4000
    prompt = PROMPTS[0]
    sampling = Sampling(generator(0, "test"), temperature=2.0)
    drawn = generate(model, [prompt] * count, max_new_tokens=1, sampling=sampling)
    with torch.no_grad():
        shares = (model(torch.tensor([prompt]))[0, -1] / 2).softmax(-1)
    found = torch.bincount(torch.tensor(drawn)[:, 0], minlength=20) / count
    assert shares.max() < 0.9
    assert ((found - shares).abs() <= 4 * (shares * (1 - shares) / count).sqrt() + 1 / count).all()


def test_equal_seeds_draw_equal_answers_and_a_cold_draw_is_the_greedy_one(model: LensModel, expected: Answers):
    def drawn(seed: int, temperature: float = 1.0) -> list[Ids]:
        return generate(model, PROMPTS, max_new_tokens=6, sampling=Sampling(generator(seed, "test"), temperature))

    assert drawn(0) == drawn(0) != drawn(1)
    assert drawn(0, 1e-4) == list(expected.values())


@pytest.mark.parametrize(
    ("top_p", "nucleus"), [(0.4, {2}), (0.5, {2}), (0.6, {2, 0}), (0.9, {2, 0, 3}), (1.0, {0, 1, 2, 3})]
)
def test_tokens_are_drawn_from_the_nucleus_in_their_shares(top_p: float, nucleus: set[int]):
    shares = torch.tensor([0.25, 0.0625, 0.5, 0.1875])

    drawn = Sampling(generator(0, "test"), top_p=top_p).draw(shares.log().expand(4000, 4))

    found = torch.bincount(drawn, minlength=4) / 4000
    kept = torch.tensor([float(share) if token in nucleus else 0.0 for token, share in enumerate(shares)])
    expected = kept / kept.sum()
    assert set(drawn.tolist()) == nucleus
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / 4000).sqrt()).all()


@pytest.mark.parametrize("top_p", [0.0, 1.1, float("nan")])
def test_a_nucleus_that_makes_no_sense_is_refused(top_p: float):
    with pytest.raises(CtlensError, match="top_p"):
        Sampling(generator(0, "test"), top_p=top_p)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_that_makes_no_sense_is_refused(temperature: float):
    with pytest.raises(CtlensError, match="temperature"):
        Sampling(generator(0, "test"), temperature)


BRIDGED = ("llama", "gpt2", "mistral", "gemma3")
WINDOW = 6  # of the sliding attention of the last two
MIXED = ((5, 6, 7), (9,), (11, 12, 13, 14, 15, 16, 17, 18, 19), (1, 3), (7, 6, 5), tuple(range(40, 52)))


@pytest.fixture(scope="module", params=unit_first(BRIDGED))
def bridged(request: pytest.FixtureRequest) -> LensModel:
    return load_model(hf_model(request.param, vocab_size=60, n_ctx=N_CTX))


def test_a_bridge_with_its_cache_gives_what_it_gives_without_one_prompt_at_a_time(bridged: LensModel):
    expected = [naive(bridged, prompt) for prompt in MIXED]
    assert len(set(expected)) > 3
    for order in (slice(None), slice(None, None, -1)):
        assert generate(bridged, MIXED[order], max_new_tokens=6) == expected[order]
    assert without_cache(bridged, MIXED, max_new_tokens=6).answers == expected


def test_prompts_that_a_bridge_has_run_one_by_one_are_continued_together(bridged: LensModel):
    continues_what_was_run_before(bridged, MIXED)


def test_a_bridge_draws_equal_answers_with_its_cache_and_without(bridged: LensModel):
    prompts = [prompt for prompt in MIXED for _ in range(3)]

    def drawn(decoding: Callable[..., Decoded]) -> Decoded:
        sampling = Sampling(generator(0, "test"))
        return decoding(bridged, prompts, first_tokens=[(0, 1)] * 18, max_new_tokens=6, ends=(3,), sampling=sampling)

    cached, full = drawn(decode), drawn(without_cache)

    assert cached.answers == full.answers
    assert cached.first_probabilities == [pytest.approx(row, abs=1e-5) for row in full.first_probabilities]
    assert len(set(cached.answers)) > 12 and len(set(map(len, cached.answers))) > 1


def test_a_bridge_runs_a_prompt_once_and_hooks_see_every_token_once(bridged: LensModel):
    seen: list[tuple[int, ...]] = []
    with bridged.hooks(
        fwd_hooks=[("blocks.1.hook_resid_pre", lambda value, hook: seen.append(tuple(value.shape[:2])))]
    ):
        answers = generate(bridged, [(1, 2, 3), (4, 5, 6)], max_new_tokens=4)

    assert seen == [(2, 3), (2, 1), (2, 1), (2, 1)] and len(answers[0]) == 4


def test_steering_and_ablation_reach_every_token_of_a_cached_answer(bridged: LensModel):
    draw = generator(0, "steering")
    direction = torch.randn(bridged.cfg.d_model, generator=draw)

    def steered(value: torch.Tensor) -> torch.Tensor:
        return value + 3 * direction

    def ablated(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value[:, :, 1] = 0
        return value

    for edit in ({"blocks.1.hook_resid_pre": steered}, {"blocks.1.attn.hook_z": ablated}):
        with editing(bridged, edit):
            cached = generate(bridged, MIXED, max_new_tokens=6)
            full = without_cache(bridged, MIXED, max_new_tokens=6)
        assert cached == full.answers
    assert cached != generate(bridged, MIXED, max_new_tokens=6)


def test_prompts_that_outgrow_a_sliding_window_are_run_among_their_own_length_alone():
    def rows(kind: str, new: int) -> list[int]:
        seen: list[int] = []
        model = load_model(hf_model(kind, vocab_size=60, n_ctx=N_CTX))
        with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: seen.append(len(value)))]):
            generate(model, [(1, 2), (1, 2, 3), (3, 2, 1), (1, 2, 3, 4), (4, 3, 2, 1)], max_new_tokens=new)
        return seen

    assert rows("llama", 1) == [5] and rows("llama", 4) == [5] * 4
    assert rows("mistral", WINDOW - 4) == [5] * 2
    assert rows("mistral", WINDOW - 3) == [3] * 3 + [2] * 3
    assert rows("mistral", WINDOW - 2) == [1] * 4 + [2] * 4 + [2] * 4


@pytest.mark.parametrize("reason", ["not filled", "another kind", "no positions"])
def test_a_cache_that_cannot_be_trusted_is_not_used(monkeypatch: pytest.MonkeyPatch, reason: str):
    model = load_model(hf_model("llama", vocab_size=60, n_ctx=N_CTX))
    expected = [naive(model, prompt) for prompt in MIXED]
    if reason == "not filled":
        monkeypatch.setattr(sequences.DynamicLayer, "get_seq_length", lambda self: 0)
    elif reason == "another kind":
        monkeypatch.setattr(sequences, "SELECTABLE", ())
    else:
        monkeypatch.setattr(sequences, "NEEDED", {"positions nobody takes"})
    widths: list[int] = []
    with model.hooks(fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: widths.append(value.shape[1]))]):
        assert generate(model, MIXED, max_new_tokens=6) == expected
    assert widths == list(range(12, 18))  # whole sequences
