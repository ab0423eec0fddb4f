"""Pairs whose wrapper stands in front, for analyses of attention."""

from __future__ import annotations

from ctlens.data.pairs import Pair, prompt

QUESTIONS = (
    "When a creature experiences feeling, what?",
    "Which term best describes the disease?",
    "the best answer is",
)
PAIRS = [Pair(prompt(q, "the", "a"), prompt("no, it's not. " * n + q, "the", "a")) for n, q in enumerate(QUESTIONS, 1)]
NAMES = ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"]
