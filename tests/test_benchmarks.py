"""What the benchmarks measure with: every loss and analysis runs on their input, and live bytes are counted right."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch

import ctlens as ct
from ctlens.losses import LOSSES
from ctlens.models.counting import Counting
from ctlens.study.conditions import condition_named
from ctlens.training.order import batches

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
PROGRAMS = sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != "quote")


@pytest.fixture
def modules(monkeypatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in ("step", "memory", "analysis", "peer_step", "quote"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import memory
    import step

    monkeypatch.setattr(step, "BATCH", 2)
    return step, memory


def test_every_loss_on_two_passes_takes_a_step_on_their_batch(modules) -> None:
    step, _ = modules
    config = ct.ModelConfig(d_vocab=512, n_layers=1, n_heads=2, d_model=8, d_mlp=8)
    reference = ct.build(config)
    model = ct.build(config, seed=1)
    pairs = step.batch()

    assert pairs.wrapped.tokens.shape == (2, 64) and pairs.opening.tolist() == [1, 1]
    assert {"act", "mlpct", "attct", "bct"} <= step.losses().keys() - {"attct, lifted"} <= LOSSES.keys() | {step.BARE}
    for loss in step.losses().values():
        step.step(reference, model, pairs, loss)


def test_live_bytes_are_those_worked_out_by_hand() -> None:
    seen = []
    with Counting() as live:
        x = torch.zeros(1000, requires_grad=True)
        seen.append(live.now)  # 1000 floats of 4 bytes
        y = (x * 3).exp().sum()  # the exponential stays for the backward pass, its argument does not; one float for y
        seen.append(live.now)
        y.backward()  # a gradient in place of the exponential
        seen.append(live.now)
        view = x.detach().view(10, 100)  # no memory of its own
        seen.append(live.now)
        del x, y, view
    assert seen == [4000, 8004, 8004, 8004]
    assert live.now == 0 and live.peak >= 12_000


@pytest.mark.slow
def test_every_analysis_of_the_benchmark_gives_a_result_with_its_figure(modules) -> None:
    import analysis

    base = ct.load_organism()
    models = analysis.trained(base, steps=1, short=1)
    todo = analysis.analyses(base, models, n=48)

    assert {name.split(",")[0] for name in todo} >= {"probe", "residual_shift", "steer", "erase_or_mask"}
    for name in ("residual_shift", "logit_lens", "logit_attribution"):
        found = todo[name]()
        assert len(found.to_dataframe()) and len(found.figure().data)
    found = analysis.together(base, models)
    alone = analysis.analyses(base, models)
    assert found.keys() == alone.keys()
    for name in ("probe, answer hinted", "residual_shift", "shift_similarity", "logit_lens", "logit_attribution"):
        pd.testing.assert_frame_equal(found[name].to_dataframe(), alone[name]().to_dataframe(), atol=1e-6)
    seen = analysis.held(lambda: torch.zeros(100_000))
    assert 400_000 <= seen < 500_000


def test_another_checkout_has_its_ratio_and_all_together_are_held_against_all_alone(modules) -> None:
    import analysis

    class Timed:
        def __init__(self, seconds: dict[str, float]) -> None:
            self.names = list(seconds)
            self.timed = lambda name: (10 * seconds[name], seconds[name])

    ours = Timed({"steer": 1.0, "ablate": 2.0, analysis.TOGETHER: 1.5})
    table = analysis.table_of(ours, Timed({"steer": 4.0, "ablate": 2.0}), rounds=2)

    assert table["ratio"].to_dict() == {"steer": 4, "ablate": 1, analysis.TOGETHER: 4, analysis.ALONE: 2}
    assert table.loc[analysis.TOGETHER, "wall_s"] == 15 and table.loc[analysis.ALONE, "other_wall_s"] == 60
    alone = analysis.table_of(ours, None, rounds=1)
    assert list(alone) == ["wall_s", "processor_s"] and alone.loc[analysis.ALONE, "processor_s"] == 3


def test_the_benchmark_of_a_real_model_says_when_there_is_none(modules, monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.delitem(sys.modules, "real_model", raising=False)
    monkeypatch.setattr(sys, "argv", ["real_model.py", "--model", str(tmp_path)])
    import real_model

    with pytest.raises(SystemExit) as end:
        real_model.main()
    assert end.value.code == 2 and capsys.readouterr().err.startswith(f"{tmp_path} is not the folder of SmolLM2")


def test_the_gpu_benchmark_says_when_there_is_none(modules, monkeypatch, capsys) -> None:
    monkeypatch.delitem(sys.modules, "gpu", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    import gpu

    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2 and "no GPU here: nothing was measured" in capsys.readouterr().err


@pytest.mark.slow
def test_the_gpu_benchmark_runs_small_on_a_processor(modules, monkeypatch, capsys) -> None:
    for name in ("gpu", "patching"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--device", "cpu"])
    import gpu

    monkeypatch.setattr(gpu, "ROUNDS", 1)
    tables = []
    monkeypatch.setattr(pd.DataFrame, "to_string", lambda table, **_: tables.append(table) or "")
    gpu.main()

    rows = tables[0].set_index("what")
    assert (rows["seconds"] > 0).all() and not (BENCHMARKS / "gpu.csv").exists()
    compared = rows[rows["over"] != ""]
    assert compared["ratio"].notna().all() and set(compared["over"]) <= set(rows.index)
    for loss in ("act", "mlpct", "attct", "bct"):
        assert f"step of {loss}" in rows.index and f"epoch of {loss} as published" in rows.index
    assert "patching sweep by TransformerLens" in rows.index and "organism from scratch" in rows.index


@pytest.mark.slow
@pytest.mark.parametrize("name", ["act", "mlpct", "attct", "bct"])
def test_the_published_loop_and_ctlens_start_at_the_same_loss(modules, name: str) -> None:
    import peer_step

    base = ct.load_organism()
    ours, published = peer_step.trainers(base, ct.threats.get("sycophancy").pairs(32), peer_step.LOSSES[name], steps=2)
    rows = [ours.pairs.rows[row] for row in next(batches([[row] for row in range(32)], ours.config))]
    theirs = [published.step(rows) for _ in range(5)]

    assert ours.take_step().losses["total"] == pytest.approx(theirs[0], rel=1e-5)
    assert theirs[-1] < theirs[0]  # the restatement trains


@pytest.fixture
def choose_rivals(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import choose_rivals

    return choose_rivals


def test_the_best_candidate_that_keeps_clean_and_benign_prompts_is_chosen(choose_rivals) -> None:
    rows = [
        ("retention", "{}", 0.3, 1.0, 0.99),
        ("dpo", '{"weight": 1.0}', 0.8, 0.98, 0.97),  # two points are lost, which is the most
        ("dpo", '{"weight": 4.0}', 0.7, 1.0, 1.0),
        ("dpo", '{"weight": 16.0}', 0.9, 1.0, 0.96),
        ("rmct", '{"weight": 2.5}', 0.6, 0.9, 0.9),
        ("rmct", '{"weight": 10.0}', 0.5, 0.95, 0.95),  # neither keeps them: this loses less
    ]
    table = pd.DataFrame(rows, columns=["arm", "options", "good", "clean", "benign"])

    assert choose_rivals.chosen(table) == {"retention": {}, "dpo": {"weight": 1.0}, "rmct": {"weight": 10.0}}


def test_the_conditions_of_a_study_are_the_choice(choose_rivals) -> None:
    table = pd.read_csv(BENCHMARKS / "choose_rivals.csv")
    candidates = {arm: [json.dumps(options) for options in of] for arm, (_, of) in choose_rivals.ARMS.items()}
    assert {arm: list(of["options"]) for arm, of in table.groupby("arm", sort=False)} == {
        "retention": ["{}"],
        **candidates,
    }
    for arm, options in choose_rivals.chosen(table).items():
        loss = choose_rivals.ARMS[arm][0] if arm in choose_rivals.ARMS else ""
        assert condition_named(arm).losses() == ([ct.losses.get(loss, **options)] if loss else [])
    for arm in ("opct_full", "subact_rest"):
        (loss,) = condition_named(arm).losses()
        assert loss.weight == ct.losses.get(loss.name).weight


def index() -> str:
    return (BENCHMARKS / "README.md").read_text()


def test_the_index_has_every_benchmark_and_every_table_and_no_other() -> None:
    assert sorted(re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \|", index(), flags=re.MULTILINE)) == PROGRAMS
    links = set(re.findall(r"\]\((\w+\.\w+)\)", index()))
    assert {path.name for path in BENCHMARKS.glob("*.csv")} <= links
    assert all((BENCHMARKS / link).exists() for link in links)


def test_a_benchmark_is_quick_where_the_index_says_so() -> None:
    quick = re.findall(r"^\| \[(\w+)\.py\].*`--quick`", index(), flags=re.MULTILINE)

    assert quick == [name for name in PROGRAMS if '"--quick"' in (BENCHMARKS / f"{name}.py").read_text()]


def test_the_index_quotes_the_tables_as_they_are(modules) -> None:
    import quote

    names = [name for name, _ in quote.PLACE.findall(index())]
    assert {"step.csv", "peer_step.csv", "memory.csv"} <= set(names)
    assert index().count("\n| --- |") == len(names)
    assert quote.quoted(index()) == index()


def test_a_quote_that_is_not_the_table_is_seen_and_written_anew(modules, tmp_path: Path) -> None:
    import quote

    (tmp_path / "a.csv").write_text("what,ms,ratio\nx,12,1.50\ny,13,1.6\n")
    page = "One.\n\n<!-- a.csv: what, ratio -->\n\n| what | ratio |\n| --- | --- |\n| x | 1.4 |\n\nTwo.\n"
    found = quote.quoted(page, tmp_path)

    assert found == page.replace("| x | 1.4 |", "| x | 1.50 |\n| y | 1.6 |")
    assert quote.quoted(found, tmp_path) == found


def test_the_sentences_that_quote_a_benchmark_have_its_numbers() -> None:
    sizes = pd.read_csv(BENCHMARKS / "memory_sizes.csv").query("length == 1024 and width == 64 and targets == 'memory'")
    held = sizes[sizes["memory"] == "layers"].set_index("layers")["ratio"]
    ranks = pd.read_csv(BENCHMARKS / "relora.csv", index_col="training")["rank"]

    guide = f"{held[4]:.2f} times the memory of the bare passes on 4 layers, and {held[8]:.2f} times on 8"
    assert guide in (ROOT / "docs/guide.md").read_text()
    plain, restarted = ranks["LoRA, rank 8"], ranks["ReLoRA, rank 8, every 50"]
    relora = f"{plain:.0f} without restarts, {restarted:.0f} with eight starts of rank 8"
    assert relora in (ROOT / "ctlens/organism/relora.py").read_text()
