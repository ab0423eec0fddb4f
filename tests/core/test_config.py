"""A config survives JSON, an unknown option does not; seeds name streams that nothing else disturbs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from ctlens.core.config import environment, from_dict, generator, to_dict
from ctlens.core.errors import CtlensError


@dataclass(frozen=True)
class Options:
    steps: int
    layers: tuple[int, ...] | str = "all"
    labels: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise CtlensError("steps must not be negative.")


@dataclass(frozen=True)
class Outer:
    inner: tuple[Options, ...]
    one: tuple[str, ...] | Options | None = None

    EARLIER_NAMES: ClassVar[dict[str, str]] = {"within": "inner"}


NESTED = [
    Outer(()),
    Outer((Options(1, (2,)), Options(3)), Options(4, labels={"k": {"steps": 1}})),
    Outer((), ("a", "b")),
]


@pytest.mark.parametrize("options", [Options(3), Options(0, (1, 2)), Options(1, (), {"a": None})])
def test_a_config_survives_json(options: Options):
    assert from_dict(Options, json.loads(json.dumps(to_dict(options)))) == options


@pytest.mark.parametrize("outer", NESTED)
def test_the_configs_in_a_config_survive_json(outer: Outer):
    assert from_dict(Outer, json.loads(json.dumps(to_dict(outer)))) == outer


def test_an_earlier_name_is_read_and_a_mistake_deep_inside_is_refused():
    assert from_dict(Outer, {"within": [{"steps": 2}]}) == Outer((Options(2),))
    with pytest.raises(CtlensError, match="unknown option of Options 'stpes'"):
        from_dict(Outer, {"inner": [{"stpes": 2}]})


def test_the_dictionary_holds_plain_values_at_every_depth():
    data = to_dict(Outer((Options(1, (2,), {"k": (3, Options(4))}),)))
    inner = {"steps": 4, "layers": "all", "labels": None}
    assert data == {"inner": [{"steps": 1, "layers": [2], "labels": {"k": [3, inner]}}], "one": None}


def test_an_unknown_option_is_refused_with_the_nearest():
    with pytest.raises(CtlensError, match="unknown option of Options 'stpes'; did you mean 'steps'"):
        from_dict(Options, {"stpes": 3})


def test_a_missing_option_is_named():
    with pytest.raises(CtlensError, match="Options cannot be read: .*'steps'"):
        from_dict(Options, {})


def test_the_checks_of_the_config_itself_still_run():
    with pytest.raises(CtlensError, match="steps must not be negative"):
        from_dict(Options, {"steps": -1})


def draws(seed: int, *scope: object) -> list[int]:
    return torch.randint(1 << 30, (4,), generator=generator(seed, *scope)).tolist()


def test_a_stream_depends_on_the_seed_and_the_scope_alone():
    assert draws(0, "batches") == draws(0, "batches")
    streams = [
        draws(0),
        draws(1),
        draws(0, "batches"),
        draws(0, "retention"),
        draws(0, "batches", 1),
        draws(1, "batches"),
    ]
    assert len({tuple(stream) for stream in streams}) == len(streams)


def test_a_stream_is_the_same_on_every_machine_and_version():
    """The shipped organism and every published seed hang on these numbers."""
    assert generator(0).initial_seed() == 0x5FECEB66FFC86F38 >> 1
    assert generator(0, "batches").initial_seed() == 0x402C26AD4EAF6091 >> 1


def test_the_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draws(0, "x")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert draws(0, "x") == first


def test_the_stamp_names_the_versions_and_survives_json():
    stamp = environment()
    assert {"python", "platform", "threads", "torch", "transformer-lens"} <= stamp.keys()
    assert stamp["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert json.loads(json.dumps(stamp)) == stamp
