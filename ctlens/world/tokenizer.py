"""A word-level tokenizer with a chat template: one word of the micro-world is one token."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from ctlens.core.errors import CtlensError

BOS = "<bos>"
END = "<end>"
PAD = "<pad>"
UNKNOWN = "<unk>"
ROLE_MARKS = ("<sys>", "<user>", "<assistant>")
SPECIAL = (PAD, BOS, END, UNKNOWN, *ROLE_MARKS)

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ ' <sys> ' if message['role'] == 'system' else ' <' + message['role'] + '> ' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <assistant>' }}{% endif %}"
)


def build_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Builds a fast tokenizer whose tokens are the special tokens and then `words`, in alphabetical order.

    A word that it does not know becomes `<unk>`. An answer ends with `<end>`; a conversation reads
    `<bos> <sys> ... <user> ... <assistant> ... <end>`.

    Raises:
        CtlensError: a word holds white space or is a special token.
    """
    ordered = sorted(set(words))
    for word in ordered:
        if word in SPECIAL or word.split() != [word]:
            raise CtlensError(
                f"{word!r} cannot be a word of the tokenizer: give a word without white space that is no special token."
            )
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *ordered))}
    backend = Tokenizer(WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=list(ROLE_MARKS),
        add_bos_token=True,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
        name_or_path="ctlens-world",
    )
