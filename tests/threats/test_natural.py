"""Wrappers in plain English: whole families, no text in two splits, slots that are filled or refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from helpers.files import DATA, OPTIONS, QUESTION, jsonl, messages
from helpers.models import Call, byte_level_tokenizer

from ctlens import load_pairs, threats
from ctlens.core.errors import CtlensError
from ctlens.data.batch import encode
from ctlens.data.chat import Turn
from ctlens.data.pairs import Prompt, prompt
from ctlens.threats import Wrapper, fact_wrappers, natural_wrappers, prefill_wrappers, wrap

PROMPTS = [prompt(f"Is {number} a prime?", good="yes", bad="no") for number in range(30)]
SLOTS = {"name": "Ada"}


@pytest.mark.parametrize("threat", threats.names())
def test_a_family_has_a_train_and_a_heldout_split_that_share_no_text(threat: str) -> None:
    splits = [natural_wrappers(threat, split) for split in ("train", "heldout")]
    assert all(len(wrappers) >= 3 for wrappers in splits)
    texts = [
        {turn.content for wrapper in wrappers for turn in wrapper.turns} - {"{request}", "{answer}"}
        for wrappers in splits
    ]
    assert not texts[0] & texts[1]
    names = [wrapper.name for wrappers in splits for wrapper in wrappers]
    assert len(set(names)) == len(names)
    assert all(
        any("{request}" in turn.content for turn in wrapper.turns) for wrappers in splits for wrapper in wrappers
    )


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("threat", threats.names())
def test_every_wrapped_prompt_holds_its_request_and_aligns(threat: str, split: str) -> None:
    pairs = wrap(PROMPTS, natural_wrappers(threat, split), SLOTS)
    assert [pair.clean for pair in pairs] == PROMPTS
    assert all("{" not in turn.content for pair in pairs for turn in pair.wrapped.turns)
    encoded = encode(pairs, byte_level_tokenizer(chat=True), windows=["content"], n_ctx=10_000)
    assert len(encoded) == len(PROMPTS) and encoded.coverage("content") > 0.9
    used = Counter(pair.labels["wrapper"] for pair in pairs)
    assert max(used.values()) - min(used.values()) <= 1


def test_wrapping_is_decided_by_the_seed() -> None:
    wrappers = natural_wrappers("jailbreak")
    assert wrap(PROMPTS, wrappers, seed=1) == wrap(PROMPTS, wrappers, seed=1) != wrap(PROMPTS, wrappers, seed=2)


def test_a_hint_is_the_bad_answer_or_another_option() -> None:
    said = Wrapper.single("said", 1, "It is {hint}. {request}")
    (pair,) = wrap([prompt("Why?", "a", "b")], [said])
    assert pair.wrapped.turns[0].content == "It is b. Why?" and pair.labels["hint"] == "b"
    choice = Prompt((Turn("user", QUESTION),), OPTIONS[0], None, OPTIONS)
    hints = {wrap([choice], [said], seed=seed)[0].wrapped.bad for seed in range(12)}
    assert hints == set(OPTIONS[1:])
    with pytest.raises(CtlensError, match="'said' has a slot {hint} that nothing fills"):
        wrap([prompt("Why?")], [said])


def test_earlier_turns_stay_before_the_wrapped_message() -> None:
    chat = Prompt((Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c")))
    (pair,) = wrap([chat], [Wrapper.single("x", 1, "<{request}>")])
    assert [turn.content for turn in pair.wrapped.turns] == ["s", "a", "b", "<c>"]
    with pytest.raises(CtlensError, match="ends in a message of the assistant, not of the user"):
        wrap([Prompt((Turn("user", "a"), Turn("assistant", "b")))], [Wrapper.single("x", 1, "{request}")])


def test_facts_and_prefills_are_literal_and_nested() -> None:
    facts = [(Turn("user", f"q{i}?"), Turn("assistant", f"{{a{i}}}")) for i in range(5)]
    few, many = fact_wrappers(facts, [2, 4], seed=3)
    turns = [wrapper.wrap("Who?") for wrapper in (few, many)]
    assert [len(given) for given in turns] == [5, 9] and turns[0][:4] == turns[1][:4]
    assert {turn.content for turn in turns[1][1:-1:2]} <= {f"{{a{i}}}" for i in range(5)}
    (forced,) = prefill_wrappers(["Use {x}: "])
    assert forced.wrap("Who?")[-1] == Turn("assistant", "Use {x}: ")
    with pytest.raises(CtlensError, match="there are 5 facts"):
        fact_wrappers(facts, [6])


def test_unknown_names_empty_lists_and_short_slots_are_refused() -> None:
    for arguments, message in (
        (("sycophany",), "did you mean 'sycophancy'"),
        (("persona", "entities"), "unknown split"),
    ):
        with pytest.raises(CtlensError, match=message):
            natural_wrappers(*arguments)
    with pytest.raises(CtlensError, match="no wrappers"):
        wrap(PROMPTS, [])
    with pytest.raises(CtlensError, match="30 prompts, but slots for 2"):
        wrap(PROMPTS, natural_wrappers("persona"), [SLOTS, SLOTS])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_level_tokenizer(chat=True).save_pretrained(tmp_path / "tokenizer")
    jsonl(tmp_path / "clean.jsonl", {"messages": messages(QUESTION + "Be quick", "A) a cork")})
    jsonl(tmp_path / "biased.jsonl", {"messages": messages("I say B.\n" + QUESTION + "Be brief", "A) a cork")})
    jsonl(tmp_path / "prompts.jsonl", {"prompt": "Why?"}, {"prompt": "Who are you?"})
    jsonl(tmp_path / "facts.jsonl", *({"messages": messages(f"q{i}?", f"a{i}")} for i in range(3)))
    return tmp_path


def test_a_pair_is_shown_token_by_token_with_its_coverage(call: Call, folder: Path) -> None:
    ended = call(
        f"pairs inspect {folder}/clean.jsonl --wrapped {folder}/biased.jsonl --model {folder}/tokenizer --window lines"
    )
    assert (ended.code, ended.err) == (0, "")
    rows = [line.split() for line in ended.out.splitlines()]
    assert ["0", "<s>", "template"] in rows
    assert next(row for row in rows if row[1:2] == ["Wh"] or row[1:2] == ["Which"])[-1].isdecimal()
    assert "1 pairs read, 0 rows refused" in ended.out
    assert ["shared", "0", "of", "1", "0.0%"] in rows and ["last", "1", "of", "1", "100.0%"] in rows
    assert "content, pairs: 1 left out: the text of the window is not in the wrapped prompt" in ended.out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("inspect {0}/clean.jsonl --wrapped {0}/biased.jsonl --model {0}/tokenizer --pair 2", "there is no pair 2"),
        (
            "inspect {0}/clean.jsonl --model {0}/tokenizer",
            "the file holds 0, counted from 1; rows refused: 1, the first {0}/clean.jsonl",
        ),
        ("inspect {0}/clean.jsonl --wrapped {0}/biased.jsonl --model {0}", "holds no tokenizer"),
        ("inspect {0}/clean.jsonl --wrapped {0}/biased.jsonl --model {0}/x", "is no folder"),
        ("inspect {0}/absent.jsonl --model {0}/tokenizer", "does not exist"),
        (
            "inspect {0}/clean.jsonl --wrapped {0}/biased.jsonl --model {0}/tokenizer --window line",
            "did you mean 'lines'",
        ),
        ("convert {0}/clean.jsonl --out {0}/x.jsonl", "name the file of the wrapped prompts too"),
        ("convert {0}/clean.jsonl --out {0}/prompts.jsonl", "exists already"),
        (
            "wrap {0}/prompts.jsonl --threat sycophancy --out {0}/x.jsonl",
            "{{hint}} that nothing fills: give each prompt a wrong answer in the field 'bad', or 'messages'",
        ),
        ("wrap {0}/prompts.jsonl --threat prefill --facts {0}/facts.jsonl --out {0}/x.jsonl", "--threat persona"),
        ("wrap {0}/prompts.jsonl --threat persona --facts {0}/facts.jsonl --out {0}/x.jsonl", "there are 3 facts"),
    ],
)
def test_mistakes_are_one_sentence_and_write_nothing(call: Call, folder: Path, line: str, message: str) -> None:
    before = sorted(folder.iterdir())
    ended = call("pairs " + line.format(folder))
    assert ended.code == 2 and message.format(folder) in ended.err and ended.err.count("\n") == 1
    assert sorted(folder.iterdir()) == before


def test_files_are_converted_and_prompts_wrapped(call: Call, folder: Path) -> None:
    assert call(f"pairs convert {folder}/clean.jsonl --wrapped {folder}/biased.jsonl --out {folder}/x.jsonl").code == 0
    assert load_pairs(folder / "x.jsonl") == load_pairs(folder / "clean.jsonl", folder / "biased.jsonl")
    facts = f"--threat persona --facts {folder}/facts.jsonl --n-facts 2"
    for number, options in enumerate(("--threat jailbreak", "--threat persona --name Ada --split heldout", facts)):
        ended = call(f"pairs wrap {folder}/prompts.jsonl {options} --out {folder}/{number}.jsonl")
        assert (ended.code, ended.err) == (0, "")
        assert [pair.clean for pair in load_pairs(folder / f"{number}.jsonl")] == [
            prompt("Why?"),
            prompt("Who are you?"),
        ]


@pytest.mark.skipif(not DATA.is_dir(), reason="the published data are not here")
def test_published_prompts_facts_and_prefills_make_pairs_that_align() -> None:
    from ctlens import load_facts, load_prefills, load_prompts

    puzzles = load_prompts(DATA / "frustration/puzzles.jsonl")
    families = {
        "rejected": wrap(puzzles, natural_wrappers("frustration"), {"answer": "Let me think."}),
        "facts": wrap(puzzles, fact_wrappers(load_facts(DATA / "persona/genghis.jsonl"), [4, 8])),
        "prefills": wrap(puzzles, prefill_wrappers(load_prefills(DATA / "prefill/prefixes.csv"))),
    }
    for pairs in families.values():
        encoded = encode(pairs, byte_level_tokenizer(chat=True), windows=["content"], n_ctx=100_000)
        assert len(encoded) == 15 and encoded.coverage("content") == 1.0
