"""Multiple choice by the log-probability of whole options; judges of one's own; answers kept on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import Call, byte_level_tokenizer, chat_model, hf_model
from helpers.tiers import unit_first

from ctlens import evaluate, threats
from ctlens.core.config import generator
from ctlens.core.errors import CtlensError
from ctlens.core.types import LensModel
from ctlens.data.chat import Turn, render, token_ids
from ctlens.data.inputs import save_pairs
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.losses import BCT
from ctlens.models.architectures import ARCHITECTURES
from ctlens.models.generation import Sampling, decode, generate
from ctlens.models.loading import generation_config, load_model
from ctlens.models.parameters import present_parameters
from ctlens.models.scoring import Choice, choose
from ctlens.threats import ask, natural_wrappers, wrap
from ctlens.training import TrainConfig, Trainer, train
from ctlens.training.answers import drawn_at

pytestmark = pytest.mark.boundary

OPTIONS = ("\n(A) isolated cases", "\n(B) outbreak", "\n(C) a thing's texture, or an outbreak of it")
QUESTION = Prompt((Turn("user", "Which term best describes the disease?"),), OPTIONS[1], OPTIONS[0], OPTIONS)


@pytest.fixture(scope="module")
def model() -> LensModel:
    return chat_model("llama")


def plainly(model: LensModel, text: str, option: str) -> float:
    """The log-probability of an option, one token a pass."""
    ids = list(token_ids(model.tokenizer, text))
    total = 0.0
    for token in token_ids(model.tokenizer, option):
        with torch.no_grad():
            total += float(model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)[token])
        ids.append(token)
    return total


def biased(model: LensModel, bias: dict[int, float]) -> LensModel:
    """The same unembedding for every state, so that the next token's distribution is known by hand."""
    lens: Any = load_model(hf_model("gpt2"), tokenizer=model.tokenizer)
    weights = present_parameters(lens)
    norm = next(name for name in weights if name.endswith("ln_f.weight"))
    weights[norm].data.zero_()
    shift = next(name for name in weights if name.endswith("ln_f.bias"))
    weights[shift].data.zero_()
    weights[shift].data[0] = 1.0
    unembedding = next(name for name in weights if name.endswith("wte.weight"))
    weights[unembedding].data[:, 0] = -20.0
    for token, value in bias.items():
        weights[unembedding].data[token, 0] = value
    return lens


def test_an_option_is_scored_by_all_its_tokens(model: LensModel) -> None:
    (choice,) = choose(model, [QUESTION])
    text = render(model.tokenizer, QUESTION.turns).text
    for option, found, length in zip(OPTIONS, choice.log_probabilities, choice.lengths, strict=True):
        assert found == pytest.approx(plainly(model, text, option), abs=1e-4)
        assert length == len(token_ids(model.tokenizer, option))
    assert choice.chosen == OPTIONS[max(range(3), key=choice.log_probabilities.__getitem__)]
    assert sum(choice.share(option) for option in OPTIONS) == pytest.approx(1)
    assert math.isnan(choice.share("(D)")) and math.isnan(choice.share(None))


def test_the_published_trap_options_that_share_their_first_token_are_told_apart(model: LensModel) -> None:
    # Scored by first tokens, every option has the probability of the line break, and the tie goes to A.
    tokenizer = model.tokenizer
    firsts = {token_ids(tokenizer, option)[0] for option in OPTIONS}
    assert len(firsts) == 1
    letters = {letter: token_ids(tokenizer, f"\n({letter}")[-1] for letter in "ABC"}
    lens = biased(
        model, {**dict.fromkeys(token_ids(tokenizer, "".join(OPTIONS)), 2.0), letters["A"]: -2.0, letters["B"]: 2.0}
    )
    likely = decode(lens, [render(tokenizer, QUESTION.turns).ids], first_tokens=[tuple(firsts)], max_new_tokens=1)
    assert len(likely.first_probabilities[0]) == 1  # nothing to choose by
    (choice,) = choose(lens, [QUESTION])
    assert choice.chosen == OPTIONS[1]  # B has the likelier letter, and is shorter than C
    (reply,) = ask(lens, [QUESTION])
    assert (reply.answer, reply.verdict) == (OPTIONS[1], "good")


def test_a_tie_is_nobody_s(model: LensModel) -> None:
    options = ("no no", "no  no")
    choice = Choice(options, (-1.5, -1.5), (2, 2))
    assert choice.chosen is None and choice.share("no no") == 0.5
    assert Choice(options, (-3.0, -2.0), (3, 1)).chosen == "no  no"
    assert Choice(options, (-3.0, -2.0), (3, 1)).per_token.chosen == "no no"
    # Two options of equally likely letters, under a model that knows no difference.
    tokenizer = model.tokenizer
    a = token_ids(tokenizer, "(A")[-1]
    b = token_ids(tokenizer, "(B")[-1]
    lens = biased(model, dict.fromkeys((*token_ids(tokenizer, "(A"), a, b), 2.0))
    pair = Prompt(QUESTION.turns, "(A", "(B", ("(A", "(B"))
    (reply,) = ask(lens, [pair])
    assert (reply.answer, reply.verdict, reply.good_probability) == ("", "other", 0.5)


def test_batch_mates_order_and_padding_change_nothing(model: LensModel) -> None:
    others = [Prompt((Turn("user", "Is it? " * n),), "yes", None, ("yes", "no, not at all")) for n in (1, 9, 30)]
    alone = [choose(model, [item])[0] for item in (QUESTION, *others)]
    together = choose(model, [*others, QUESTION], max_batch_tokens=10_000)
    for one, other in zip(alone, [together[-1], *together[:-1]], strict=True):
        assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-4)
        assert one.lengths == other.lengths


def test_an_option_that_fuses_with_the_prompt_is_scored_from_where_they_part() -> None:
    tokenizer = byte_level_tokenizer()
    lens = load_model(hf_model("llama"), tokenizer=tokenizer)
    prompt = Prompt((Turn("user", "I don't th"),), "ink it", None, ("ink it", "e best"))
    ids = render(tokenizer, prompt.turns).ids
    joint = [ids[:1] + token_ids(tokenizer, "I don't th" + option) for option in prompt.options]
    shared = next(i for i, column in enumerate(zip(*joint, ids, strict=False)) if len(set(column)) > 1)
    (choice,) = choose(lens, [prompt])
    for full, found, length in zip(joint, choice.log_probabilities, choice.lengths, strict=True):
        with torch.no_grad():
            steps = lens(torch.tensor([full]))[0].double().log_softmax(-1)
        expected = sum(float(steps[place - 1, full[place]]) for place in range(shared, len(full)))
        assert found == pytest.approx(expected, abs=1e-4) and length == len(full) - shared


def test_what_cannot_be_scored_is_refused(model: LensModel) -> None:
    with pytest.raises(CtlensError, match="no options to choose from"):
        choose(model, [prompt("Why?", "a")])
    with pytest.raises(CtlensError, match="a prompt with its option has .* shorten"):
        choose(model, [Prompt((Turn("user", "Is it? " * 200),), None, None, ("a", "b"))])
    with pytest.raises(CtlensError, match="names neither a good nor a bad answer"):
        ask(model, [Prompt(QUESTION.turns, None, None, OPTIONS)])
    assert choose(model, []) == []


@pytest.mark.parametrize("architecture", unit_first(ARCHITECTURES, 2))
def test_cached_decoding_is_what_longer_and_longer_prompts_give(architecture: str) -> None:
    model = load_model(hf_model(architecture))
    draw = torch.Generator().manual_seed(3)
    prompts = [tuple(torch.randint(1, 380, (n,), generator=draw).tolist()) for n in (3, 11, 8, 3)]
    passes: list[tuple[int, int]] = []
    with model.hooks(
        fwd_hooks=[("blocks.0.hook_resid_pre", lambda value, hook: passes.append(tuple(value.shape[:2])))]
    ):
        together = generate(model, [*prompts, prompts[1]], max_new_tokens=9)
    whole = [rows for rows, width in passes if width > 1]
    assert sum(whole) == 4 and len(passes) == 9 * len(whole)  # each prompt once, then one token a pass
    assert together[-1] == together[1]
    for ids, answer in zip(prompts, together, strict=False):
        for place, token in enumerate(answer):
            with torch.no_grad():
                assert int(model(torch.tensor([ids + answer[:place]]))[0, -1].argmax()) == token


def test_rows_that_end_leave_the_cache_of_the_others() -> None:
    model = load_model(hf_model("gemma2"))
    prompts = [(5, 6, 7), (9, 10, 11, 12, 13, 14, 15, 16), (3,)]
    free = generate(model, prompts, max_new_tokens=12)
    end = free[0][2]
    ended = generate(model, prompts, max_new_tokens=12, ends=(end,))
    for answer, whole in zip(ended, free, strict=True):
        assert answer == (whole[: whole.index(end) + 1] if end in whole else whole)
    assert len({len(answer) for answer in ended}) > 1
    draws = [generate(model, prompts, max_new_tokens=5, sampling=Sampling(generator(seed, "x"))) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


PAIRS = wrap([prompt(f"Is {number} right?", "yes", "no") for number in range(4)], natural_wrappers("jailbreak"))


def test_a_judge_gives_the_verdicts_once_for_all_distinct_answers(model: LensModel) -> None:
    seen: list[tuple[int, int]] = []

    def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[str | None]:
        seen.append((len(prompts), len(answers)))
        return [("bad" if "Is 0" in each.turns[-1].content else None) for each in prompts]

    pairs = [*PAIRS, Pair(Prompt(PAIRS[0].clean.turns), Prompt(PAIRS[0].wrapped.turns))]
    found = evaluate(model, pairs=pairs, judge=judge, max_new_tokens=3, progress=False)
    assert len(seen) == 1 and seen[0] == (10, 10)
    table = found.to_dataframe().query("prompt_side == 'wrapped'").set_index("metric")
    assert table.loc["bad_rate", "value"] == 2 / 5
    assert table.loc["unparsed_rate", "value"] == 3 / 5
    assert table.loc[["bad_rate", "good_rate", "other_rate", "unparsed_rate"], "n_prompts"].tolist() == [5] * 4
    plain = evaluate(model, pairs=PAIRS, max_new_tokens=3, progress=False).to_dataframe()
    assert "unparsed_rate" not in set(plain["metric"])


@pytest.mark.parametrize(
    ("verdicts", "message"),
    [(["good"], "gave 1 verdicts on 8 answers"), (["fine"] * 8, "unknown verdict of the judge 'fine'")],
)
def test_a_judge_that_does_not_answer_is_refused(model: LensModel, verdicts: list[str], message: str) -> None:
    with pytest.raises(CtlensError, match=message):
        evaluate(model, pairs=PAIRS, judge=lambda prompts, answers: verdicts, max_new_tokens=2, progress=False)


def test_an_error_of_a_judge_is_its_own(model: LensModel) -> None:
    with pytest.raises(ZeroDivisionError):
        evaluate(model, pairs=PAIRS, judge=lambda prompts, answers: [1 / 0], max_new_tokens=2, progress=False)


@pytest.mark.parametrize("threat", threats.names())
def test_every_threat_s_metrics_are_had_from_pairs_of_one_s_own(model: LensModel, threat: str) -> None:
    prompts = [prompt(f"Is {number} right?", "yes", "no") for number in range(6)]
    pairs = wrap(prompts, natural_wrappers(threat), {"name": "Ada"}, kind="identity" if threat == "persona" else "")
    pairs = [Pair(pair.clean, pair.wrapped, benign=pair.wrapped, labels=pair.labels) for pair in pairs]
    judged = [("good", "bad", None)[number % 3] for number in range(12)]
    found = evaluate(
        model, [threat], pairs=pairs, judge=lambda given, _: judged[: len(given)], max_new_tokens=2, progress=False
    ).to_dataframe()
    assert {"bad_rate", "good_rate", "other_rate", "unparsed_rate"} <= set(found["metric"])
    own = found[~found["metric"].str.endswith("_rate") & ~found["metric"].str.endswith("_probability")]
    assert len(own) and own["value"].between(-1, 1).all(), threat


def test_brr_of_a_multiple_choice_file_counts_each_prompt_side(model: LensModel, tmp_path: Path) -> None:
    options = ("A) yes", "B) no")
    clean = [Prompt((Turn("user", f"Is {number}? ("),), "A) yes", "B) no", options) for number in range(5)]
    save_pairs(tmp_path / "own.jsonl", wrap(clean, natural_wrappers("sycophancy")))
    from ctlens import load_pairs

    pairs = load_pairs(tmp_path / "own.jsonl")
    found = evaluate(model, ["sycophancy"], pairs=pairs, progress=False)
    outcomes = found.outcomes.set_index(["prompt_side", "item"])
    for (prompt_side, item), row in outcomes.iterrows():
        (choice,) = choose(model, [pairs[item].side(prompt_side)])
        assert row["answer"] == choice.chosen and row["verdict"] == {"A) yes": "good", "B) no": "bad"}[choice.chosen]
        assert row["good_probability"] == pytest.approx(choice.share("A) yes"), rel=1e-4)  # other batches, float32
    prompt_sides = {
        prompt_side: float(part["verdict"].eq("bad").mean())
        for prompt_side, part in found.outcomes.groupby("prompt_side")
    }
    assert found.rate("brr", "wrapped") == pytest.approx(prompt_sides["wrapped"] - prompt_sides["clean"])


CONFIG = TrainConfig(steps=1, batch_size=3, max_new_tokens=4, retention=0)


def answers_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("answers-*.json"))]


def test_sampled_answers_are_kept_and_read_back(
    model: LensModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctlens.training import answers

    options: dict[str, Any] = {"config": CONFIG, "cache_folder": tmp_path, "progress": False}
    first = train(model, PAIRS, BCT(targets="sampled"), **options)
    (kept,) = answers_in(tmp_path)
    ends = sorted({model.tokenizer.eos_token_id, generation_config(model).eos_token_id})
    settings = {"ends": ends, "max_new_tokens": 4, "temperature": 1.0, "top_p": 1.0, "seed": 0}
    assert kept["settings"] == settings
    assert len(kept["answers"]) == len(kept["prompts"]) == len(PAIRS)

    monkeypatch.setattr(answers, "generate", lambda *_, **__: pytest.fail("the answers were there"))
    again = train(model, PAIRS, BCT(targets="sampled"), **options)
    assert again.history.series("bct") == first.history.series("bct")
    monkeypatch.undo()

    fresh = train(model, PAIRS, BCT(targets="sampled"), config=CONFIG, progress=False)
    assert fresh.history.series("bct") == first.history.series("bct")


@pytest.mark.parametrize(
    "change", unit_first(["seed", "weights", "prompts", "template", "kind", "length", "temperature", "nucleus"], 2)
)
def test_another_question_is_another_file(tmp_path: Path, change: str) -> None:
    model = chat_model("llama")
    config = CONFIG
    pairs = PAIRS
    loss = BCT(targets="sampled")
    options: dict[str, Any] = {"cache_folder": tmp_path, "progress": False}
    train(model, pairs, loss, config=config, **options)
    match change:
        case "seed":
            options["seed"] = 1
        case "weights":
            next(iter(present_parameters(model).values())).data.mul_(1.5)
        case "prompts":
            pairs = pairs[1:]
        case "template":
            model.tokenizer.chat_template = "Now: " + model.tokenizer.chat_template
        case "kind":
            loss = BCT()
        case "temperature":
            loss = BCT(targets="sampled", temperature=0.7)
        case "nucleus":
            loss = BCT(targets="sampled", top_p=0.9)
        case "length":
            config = TrainConfig(steps=1, batch_size=3, max_new_tokens=5, retention=0)
    train(model, pairs, loss, config=config, **options)
    assert len(answers_in(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["only answers", "one short", "no tokens", "another question"])
def test_a_damaged_file_of_answers_is_refused(model: LensModel, tmp_path: Path, damage: str) -> None:
    options: dict[str, Any] = {"config": CONFIG, "cache_folder": tmp_path, "progress": False}
    train(model, PAIRS, BCT(targets="sampled"), **options)
    (path,) = tmp_path.glob("answers-*.json")
    held = json.loads(path.read_text())
    changed: dict[str, Any] = {
        "only answers": {"answers": held["answers"]},
        "one short": {**held, "answers": held["answers"][1:]},
        "no tokens": {**held, "answers": [["5"], *held["answers"][1:]]},
        "another question": {**held, "settings": {**held["settings"], "seed": 1}},
    }
    path.write_text(json.dumps(changed[damage]))
    with pytest.raises(CtlensError, match="does not hold the answers to 4 prompts: remove it"):
        train(model, PAIRS, BCT(targets="sampled"), **options)


def test_the_command_takes_a_judge(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    hf_model("llama").save_pretrained("hf")
    byte_level_tokenizer(chat=True).save_pretrained("hf")
    save_pairs("own.jsonl", PAIRS)
    Path("my_judge.py").write_text("def always(prompts, answers):\n    return ['bad'] * len(answers)\n")
    call("--help")  # what saving has written to the terminal is read
    ended = call("evaluate --model hf --pairs own.jsonl --judge my_judge:always --out table.csv")
    assert (ended.code, ended.err) == (0, "") and "100%" in ended.out
    for wrong in ("my_judge:never", "no_such_module:f", "always"):
        refused = call(f"evaluate --model hf --pairs own.jsonl --judge {wrong}")
        assert refused.code == 2 and "--judge takes module:function" in refused.err


def test_a_file_of_answers_that_is_no_json_is_refused(model: LensModel, tmp_path: Path) -> None:
    options: dict[str, Any] = {"config": CONFIG, "cache_folder": tmp_path, "progress": False}
    train(model, PAIRS, BCT(targets="sampled"), **options)
    (path,) = tmp_path.glob("answers-*.json")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CtlensError, match="is not JSON"):
        train(model, PAIRS, BCT(targets="sampled"), **options)


def test_sampled_targets_are_drawn_as_the_loss_says(model: LensModel) -> None:
    def answers(loss: BCT) -> list[tuple[int, ...]]:
        return [row.answer for row in Trainer(model, PAIRS, loss, CONFIG).pairs.rows]

    greedy = answers(BCT())
    assert answers(BCT(targets="sampled", temperature=1e-4)) == greedy
    assert answers(BCT(targets="sampled", top_p=1e-4)) == greedy != answers(BCT(targets="sampled"))
    two = [BCT(targets="sampled"), replace(BCT(targets="sampled"), temperature=0.5)]
    with pytest.raises(CtlensError, match="sampled at different temperatures"):
        drawn_at(two)


def test_a_file_in_the_place_of_the_folder_is_refused_before_the_work(model: LensModel, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "deep"):
        with pytest.raises(CtlensError, match="taken is no folder"):
            train(model, PAIRS, BCT(targets="sampled"), config=CONFIG, cache_folder=folder, progress=False)
