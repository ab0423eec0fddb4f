"""Presets on chat pairs as the published codes train them: whole rendered conversations through HuggingFace's models.

What is restated here takes nothing from the package but the pairs' texts: the conversation is rendered by the
tokenizer's own template and tokenised as one text, and the labels are masked by hand.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.models import CHAT_TEMPLATE, byte_level_tokenizer, hf_model
from helpers.presets import CONTENT, HINT
from torch import Tensor
from torch.nn import functional

import ctlens as ct
from ctlens import losses
from ctlens.core.errors import CtlensError
from ctlens.data.batch import collate
from ctlens.data.chat import Turn, turn_tail
from ctlens.data.pairs import Pair, Prompt, prompt
from ctlens.losses import Forwards, Loss
from ctlens.models.loading import load_model
from ctlens.training.prepare import prepare

ANSWER = "isolated cases"
PREFILL = "Sure, here it is:"
CLOSED_BY_LINES = CHAT_TEMPLATE
CLOSED_BARELY = CHAT_TEMPLATE.replace("{{ eos_token }}\n", "{{ eos_token }}")


def tokenizer_of(template: str) -> Any:
    tokenizer = byte_level_tokenizer(chat=True)
    tokenizer.chat_template = template
    return tokenizer


def encoded(pair: Pair, loss: Loss, template: str = CLOSED_BY_LINES) -> Any:
    """The pair as a training with this loss prepares it."""
    reference = load_model(hf_model("llama"), tokenizer=tokenizer_of(template))
    (row,) = prepare(reference, [pair], [loss], [], ct.TrainConfig()).rows
    return row


def conversation(tokenizer: Any, *texts: str, answered: bool) -> list[int]:
    turns = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=not answered)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def assert_same(model: torch.nn.Module, ours: Tensor, theirs: Tensor) -> None:
    """The same value, and the same gradient of every weight; HuggingFace's softmax of the scores is in float32."""
    weights = list(model.parameters())
    here = torch.autograd.grad(ours, weights, allow_unused=True, retain_graph=True)
    there = torch.autograd.grad(theirs, weights, allow_unused=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    largest = max(gradient.abs().max().item() for gradient in there if gradient is not None)
    assert largest > 0
    for mine, other in zip(here, there, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6 * largest)


@pytest.mark.parametrize("template", [CLOSED_BY_LINES, CLOSED_BARELY], ids=["line break", "no line break"])
@pytest.mark.parametrize("source", ["stack", "stack-frustration"])
def test_bct_trains_on_the_whole_rendered_conversation(source, template) -> None:
    tokenizer = tokenizer_of(template)
    model = hf_model("llama", seed=1).double()
    loss = losses.preset("bct", source)
    row = encoded(Pair(prompt(CONTENT), prompt(HINT + CONTENT), target=ANSWER), loss, template)

    ids = conversation(tokenizer, HINT + CONTENT, ANSWER, answered=True)
    masked = 0 if loss.prompt else len(conversation(tokenizer, HINT + CONTENT, answered=False))
    labels = torch.tensor([-100] * masked + ids[masked:])
    theirs = functional.cross_entropy(model(torch.tensor([ids])).logits[0, :-1], labels[1:])
    logits = model(torch.tensor([row.wrapped.ids + row.answer])).logits
    ours = loss.compute(Forwards(collate([row]), {}, {}, logits), {}).total

    assert list(row.wrapped.ids + row.answer) == ids
    assert_same(model, ours, theirs)


@pytest.mark.parametrize("source", ["irpan", "ctm", "ctlens"])
def test_other_bct_presets_end_at_the_end_token(source) -> None:
    """The renderer of `ctm` ends a conversation there too: a line break would belong to the next message."""
    row = encoded(Pair(prompt(CONTENT), prompt(HINT + CONTENT), target=ANSWER), losses.preset("bct", source))
    tokenizer = byte_level_tokenizer(chat=True)

    whole = conversation(tokenizer, HINT + CONTENT, ANSWER, answered=True)
    assert whole[-2] == tokenizer.eos_token_id
    assert list(row.wrapped.ids + row.answer) == whole[:-1]


def test_bct_on_prefills_trains_from_the_prompt_s_last_token_to_the_prefill_s_last_but_one() -> None:
    model = hf_model("llama", seed=1).double()
    tokenizer = byte_level_tokenizer(chat=True)
    loss = losses.preset("bct", "stack-prefill")
    row = encoded(Pair(prompt(CONTENT), Prompt((Turn("user", CONTENT), Turn("assistant", PREFILL)))), loss)

    clean = conversation(tokenizer, CONTENT, answered=False)
    wrapped = clean + tokenizer(PREFILL, add_special_tokens=False)["input_ids"]
    target = hf_model("llama", seed=0).double()(torch.tensor([clean])).logits.detach()
    positions = slice(len(clean) - 1, len(wrapped) - 1)
    log_q = model(torch.tensor([wrapped])).logits[0, positions].log_softmax(-1)
    each = functional.kl_div(log_q, target[0, -1:].softmax(-1).expand_as(log_q), reduction="none").sum(-1)
    logits = model(torch.tensor([row.wrapped.ids])).logits
    ours = loss.compute(Forwards(collate([row]), {}, {}, logits, target), {}).total

    assert list(row.wrapped.ids) == wrapped
    assert_same(model, ours, each.mean())


@pytest.mark.parametrize("padding", ["right", "left"])
def test_attmass_suppresses_all_but_the_content_for_every_token(padding) -> None:
    """Two pairs of different lengths in one batch; the published code takes them one by one."""
    model = hf_model("llama", seed=1).double()
    model.set_attn_implementation("eager")
    tokenizer = byte_level_tokenizer(chat=True)
    loss = losses.preset("attmass", "stack")
    texts = {HINT: CONTENT, "No: ": CONTENT + CONTENT}
    rows = [encoded(Pair(prompt(content), prompt(hint + content)), loss) for hint, content in texts.items()]
    batch = collate(rows, padding)
    shape = (2, model.config.num_attention_heads, *[batch.wrapped.tokens.shape[1]] * 2)
    patterns = [torch.full(shape, torch.nan, dtype=torch.float64) for _ in model.model.layers]

    terms = []
    for row, (hint, content) in enumerate(texts.items()):
        turns = [{"role": "user", "content": hint + content}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        begin = text.index(content)
        outside = torch.tensor([end <= begin or start >= begin + len(content) for start, end in read["offset_mapping"]])
        attention = model(torch.tensor([read["input_ids"]]), output_attentions=True).attentions
        layers = [(pattern[0] * outside).sum(-1).mean() / outside.sum() for pattern in attention]
        terms.append(torch.stack(layers).mean())
        real = torch.nonzero(batch.wrapped.mask[row])[:, 0]
        for layer, pattern in enumerate(attention):
            patterns[layer][row, :, real] = 0.0  # keys of a real query; the queries of padding stay NaN
            patterns[layer][row, :, real[:, None], real] = pattern[0]
    hooks = {f"blocks.{layer}.attn.hook_pattern": pattern for layer, pattern in enumerate(patterns)}
    bridge = load_model(hf_model("llama"))
    unused = torch.zeros(*batch.wrapped.tokens.shape, 2, dtype=torch.float64)
    ours = loss.compute(Forwards(batch, {}, hooks, unused), loss.factors(bridge)).total

    assert_same(model, ours, torch.stack(terms).mean())


def test_a_tail_is_what_the_template_writes_behind_the_end_token() -> None:
    tokenizer = byte_level_tokenizer(chat=True)
    line_break = tuple(tokenizer("\n", add_special_tokens=False)["input_ids"])

    assert turn_tail(tokenizer) == line_break
    assert turn_tail(tokenizer_of(CLOSED_BARELY)) == ()
    assert turn_tail(tokenizer_of(CHAT_TEMPLATE.replace("{{ eos_token }}", " {{ eos_token }}"))) == line_break
    assert turn_tail(byte_level_tokenizer()) == ()


def test_an_answer_that_was_cut_has_no_tail() -> None:
    """It has no end token, so that the template's line break behind one would be a made-up token."""
    reference = load_model(hf_model("llama"), tokenizer=byte_level_tokenizer(chat=True))
    pair = Pair(prompt(CONTENT), prompt(HINT + CONTENT))
    settings = ct.TrainConfig(max_new_tokens=3)
    plain = prepare(reference, [pair], [ct.BCT()], [], settings)
    tailed = prepare(reference, [pair], [ct.BCT(tail=True)], [], settings)

    assert len(plain.rows[0].answer) == 3
    assert tailed.rows[0].answer == plain.rows[0].answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "prefill", "tail": True}, "leave tail off"),
        ({"early": True}, "early has no effect on the greedy targets"),
    ],
)
def test_an_option_without_an_effect_is_refused(options, message) -> None:
    with pytest.raises(CtlensError, match=message):
        ct.BCT(**options)


def test_losses_on_answers_with_and_without_a_tail_do_not_go_together() -> None:
    reference = load_model(hf_model("llama"), tokenizer=byte_level_tokenizer(chat=True))
    pair = Pair(prompt(CONTENT), prompt(HINT + CONTENT), target=ANSWER)
    both = [ct.BCT(tail=True), losses.KLCT(window="answer")]

    with pytest.raises(CtlensError, match="with and without the template's tail"):
        prepare(reference, [pair], both, [], ct.TrainConfig())
