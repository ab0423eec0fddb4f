"""Four kinds of tokenizer, built in memory: what a space is, and what an unknown character is, differs between them."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHARACTERS = "ab is(.)\n"
"""What the others can spell."""
_TEXTS = ["so it is a b ( a ) .\nis it so ? b a", "so is it (a) (b)"] * 4
WORDS = ("so", "it", "is", "a", "b", "(", ")", ".")
"""What `"words"` knows."""
_SPECIAL = ["<unk>", "<s>", "</s>"]
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def spelling_tokenizer(kind: str) -> Any:
    """A fresh tokenizer of a kind, without a chat template.

    Args:
        kind: `"byte-level"` BPE, as GPT-2's; `"sentencepiece"`, BPE that puts a space before a text by itself and
            has no bytes; `"words"`, one token a word; `"unigram"` with bytes for what it does not know.
    """
    core = {"byte-level": _byte_level, "sentencepiece": _sentencepiece, "words": _words, "unigram": _unigram}[kind]()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _byte_level() -> Tokenizer:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(_TEXTS, _trainer(initial_alphabet=alphabet))
    return core


def _sentencepiece() -> Tokenizer:
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.train_from_iterator(_TEXTS, _trainer(initial_alphabet=sorted(set(CHARACTERS) | {"▁"})))
    return core


def _words() -> Tokenizer:
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*_SPECIAL, *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return core


def _unigram() -> Tokenizer:
    pieces = {"▁": -3.0, "▁a": -2.0, "▁b": -2.1, "▁is": -1.0, "is": -1.5, "it": -1.6} | dict.fromkeys(CHARACTERS, -5.0)
    scores = [*((name, 0.0) for name in _SPECIAL), *pieces.items(), *((byte, -9.0) for byte in _BYTES)]
    core = Tokenizer(models.Unigram(scores, 0, byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]
    )
    return core


def _trainer(initial_alphabet: list[str]) -> trainers.BpeTrainer:
    return trainers.BpeTrainer(
        vocab_size=300, special_tokens=_SPECIAL, initial_alphabet=initial_alphabet, show_progress=False
    )


TOKENIZERS = {kind: spelling_tokenizer(kind) for kind in ("byte-level", "sentencepiece", "words", "unigram")}
