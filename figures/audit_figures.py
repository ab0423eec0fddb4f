"""The figures of the page on the audit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pandas as pd
from audited import CHANGE, FAMILIES, LIKELIER, MODES, PAPER, SHIFT, SHOWN, SPLITS, Audited

from ctlens import plots

WIDE = 1100


def figures(found: Audited) -> Iterator[tuple[str, plots.Figure]]:
    """Draws the figures of the page, each with its name."""
    yield "audit-labels", _labels_figure(found)
    yield "audit-eta", _eta_figure(found)
    yield "audit-strength", _strength_figure(found)
    yield "audit-pools", _pools_figure(found)
    yield "audit-regularisers", _regularisers_figure(found)
    yield "audit-misbehaviours", _misbehaviours_figure(found)
    yield "audit-paper", _paper_figure(found)


def _labels_figure(found: Audited) -> plots.Figure:
    panels = {}
    table = found.sycophancy.query("pool == 'wrapped'")
    for likelier, words in LIKELIER.items():
        rows = table[table["bad_likelier"] == likelier]
        panels[f"{words}: change of risk, points"] = (list(dict.fromkeys(rows["method"])), _led(rows))
    return plots.agreement(
        panels,
        "Do prompts go where their labels lead?",
        subtitle="sycophancy, five organisms; 96 wrapped prompts are labelled, 72 others are held out",
        caption="Labels: their risk less the model's own. Prompts: risk after training less that before. Whiskers "
        "are 95% intervals over topics, wrapper texts and organisms.",
    ).update_layout(width=WIDE)


def _eta_figure(found: Audited) -> plots.Figure:
    score = sorted(set(found.eta["score_high"]))
    without = np.full(len(score), np.nan)
    panels = {}
    for likelier, words in LIKELIER.items():
        rows = found.eta[found.eta["bad_likelier"] == likelier]
        curves = {
            str(organism): (group.set_index("score_high")["eta"].reindex(score).to_numpy(), without, without)
            for organism, group in rows.groupby("organism", sort=False)
        }
        slope = rows.groupby("organism")["slope"].first().mean()
        panels[f"{words}: slope {slope:+.2f} per nat"] = plots.CurvePanel(curves, "eta: share that is bad")
    return plots.curve_panels(
        np.exp(score).tolist(),
        panels,
        "Are the answers of which a model is surer the worse ones?",
        x_title="score, as the probability of a token",
        caption="Score: the geometric mean of the probabilities of an answer's tokens; a marker stands at the "
        "upper end of its interval. The slope is that within prompts, mean of the organisms. All is enumerated.",
        subtitle="sycophancy, before training; 96 wrapped prompts, by which answer is the likelier one",
    )


def _strength_figure(found: Audited) -> plots.Figure:
    x = sorted(set(found.strength["strength"]))
    panels = {}
    for pool in dict.fromkeys(found.strength["pool"]):
        rows = found.strength.query("method == 'greedy' and pool == @pool")
        panels[f"{pool} pool"] = plots.CurvePanel(_led(rows), "change of risk, points", levels=(0.0,))
    asked = found.strength.query("method == 'greedy'").groupby("split")["n_prompts"].agg(["min", "max"])
    counted = {split: f"{low} to {high}" for split, low, high in asked.itertuples()}
    return plots.curve_panels(
        x,
        panels,
        "Does the sign turn with the strength of the attack?",
        x_title="strength",
        caption="It was predicted to turn. Labels: their risk less the model's own. Bands are 95% intervals over the "
        "organisms alone, as two wrapper texts have one strength.",
        subtitle=f"greedy labels, five organisms; {counted['pool']} labelled, {counted['heldout']} other prompts each",
    )


def _pools_figure(found: Audited) -> plots.Figure:
    columns = ["pool", "split", "bad_likelier", *CHANGE, *SHIFT]
    whole = pd.concat([found.sycophancy, found.clean.query("prompt_side == 'wrapped'")])
    across = found.across.rename(columns={"trained": "pool", "asked": "bad_likelier"})
    rows = pd.concat([table[table["method"] == "greedy"][columns] for table in (whole, across)])
    pools = list(dict.fromkeys(rows["pool"]))
    panels = {}
    for likelier, words in LIKELIER.items():
        asked = rows[rows["bad_likelier"] == likelier].set_index("pool")
        led = {name: asked[asked["split"] == split].reindex(pools) for split, name in SPLITS.items()}
        panels[f"{words}: change of risk, points"] = (
            pools,
            {name: _curve(table, CHANGE) for name, table in led.items()},
        )
    return plots.agreement(
        panels,
        "Does it matter which prompts are labelled?",
        subtitle="greedy labels, five organisms; 96 labelled prompts, 72 held-out ones, all wrapped",
        caption="Weak: attacks of strength 1 and 2, strong: 3 and 4, of other pairs. Whiskers "
        "are 95% intervals over topics, wrapper texts and organisms.",
    ).update_layout(width=WIDE)


def _regularisers_figure(found: Audited) -> plots.Figure:
    panels = {}
    rows = found.regularisers.query("organism == 'all' and split == 'heldout'")
    for pool, group in rows.groupby("pool", sort=False):
        sides = {f"{side} prompts": group[group["prompt_side"] == side] for side in ("wrapped", "clean")}
        curves = {name: _curve(rows, CHANGE) for name, rows in sides.items()}
        panels[f"{pool} side trained"] = (list(dict.fromkeys(group["method"])), curves)
    return plots.agreement(
        panels,
        "Does a target that moves amplify sycophancy?",
        subtitle="five organisms; change of the risk of 72 held-out pairs, in points",
        caption="The trained side is held to the other one, of the model itself (own) or of the frozen one "
        "(reference). Whiskers are 95% intervals over topics, wrapper texts and organisms.",
    ).update_layout(width=WIDE)


def _misbehaviours_figure(found: Audited) -> plots.Figure:
    panels = {}
    for at, group in found.shown().groupby("prevalence", sort=False):
        kinds = {f"{kind} ({mode})": group[group["kind"] == kind] for kind, mode in MODES.items()}
        curves = {name: _curve(rows.set_index("method").reindex(SHOWN), CHANGE) for name, rows in kinds.items()}
        panels[f"prevalence {at}"] = (SHOWN, curves)
    return plots.agreement(
        panels,
        "Which misbehaviours are amplified, and which suppressed?",
        subtitle="change of the risk of 72 held-out prompts, in points; three organisms",
        caption="Whiskers are 95% intervals over topics and organisms, or these alone, as advice has few topics.",
    ).update_layout(width=WIDE)


def _paper_figure(found: Audited) -> plots.Figure:
    def shares(of: Callable[[str, str], float]) -> dict[str, plots.Curve]:
        of_each = {family: np.array([of(family, kind) for kind in MODES]) for family in FAMILIES}
        return {family: (given, given * np.nan, given * np.nan) for family, given in of_each.items()}

    panels = {"arXiv 2606.03810": (list(MODES.values()), shares(lambda *case: PAPER.get(case, np.nan)))}
    for at in found.prevalences:
        here = shares(lambda family, kind, at=at: found.suppressed(family, kind, at).share)
        panels[f"organisms, prevalence {at}"] = (list(MODES), here)
    figure = plots.agreement(
        panels,
        "How often does each method suppress, in the paper and here?",
        subtitle="share of trainings that lowered risk; here of three organisms",
        caption="Modes stand in one order in all panels. The paper's shares are over models, seeds and label "
        "methods; what is missing was not at hand. Of label methods certainty is measured here.",
    )
    return figure.update_yaxes(range=(-0.05, 1.05)).update_layout(width=WIDE)


def _led(rows: pd.DataFrame) -> dict[str, plots.Curve]:
    """Where labels lead, and where prompts of each split went, by name."""
    splits = {name: _curve(rows[rows["split"] == split], CHANGE) for split, name in SPLITS.items()}
    return {"what the labels are": _curve(rows[rows["split"] == "pool"], SHIFT), **splits}


def _curve(rows: pd.DataFrame, names: Sequence[str]) -> plots.Curve:
    """A number of each row with its interval, in points."""
    value, low, high = 100 * rows[list(names)].to_numpy().T
    return value, low, high
