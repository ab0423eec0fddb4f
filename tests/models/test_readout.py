"""A vector in the last stream is read as the model reads it, whatever the model does behind its unembedding."""

from __future__ import annotations

import pytest
import torch
from helpers.models import hf_model, made, odd_model

from ctlens.core.types import LensModel
from ctlens.models.hooks import resolve, run_capturing
from ctlens.models.loading import load_model
from ctlens.models.readout import read_out

pytestmark = pytest.mark.boundary
TOKENS = torch.arange(24).reshape(2, 12) + 5
KINDS = ("made here", "llama", "granite", "gemma2", "opt", "phi")


def model_of(kind: str) -> LensModel:
    if kind == "made here":
        return made()
    return load_model(hf_model(kind) if kind == "llama" else odd_model(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [0, 7])
def test_the_last_stream_is_read_as_the_model_reads_it(kind: str, position: int) -> None:
    model = model_of(kind)
    name = resolve(model, "resid_post", "last")[0]
    logits, found = run_capturing(model, TOKENS, [name], grad=False)

    torch.testing.assert_close(read_out(model, found[name][:, position]), logits[:, position], atol=1e-5, rtol=1e-5)


def test_a_scale_and_a_cap_are_what_the_configuration_says() -> None:
    """The readout against the norm and the unembedding of plain `transformers`, and arithmetic."""
    stream = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    rules = {"granite": lambda logits: logits / 8, "gemma2": lambda logits: 2 * (logits / 2).tanh()}
    for kind, rule in rules.items():
        hf = odd_model(kind)
        with torch.no_grad():
            plain = hf.lm_head(hf.model.norm(stream[:, None]))[:, 0]  # type: ignore[operator, union-attr]

        found = read_out(load_model(hf), stream)

        torch.testing.assert_close(found, rule(plain), atol=1e-5, rtol=1e-5)
        assert (found - plain).abs().max() > 0.1


def test_nothing_is_left_behind() -> None:
    model = made()
    before = model(TOKENS)
    read_out(model, torch.zeros(2, 32))

    assert torch.equal(model(TOKENS), before)
