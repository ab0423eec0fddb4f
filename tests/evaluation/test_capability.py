"""Capability: distinct clean prompts, paired changes and the perplexity beside them."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.models import Call, made

import ctlens as ct
from ctlens.core.clusters import Clusters, paired_difference
from ctlens.core.types import LensModel
from ctlens.threats import ask

THREATS = ["sycophancy", "conditional"]


@pytest.fixture(scope="module")
def base() -> LensModel:
    return ct.load_organism()


@pytest.fixture(scope="module")
def hurt(base: LensModel) -> LensModel:
    """The organism with half of every weight of its MLPs, which forgets some facts."""
    model = copy.deepcopy(base)
    for name, weight in model.named_parameters():
        if ".mlp." in name:
            weight.data /= 2
    return model


@pytest.fixture(scope="module")
def found(base: LensModel, hurt: LensModel) -> ct.Capability:
    text = "what is the color of mira ? what is the city of mira ?"
    return ct.capability({"base": base, "hurt": hurt, "same": base}, THREATS, text=text, n_prompts=60, progress=False)


def row(found: ct.Capability, threat: str, model: str) -> pd.Series:
    table = found.to_dataframe().set_index(["threat", "model"])
    return table.loc[(threat, model)]


def test_each_clean_question_is_asked_once(base: LensModel, found: ct.Capability) -> None:
    pairs = ct.threats.get("sycophancy").pairs(60, split="heldout")
    texts = {pair.clean.turns[0].content: pair.clean for pair in pairs}  # hints differ, the question does not

    replies = ask(base, list(texts.values()))

    assert row(found, "sycophancy", "base")["n_prompts"] == len(texts) < 60
    assert row(found, "sycophancy", "base")["accuracy"] == np.mean([one.verdict == "good" for one in replies])


def test_a_change_is_of_paired_answers(base: LensModel, hurt: LensModel, found: ct.Capability) -> None:
    pairs = ct.threats.get("sycophancy").pairs(60, split="heldout")
    asked = {pair.clean.turns[0].content: pair for pair in pairs}
    right = {}
    for name, model in (("base", base), ("hurt", hurt)):
        replies = ask(model, [pair.clean for pair in asked.values()])
        right[name] = np.array([one.verdict == "good" for one in replies])
    topics = Clusters.of({"topic": [pair.labels["entity"] for pair in asked.values()]})
    gained = (right["hurt"] & ~right["base"]).astype(float)
    lost = (right["base"] & ~right["hurt"]).astype(float)

    changed = row(found, "sycophancy", "hurt")

    assert changed["change"] == pytest.approx(right["hurt"].mean() - right["base"].mean()) and changed["change"] < 0
    assert (changed["change_low"], changed["change_high"]) == pytest.approx(paired_difference(gained, lost, topics))


def test_a_model_beside_itself_has_not_changed(found: ct.Capability) -> None:
    same, base = row(found, "all", "same"), row(found, "all", "base")

    assert same["change"] == 0 and same["change_low"] <= 0 <= same["change_high"]
    assert same["accuracy"] == base["accuracy"] and np.isnan(base["change"])
    table = found.text_table().set_index("model")
    change = table.loc["hurt", "nats_per_byte"] - table.loc["base", "nats_per_byte"]
    assert table.loc["same", "change_per_byte"] == 0 != change == table.loc["hurt", "change_per_byte"]


def test_all_threats_together_count_a_question_once(base: LensModel) -> None:
    one = ct.capability(base, ["sycophancy"], n_prompts=40, progress=False).to_dataframe()
    own = ct.threats.get("sycophancy")

    class Twin(type(own)):
        name = "twin"

    both = ct.capability(base, [own, Twin()], n_prompts=40, progress=False)

    table = both.to_dataframe().set_index("threat")
    union = {(one.prompt, one.good) for one in both.answers.itertuples()}
    assert list(table.index) == ["sycophancy", "twin", "all"] and list(one["threat"]) == ["sycophancy"]
    assert table.loc["all", "n_prompts"] == len(union) < table["n_prompts"].iloc[:2].sum()


def test_the_text_table_is_the_perplexity(base: LensModel, found: ct.Capability) -> None:
    alone = ct.perplexity(base, "what is the color of mira ? what is the city of mira ?")

    table = found.text_table().set_index("model")

    assert found.texts["base"] == alone and table.loc["base", "nats_per_token"] == alone.nats_per_token
    assert "change_per_byte" in repr(found)


def test_a_model_is_asked_the_threats_whose_words_it_knows(base: LensModel) -> None:
    organism = ct.capability(base, n_prompts=2, progress=False)
    chat = ct.capability(made(n_ctx=512), n_prompts=2, progress=False)

    assert set(organism.answers["threat"]) == set(ct.threats.names())
    assert set(chat.answers["threat"]) == set(ct.threats.natural_names())


def test_what_has_no_sense_is_refused(base: LensModel) -> None:
    with pytest.raises(ct.CtlensError, match="there is no model"):
        ct.capability({})
    with pytest.raises(ct.CtlensError, match="are of a text: give text= too"):
        ct.capability(base, max_length=8)


def test_the_command_says_the_same(tmp_path: Path, call: Call, base: LensModel) -> None:
    (tmp_path / "text.txt").write_text("what is the color of mira ?")
    line = f"capability --threats sycophancy --n-prompts 8 --text {tmp_path / 'text.txt'} --out {tmp_path / 'a.csv'}"

    shown = json.loads(call(f"{line} --json").out)["tables"]

    own = ct.capability(base, ["sycophancy"], text="what is the color of mira ?", n_prompts=8, progress=False)
    accuracy = own.to_dataframe()["accuracy"].iloc[0]
    assert shown["How many clean prompts are answered well"][0]["accuracy"] == accuracy
    assert shown["How well the text is predicted"][0]["nats_per_byte"] == own.texts["model"].nats_per_byte
    assert pd.read_csv(tmp_path / "a.csv")["accuracy"].iloc[0] == pytest.approx(accuracy)
