"""Continuations are scored token by token, whoever is in the batch, and the first token alone is a trap."""

from __future__ import annotations

import pytest
import torch
from helpers.models import byte_level_tokenizer, hf_model
from helpers.tiers import unit_first

from ctlens import evaluate
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.chat import Turn, render, token_ids
from ctlens.data.pairs import Pair, Prompt
from ctlens.models import kv_cache as sequences
from ctlens.models.kv_cache import Ids
from ctlens.models.loading import build, load_model
from ctlens.models.scoring import Choice, choose, continuation_logprobs
from ctlens.models.weights import ModelConfig
from ctlens.threats import replies

pytestmark = pytest.mark.boundary

TEXT = "Which term best describes the disease?\n\nAnswer choices:\n(A) isolated cases\n(B) outbreak\n"
PROMPTS: list[Ids] = [(5, 6, 7), (9,), (11, 12, 13, 14, 15, 16, 17), (5, 6, 7)]
CONTINUATIONS: list[list[Ids]] = [[(1,), (2, 3), (2, 4, 5)], [(1, 2, 3, 4, 5)], [(8,), (7,)], [(2, 3)]]


def question(*options: str) -> Prompt:
    return Prompt((Turn("user", TEXT),), None, None, options)


def made() -> LensModel:
    """A HookedTransformer on 3.x, a native bridge without a cache on 4.x."""
    model = build(ModelConfig(d_vocab=400, n_layers=2, n_heads=4, d_model=32, d_mlp=48, n_ctx=256))
    for parameter in model.parameters():
        parameter.data *= 3
    return model


@pytest.fixture(scope="module", params=unit_first(["made here", "llama", "gpt2", "mistral"]))
def model(request: pytest.FixtureRequest) -> LensModel:
    model = made() if request.param == "made here" else load_model(hf_model(request.param))
    model.tokenizer = byte_level_tokenizer()
    return model


@pytest.fixture(scope="module")
def llama() -> LensModel:
    return load_model(hf_model("llama"), tokenizer=byte_level_tokenizer())


def one_by_one(model: LensModel, prompt: Ids, continuation: Ids) -> list[float]:
    """The log-probability of each token, one pass a token."""
    found = []
    for number, token in enumerate(continuation):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + continuation[:number]]))[0, -1]
        found.append(float(logits.double().log_softmax(-1)[token]))
    return found


@pytest.mark.parametrize("max_batch_tokens", [1, 9, 999])
def test_every_token_of_every_continuation_is_scored_as_if_alone(model: LensModel, max_batch_tokens: int) -> None:
    found = continuation_logprobs(model, PROMPTS, CONTINUATIONS, max_batch_tokens=max_batch_tokens)

    for prompt, given, rows in zip(PROMPTS, CONTINUATIONS, found, strict=True):
        assert len(rows) == len(given)
        for continuation, row in zip(given, rows, strict=True):
            assert row == pytest.approx(one_by_one(model, prompt, continuation), abs=1e-4)


@pytest.mark.parametrize("shared", [15, 16, 40])
def test_a_beginning_that_prompts_share_changes_no_number(model: LensModel, shared: int) -> None:
    prompts = [tuple(range(1, shared + 1)) + prompt for prompt in PROMPTS]

    found = continuation_logprobs(model, [*prompts, prompts[0][:shared]], [*CONTINUATIONS, [(5, 6)]])

    for prompt, given, rows in zip([*prompts, prompts[0][:shared]], [*CONTINUATIONS, [(5, 6)]], found, strict=True):
        for continuation, row in zip(given, rows, strict=True):
            assert row == pytest.approx(one_by_one(model, prompt, continuation), abs=1e-4)


def test_a_beginning_that_prompts_share_is_run_once(llama: LensModel) -> None:
    shapes: list[tuple[int, ...]] = []
    with llama.hooks(
        fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: shapes.append(tuple(value.shape[:2])))]
    ):
        continuation_logprobs(llama, [(1,) * 20 + (2, 3), (1,) * 20 + (4,)], [[(2,)], [(7,)]])

    assert shapes == [(1, 20), (2, 2)]


def test_order_batch_mates_and_the_cache_change_nothing(llama: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = continuation_logprobs(llama, PROMPTS, CONTINUATIONS)
    backwards = continuation_logprobs(llama, PROMPTS[::-1], [given[::-1] for given in CONTINUATIONS[::-1]])
    monkeypatch.setattr(sequences, "_cache", lambda model, rows: None)
    uncached = continuation_logprobs(llama, PROMPTS, CONTINUATIONS)

    for number, rows in enumerate(found):
        for place, row in enumerate(rows):
            assert row == pytest.approx(backwards[-1 - number][-1 - place], abs=1e-5)
            assert row == pytest.approx(uncached[number][place], abs=1e-5)


def test_a_prompt_is_run_once_for_all_its_continuations(llama: LensModel) -> None:
    shapes: list[tuple[int, ...]] = []
    with llama.hooks(
        fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: shapes.append(tuple(value.shape[:2])))]
    ):
        continuation_logprobs(llama, [(1,) * 20], [[(2, 3), (4, 5, 6), (7,)]])

    assert shapes == [(1, 20), (2, 2)]


def test_continuations_fill_the_context_to_the_last_token(model: LensModel) -> None:
    (rows,) = continuation_logprobs(model, [(1,) * 250], [[(2,) * 6, (3,)]])

    assert [len(row) for row in rows] == [6, 1]
    with pytest.raises(CtlensError, match="a prompt with its option has 257 tokens"):
        continuation_logprobs(model, [(1,) * 250], [[(2,) * 7]])


@pytest.mark.parametrize(("prompts", "given"), [([()], [[(1,)]]), ([(1,)], [[(1,), ()]])])
def test_nothing_cannot_be_scored(llama: LensModel, prompts: list[Ids], given: list[list[Ids]]) -> None:
    with pytest.raises(CtlensError, match="at least one token each"):
        continuation_logprobs(llama, prompts, given)


def by_first_token(model: LensModel, prompt: Prompt) -> list[float]:
    """The published way: the probability of the first token of each option, encoded by itself."""
    ids = render(model.tokenizer, prompt.turns).ids
    first = [token_ids(model.tokenizer, option)[0] for option in prompt.options]
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1].softmax(-1)[first].tolist()


@pytest.mark.parametrize("options", [("(A", "(B", "(C"), ("\nA", "\nB", "\nC")], ids=["bracket", "new line"])
def test_whole_options_are_told_apart_where_their_first_token_ties(model: LensModel, options: tuple[str, ...]) -> None:
    (plain,) = choose(model, [question(*options)])
    liked = plain.chosen
    prompt = question(*[option for option in options if option != liked], str(liked))

    shares = by_first_token(model, prompt)
    (found,) = choose(model, [prompt])

    assert len(set(shares)) == 1 and prompt.options[shares.index(max(shares))] != liked  # the first, and wrong
    assert found.chosen == liked is not None
    for option in options:
        assert found.share(option) == pytest.approx(plain.share(option), abs=1e-5)  # their order decides nothing


def test_what_rounding_tells_apart_is_a_tie() -> None:
    assert Choice(("a", "b", "c"), (-1.0, -1.0 + 1e-6, -2.0), (1, 1, 1)).chosen is None
    assert Choice(("a", "b", "c"), (-2.0, -2.0, -1.0), (1, 1, 1)).chosen == "c"
    assert Choice(("a", "b"), (-1.0, -2.0), (1, 2)).per_token.chosen is None


def test_an_option_that_begins_another_is_refused(llama: LensModel) -> None:
    with pytest.raises(CtlensError, match="the option ' 1' is the beginning of ' 1 2', which it would always beat"):
        choose(llama, [question(" 1 2", " 3", " 1")])


def test_options_can_be_compared_per_token(llama: LensModel, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("yes", "no, it is not")
    chosen = Choice(options, (-1.0, -2.0), (1, 4))  # means -1 and -0.5
    monkeypatch.setattr(replies, "choose", lambda model, prompts, **options: [chosen] * len(prompts))
    side = Prompt((Turn("user", TEXT),), *options, options)

    rates = [
        evaluate(llama, pairs=[Pair(side, side)], per_token=per_token).rate("good_rate", "wrapped")
        for per_token in (False, True)
    ]

    assert rates == [1.0, 0.0]
