"""The door of the library: the caller's settings of torch change no number, and wrong arguments get one sentence."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from helpers.models import chat_model, made

import ctlens as ct
from ctlens import analysis, threats
from ctlens.core.arguments import checked_arguments, fitted
from ctlens.core.errors import CtlensError
from ctlens.core.limits import BY_NAME
from ctlens.core.public import at_work
from ctlens.core.types import LensModel
from ctlens.data.chat import Turn
from ctlens.data.inputs import Pairs, Prompts
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.models.parameters import copy_model
from ctlens.training import TrainConfig

QUIET: dict[str, Any] = {"progress": False}
loose: Any = ct  # as it is without a type checker
QUESTIONS = ("Is it right?", "When a creature experiences feeling, what?")
PAIRS = [Pair(prompt(q, "yes", "no"), prompt(f"I don't think it's right. {q}", "yes", "no")) for q in QUESTIONS]
TRAINED = TrainConfig(steps=2, batch_size=2, max_new_tokens=2)


@pytest.fixture(scope="module")
def model() -> LensModel:
    return made()


@pytest.fixture(scope="module")
def after(model: LensModel) -> LensModel:
    other = copy_model(model)
    for parameter in other.parameters():
        parameter.data += 0.01
    return other


REQUESTS: dict[str, Callable[[LensModel, LensModel], Any]] = {
    "evaluate": lambda model, after: ct.evaluate(model, pairs=PAIRS, max_new_tokens=2, **QUIET),
    "train": lambda model, after: ct.train(model, PAIRS, [ct.ACT(), ct.BCT()], config=TRAINED, **QUIET).history,
    "patch": lambda model, after: analysis.patch(model, PAIRS, site="z", direction="noising", **QUIET),
    "attribution": lambda model, after: analysis.attribution_patch(
        model, PAIRS, site="resid_pre", direction="noising", **QUIET
    ),
    "lens": lambda model, after: analysis.logit_lens(model, PAIRS, **QUIET),
    "saliency": lambda model, after: analysis.saliency_agreement(model, PAIRS, **QUIET),
    "knockout": lambda model, after: analysis.knockout(model, PAIRS, **QUIET),
    "shift": lambda model, after: analysis.residual_shift(model, after, PAIRS, **QUIET),
    "graft": lambda model, after: analysis.graft(after, model, PAIRS, by="block", **QUIET),
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "default device": lambda: default_device("meta"),
    "device in force": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
}


@pytest.fixture(scope="module")
def plain(model: LensModel, after: LensModel) -> Mapping[str, str]:
    """The tables of every request in a fresh program, to the last digit."""
    return {name: request(model, after).to_dataframe().to_csv() for name, request in REQUESTS.items()}


@pytest.mark.parametrize("state", STATES)
def test_the_callers_state_changes_no_digit_and_comes_back(
    state: str, model: LensModel, after: LensModel, plain: Mapping[str, str]
) -> None:
    with STATES[state]():
        before = (torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu"))
        before += (torch.is_inference_mode_enabled(), torch.is_grad_enabled())
        found = {name: request(model, after) for name, request in REQUESTS.items()}
        left = (torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu"))
        left += (torch.is_inference_mode_enabled(), torch.is_grad_enabled())

    assert left == before
    for name, result in found.items():
        assert result.to_dataframe().to_csv() == plain[name], name


@pytest.mark.boundary
@pytest.mark.parametrize("state", ["autocast", "float64", "default device", "inference mode"])
def test_a_model_that_is_made_in_the_callers_state_trains(state: str) -> None:
    def losses() -> list[float]:
        bridge = chat_model("gpt2")
        return ct.train(bridge, PAIRS, ct.ACT(), config=TRAINED, **QUIET).history.series("total")

    expected = losses()
    made_outside = chat_model("gpt2")
    with STATES[state]():
        found = ct.train(made_outside, PAIRS, ct.ACT(), config=TRAINED, **QUIET).history.series("total")
        built = ct.build(ct.ModelConfig(d_vocab=10, n_layers=1, n_heads=2, d_model=8, d_mlp=8))

    assert found == expected
    weights = list(built.parameters())
    assert {weight.dtype for weight in weights} == {torch.float32} and not any(w.is_inference() for w in weights)


def test_threads_wait_for_each_other_on_one_model(model: LensModel, after: LensModel, plain: Mapping[str, str]) -> None:
    names = ("patch", "attribution", "knockout", "shift", "graft")
    found: dict[str, str] = {}

    def compute(name: str) -> None:
        found[name] = REQUESTS[name](model, after).to_dataframe().to_csv()

    threads = [threading.Thread(target=compute, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == {name: plain[name] for name in names}


def test_two_models_in_two_orders_do_not_wait_for_ever(model: LensModel, after: LensModel) -> None:
    together = threading.Barrier(2)

    def work(first: LensModel, second: LensModel) -> None:
        together.wait()
        for _ in range(200):
            with at_work(first, second):
                pass

    threads = [threading.Thread(target=work, args=models) for models in ((model, after), (after, model))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)

    assert not any(thread.is_alive() for thread in threads)


def test_the_last_thread_out_gives_the_default_dtype_back() -> None:
    inside, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with at_work():
            inside.set()
            leave.wait()

    with default_dtype(torch.float64):
        thread = threading.Thread(target=stay)
        thread.start()
        inside.wait()
        with at_work():
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float32  # the other one is still at work
        leave.set()
        thread.join()
        assert torch.get_default_dtype() == torch.float64


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_refused_before_any_work(model: LensModel, in_place: bool) -> None:
    compiled: Any = copy_model(model)
    if in_place:
        compiled.compile()
    else:
        compiled = torch.compile(compiled)

    for request in (REQUESTS["patch"], REQUESTS["train"], REQUESTS["evaluate"]):
        with pytest.raises(CtlensError, match="the model is compiled, and hooks do not fire in it"):
            request(compiled, compiled)


def test_every_function_that_takes_pairs_says_how_to_make_them() -> None:
    taking = {name for name, function in FUNCTIONS.items() if "Pairs" in str(inspect.signature(function))}
    told = {
        name for name in taking if "ctlens.pairs" in str((ct.Trainer if name == "Trainer" else FUNCTIONS[name]).__doc__)
    }
    as_another = {"train", "ablate", "logit_attribution"}  # their pairs are "as of" another function

    assert len(taking) > 30 and taking - told <= as_another


def test_pairs_from_a_generator_are_all_pairs_everywhere(model: LensModel, plain: Mapping[str, str]) -> None:
    drawn = loose.train(model, iter(PAIRS), [ct.ACT(), ct.BCT()], config=TRAINED, **QUIET).history
    evaluated = loose.evaluate(model, pairs=(pair for pair in PAIRS), max_new_tokens=2, **QUIET)
    shift = loose.analysis.knockout(model, map(lambda pair: pair, PAIRS), **QUIET)

    assert drawn.to_dataframe().to_csv() == plain["train"]  # with the retention, which reads the pairs a second time
    assert "retention" in plain["train"]
    assert evaluated.to_dataframe().to_csv() == plain["evaluate"]
    assert shift.to_dataframe().to_csv() == plain["knockout"]


# Arguments: every public function, every argument of a kind that its signature names.

OFFERED = [getattr(ct, name) for name in loose.__all__] + list(vars(analysis).values()) + [threats.ask, threats.get]
FUNCTIONS = {found.__name__: found for found in OFFERED if inspect.isfunction(found)} | {"Trainer": ct.Trainer.__init__}
# The first hands all on to a Trainer and its config, the second refuses models itself, and the third makes a `Prompt`.
THROUGH = {"train", "adopt", "prompt"}
WRONG: dict[Any, tuple[Any, ...]] = {
    int: ("a", 1.5, True, [], float("nan")),
    float: ("a", [0.5], True, 1j),
    bool: ("yes", 1),
    str: (3, object(), b"text"),
    Pairs: (["a"], [("a",)], [{"clean": "a"}], "pairs.jsonl", pd.DataFrame({"clean": ["a"]}), {"clean": ["a"]}, 7),
    Prompts: ([""], [3.5], "a", 7),
    Sequence[str]: (3, [3], "text"),
    LensModel: ("gpt2", 3, object()),
}


def wrong_arguments(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """Every argument of a kind in `WRONG`, with every wrong value, and the numbers below 1 of those that count."""
    for argument, hint in get_type_hints(function, include_extras=True).items():
        options = {*(get_args(hint) if get_origin(hint) in (UnionType, Union) else (hint,))} - {NoneType}
        if argument == "return" or not options <= set(WRONG):
            continue
        for value in (value for option in options for value in WRONG[option]):
            if not any(fits(value, option) for option in options):
                yield argument, value
        if argument in BY_NAME:
            yield from ((argument, value) for value in (0, -1))


def fits(value: Any, option: Any) -> bool:
    return isinstance(value, option) and type(value) is not bool if isinstance(option, type) else False


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(CtlensError) as refusal:
        call()
    return str(refusal.value)


def test_every_function_on_offer_goes_through_the_door() -> None:
    door = ct.evaluate.__code__

    assert len(FUNCTIONS) > 40
    assert {name for name, function in FUNCTIONS.items() if function.__code__ is not door} == THROUGH


@pytest.mark.parametrize("name", sorted(set(FUNCTIONS) - THROUGH))
def test_every_wrong_argument_is_named_in_one_sentence(name: str) -> None:
    function = inspect.unwrap(FUNCTIONS[name])
    signature = inspect.signature(function)

    for argument, value in wrong_arguments(function):
        bound = signature.bind_partial(**{argument: value})
        said = message(lambda bound=bound: checked_arguments(function, bound))
        assert said.startswith(f"{argument} must be ") and "\n" not in said, said


def test_the_table_has_what_it_is_made_for() -> None:
    made_for = [case for name in set(FUNCTIONS) - THROUGH for case in wrong_arguments(inspect.unwrap(FUNCTIONS[name]))]

    assert len(made_for) > 500
    assert {argument for argument, _ in made_for} >= {"pairs", "model", "batch_size", "seed", "progress"}


CONFIGS = [ct.TrainConfig, ct.Phase, ct.Until, ct.LoRA, ct.ModelConfig, ct.StudyConfig, Pair, Prompt, Turn]
CONFIGS += [ct.ACT, ct.AttCT, ct.AttMass, ct.AttOut, ct.BCT, ct.F2C, ct.KLCT, ct.MLPCT, ct.RMCT]
NEEDED = {
    ct.Phase: {"steps": 1, "losses": ("act",)},
    ct.Until: {"threat": "sycophancy"},
    ct.ModelConfig: {"d_vocab": 8},
    Pair: {"clean": prompt("a"), "wrapped": prompt("b a")},
    Prompt: {"turns": (Turn("user", "a"),)},
    Turn: {"role": "user", "content": "a"},
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_wrong_field_of_a_config_is_refused(config: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # a user has no checks of types at run time
    config(**NEEDED.get(config, {}))

    for field, value in wrong_arguments(config):
        assert message(lambda field=field, value=value: config(**{**NEEDED.get(config, {}), field: value}))


NEWCOMER: dict[str, Callable[[LensModel], Any]] = {
    "pairs must be a list of pairs, not a str at number 1: a pair is a tuple of a clean and a wrapped prompt, or a": (
        lambda model: loose.train(model, ["a"], ct.ACT())
    ),
    "pairs must be a list of pairs, but number 2: the field 'wrapped' is missing; 'clean' and 'wrapped' are expected. "
    "Make them of two lists of texts with ctlens.pairs(clean, wrapped, good=, bad=), or read a file with": (
        lambda model: loose.train(model, [PAIRS[0], {"clean": "a"}], ct.ACT())
    ),
    "pairs must be a list of pairs or None, but row 1: a prompt or a prefill alone is no pair: put prompts under": (
        lambda model: loose.evaluate(model, pairs=pd.DataFrame({"question": ["a"]}))
    ),
    "unknown loss 'atc'; did you mean 'attct' or 'act'?": lambda model: loose.train(model, PAIRS, "atc"),
    "config must be a TrainConfig or None, not a dict.": lambda model: loose.train(model, PAIRS, ct.ACT(), config={}),
    "steps must be a whole number, not 'a'.": lambda model: loose.train(model, PAIRS, ct.ACT(), steps="a"),
    "steps must be a whole number, not 1.5.": lambda model: loose.train(model, PAIRS, ct.ACT(), steps=1.5),
    "steps must be at least 1, not 0.": lambda model: loose.train(model, PAIRS, ct.ACT(), steps=0),
    "clean must be a Prompt, not 'a'. Make one of a text or of chat messages": lambda model: loose.Pair("a", "b"),
    "turns must be a list of Turn objects, not 'a'. Make a prompt of a text with ctlens.prompt.": lambda model: (
        loose.Prompt("a")
    ),
    "path must be a text or a path, not a DataFrame.": lambda model: loose.load_pairs(pd.DataFrame()),
    "max_new_tokens must be at least 1, not 0.": lambda model: loose.evaluate(model, pairs=PAIRS, max_new_tokens=0),
    "threats names 'sycophancy' twice: name each once.": lambda model: loose.evaluate(model, ["sycophancy"] * 2),
    "split names 'train' twice: name each once.": lambda model: loose.evaluate(
        model, ["jailbreak"], split=["train"] * 2
    ),
    "batch_size must be at least 1, not 0.": lambda model: loose.analysis.states(model, PAIRS, batch_size=0),
    "model must be a TransformerLens model, not 'gpt2'. Load it with": lambda model: loose.evaluate("gpt2"),
    "model must be a TransformerLens model, not a Run (give run.model).": lambda model: loose.evaluate(
        ct.train(model, PAIRS, ct.ACT(), steps=1, progress=False), ["sycophancy"]
    ),
    "there are no threats: name at least one, or leave it out": lambda model: ct.evaluate(model, []),
}


@pytest.mark.parametrize("sentence", NEWCOMER)
def test_what_a_newcomer_tries_gets_a_sentence_that_leads_on(sentence: str, model: LensModel) -> None:
    assert message(lambda: NEWCOMER[sentence](model)).startswith(sentence)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (np.int64(3), int),
        (3, float),
        (np.float32(0.5), float),
        (range(3), tuple[int, ...]),
        (np.arange(3), Sequence[int]),
        (["a"], tuple[str, ...]),
        ({"a": 1}, Mapping[str, int]),
        (None, int | None),
        (len, Callable[[str], int]),
        (("a", 1), tuple[str, int]),
    ],
)
def test_what_fits_comes_back_as_it_is(value: Any, hint: Any) -> None:
    assert fitted("argument", value, hint) is value


def test_an_iterator_comes_back_whole() -> None:
    assert fitted("argument", iter("ab"), Sequence[str]) == ("a", "b")
    with pytest.raises(CtlensError, match="argument must be a list of whole numbers, not 'b' at number 2"):
        fitted("argument", iter([1, "b"]), Sequence[int])


def test_an_iterator_in_a_config_stays_whole() -> None:
    assert Prompt(Turn("user", text) for text in ("a",)).turns == (Turn("user", "a"),)  # type: ignore[arg-type]


def test_what_no_list_may_hold() -> None:
    with pytest.raises(CtlensError, match="not a list_iterator at number 1"):
        fitted("groups", [iter([1, 2])], Sequence[Sequence[int]])
    with pytest.raises(CtlensError, match="n_pairs must be at least 1, not 0"):
        fitted("n_pairs", np.array([4, 0]), Sequence[int])
    with pytest.raises(CtlensError, match="sites names .*'b'.* twice"):
        fitted("sites", np.array(["a", "b", "b"]), Sequence[str])
    assert fitted("threats", {"a", "b"}, Sequence[str]) == {"a", "b"}


@pytest.mark.parametrize(
    ("losses", "what"), [(ct.ACT, "not the class ACT itself"), (None, "not None"), ({"name": "act"}, "not a dict")]
)
def test_what_is_no_loss_is_refused_by_what_may_stand_for_one(model: LensModel, losses: Any, what: str) -> None:
    with pytest.raises(CtlensError, match=f"^losses must be a Loss or a text or a list of .*, {what}. Make one, as"):
        loose.train(model, PAIRS, losses, **QUIET)


def test_an_argument_too_many_is_refused_by_the_name_of_the_function() -> None:
    with pytest.raises(TypeError, match="^evaluate\\(\\) got an unexpected keyword argument 'n'"):
        loose.evaluate(None, n=4)


def test_tracked_losses_are_given_by_name_too(model: LensModel) -> None:
    by_name = loose.train(model, PAIRS, "act", config=TRAINED, track=["klct"], **QUIET).history
    assert by_name == ct.train(model, PAIRS, ct.ACT(), config=TRAINED, track=[ct.KLCT()], **QUIET).history


def test_no_pairs_are_one_sentence_everywhere(model: LensModel) -> None:
    analysis = loose.analysis
    calls = [
        lambda: loose.evaluate(model, pairs=[]),
        lambda: loose.train(model, [], ct.ACT()),
        lambda: analysis.logit_lens(model, []),
        lambda: analysis.logit_attribution(model, iter(())),
        lambda: analysis.interpolation(model, model, []),
        lambda: analysis.gap_recovered(model, {"act": model}, []),
        lambda: analysis.wrapper_present([], model.tokenizer),
        lambda: loose.save_pairs("nowhere.jsonl", pd.DataFrame()),
    ]
    for call in calls:
        with pytest.raises(CtlensError, match=r"^there are no pairs: give at least one\.$"):
            call()
