"""Alignment: which token positions of a clean and a wrapped prompt hold the same token of the same content.

Every loss and every analysis takes its positions from here; none slices by itself. A pair of
positions is kept only when both hold the same token id, so an alignment can be short but not wrong.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from itertools import accumulate, pairwise

from ctlens.core.errors import unknown
from ctlens.data.chat import Rendered
from ctlens.data.spelling import Span

WINDOWS = ("shared", "suffix", "content", "explicit", "lines", "last", "answer")

FUSED = "token fused across the boundary of the window"
RETOKENISED = "token split differently in the wrapped prompt"
UNSHARED = "token outside the shared part"

_ADDED: Span = (0, 0)
"""The characters of a BOS that the tokenizer added: none."""


@dataclass(frozen=True)
class Alignment:
    """The matched positions of one clean and one wrapped prompt, in a named window.

    Attributes:
        window: one of `WINDOWS`.
        clean: positions in the clean prompt, increasing.
        wrapped: the position of the same token in the wrapped prompt, one per entry of `clean`.
        candidates: how many clean tokens the window asks for, see `align`.
        drops: how many candidates have no match, by reason.
        refusal: why no token was matched; empty when one was.
    """

    window: str
    clean: tuple[int, ...]
    wrapped: tuple[int, ...]
    candidates: int
    drops: Mapping[str, int] = field(default_factory=dict)
    refusal: str = ""

    @property
    def coverage(self) -> float:
        """The share of the candidates that were matched, 0 to 1."""
        return len(self.clean) / self.candidates if self.candidates else 0.0


def align(
    clean: Rendered,
    wrapped: Rendered,
    window: str = "shared",
    *,
    shared: Sequence[str] = (),
    answer: Sequence[int] = (),
) -> Alignment:
    """Matches the positions of two prompts in a window.

    Windows:
        - `suffix`: the longest common run of tokens at the end of both prompts.
        - `content`: the clean prompt's last message, found in the messages of the wrapped prompt; where that message
          begins the answer, the one before it too.
        - `explicit`: the texts `shared`, each found in the messages of both prompts, so that both sides
          may be wrapped differently, and hold the texts in another order.
        - `shared`: the content, or the texts `shared` where they are named, and the common suffix behind the last
          message of both prompts (with that message, where both prompts begin the answer with it).
          Text behind the request does not hide the request (as it does from `suffix`), and the
          answer's position is in (as it is not in `content`) unless the wrapper is a prefill.
        - `lines`: the lines that the last messages of both prompts have in common, in order, and the
          common suffix behind both. For prompts that a wrapper interrupts or rewords in part.
        - `last`: the last token of both prompts, from which the answer is predicted. Prompts that
          end in different tokens, as most prefills do, are refused.
        - `answer`: the tokens that predict the answer which follows both prompts: the last token of
          the prompts, where it is the same, and every token of the answer but its last.

    The candidates, which `Alignment.coverage` counts, are the clean tokens that a window asks for:

    | window | candidates |
    |---|---|
    | `suffix`, `shared`, `lines` | every token of the clean prompt but a BOS that the tokenizer added |
    | `content`, `explicit` | the tokens of the texts |
    | `last`, `answer` | the tokens that the window names |

    A prompt whose content cannot be found is refused by `shared` too: its suffix alone would be another window.

    Args:
        clean, wrapped: from `ctlens.data.chat.render`.
        window: one of `WINDOWS`.
        shared: the texts of the `explicit` window, and of `shared` if there are any.
        answer: the tokens behind both prompts, for the `answer` window.

    Raises:
        CtlensError: the window is unknown.
    """
    if window not in WINDOWS:
        raise unknown("alignment window", window, WINDOWS)
    if window == "suffix":
        return _finish(window, clean, _suffix(clean, wrapped), range(len(clean.ids)))
    if window == "last":
        return _last(clean, wrapped)
    if window == "answer":
        return _answer(clean, wrapped, len(answer))
    if window == "lines":
        return _lines(clean, wrapped)
    if window == "content" or (window == "shared" and not shared):
        texts = [(clean.text[slice(*span)], [span]) for span in _request(clean)]
    else:
        texts = [(text, _find_all(clean, text)) for text in shared or ("",)]
    return _align_texts(window, clean, wrapped, texts, with_tail=window == "shared")


def _request(prompt: Rendered) -> Sequence[Span]:
    """The last message; where that one begins the answer, the message before it too."""
    begun = prompt.roles[-1] == "assistant" and len(prompt.contents) > 1
    return prompt.contents[-2:] if begun else prompt.contents[-1:]


def _suffix(clean: Rendered, wrapped: Rendered) -> dict[int, int]:
    length = 0
    while length < min(len(clean.ids), len(wrapped.ids)) and clean.ids[-1 - length] == wrapped.ids[-1 - length]:
        length += 1
    c, w = len(clean.ids) - length, len(wrapped.ids) - length
    return {c + i: w + i for i in range(length) if clean.offsets[c + i] != _ADDED}


def _last(clean: Rendered, wrapped: Rendered) -> Alignment:
    here, there = len(clean.ids) - 1, len(wrapped.ids) - 1
    ends = {here: there} if here in _suffix(clean, wrapped) else {}
    found = _finish("last", clean, ends, [here])
    return replace(found, refusal="the prompts end in different tokens") if found.refusal else found


def _answer(clean: Rendered, wrapped: Rendered, length: int) -> Alignment:
    """The answer is the same behind both prompts; only the token that predicts its first may differ."""
    ends = (len(clean.ids) - 1, len(wrapped.ids) - 1)
    first = 0 if clean.ids[-1] == wrapped.ids[-1] else 1
    pairs = [(ends[0] + step, ends[1] + step) for step in range(first, length)]
    drops = {UNSHARED: first} if first and length else {}
    return Alignment(
        window="answer",
        clean=tuple(clean_position for clean_position, _ in pairs),
        wrapped=tuple(wrapped_position for _, wrapped_position in pairs),
        candidates=length,
        drops=drops,
        refusal="" if pairs else "there is no answer to align at",
    )


def _lines(clean: Rendered, wrapped: Rendered) -> Alignment:
    """Each run of common lines is a window of its own; a token that reaches out of it is dropped."""
    here = _lines_of(clean)
    there = _lines_of(wrapped)
    clean_texts = [clean.text[slice(*line)] for line in here]
    wrapped_texts = [wrapped.text[slice(*line)] for line in there]
    pairs: dict[int, int] = {}
    lost: dict[int, str] = {}
    for block in SequenceMatcher(None, clean_texts, wrapped_texts, autojunk=False).get_matching_blocks():
        if "".join(clean_texts[block.a : block.a + block.size]).strip():
            left = _joined_lines(here[block.a : block.a + block.size])
            right = _joined_lines(there[block.b : block.b + block.size])
            matched, dropped = _matched_cells(clean, wrapped, left, right)
            pairs |= matched
            lost |= dropped
    return _finish("lines", clean, pairs | _tail(clean, wrapped), range(len(clean.ids)), lost)


def _lines_of(prompt: Rendered) -> list[Span]:
    """The lines of the last message, each with its line break."""
    start, end = prompt.contents[-1]
    lengths = map(len, prompt.text[start:end].splitlines(keepends=True))
    return list(pairwise(accumulate(lengths, initial=start)))


def _joined_lines(lines: Sequence[Span]) -> Span:
    """The characters from the first of neighbouring lines to the end of the last."""
    return lines[0][0], lines[-1][1]


def _tail(clean: Rendered, wrapped: Rendered) -> dict[int, int]:
    """The part of the suffix behind the last message of both prompts, or behind their equal beginning of the answer.

    Inside other messages an equal token may be another part of the text: of a wrapper behind
    the content, or of a prefill.
    """
    here, there = clean.contents[-1], wrapped.contents[-1]
    begun = clean.roles[-1] == wrapped.roles[-1] == "assistant" and len(clean.contents) > 1 < len(wrapped.contents)
    if begun and clean.text[slice(*here)] == wrapped.text[slice(*there)]:
        here, there = clean.contents[-2], wrapped.contents[-2]
    pairs = _suffix(clean, wrapped).items()
    return {c: w for c, w in pairs if clean.offsets[c][0] >= here[1] and wrapped.offsets[w][0] >= there[1]}


def _align_texts(
    window: str,
    clean: Rendered,
    wrapped: Rendered,
    texts: Sequence[tuple[str, Sequence[Span]]],
    *,
    with_tail: bool = False,
) -> Alignment:
    """Matches the tokens of texts that each stand once on each side; the tail counts only where some of these match.

    Args:
        texts: each with where it stands in the clean prompt.
    """
    pairs: dict[int, int] = {}
    lost: dict[int, str] = {}
    candidates: dict[int, None] = {}
    for text, here in texts:
        there = _find_all(wrapped, text)
        if len(here) != 1 or len(there) != 1:
            side, spans = ("clean", here) if len(here) != 1 else ("wrapped", there)
            found = f"occurs {len(spans)} times in" if spans else "is not in"
            return Alignment(window, (), (), 0, refusal=f"the text of the window {found} the {side} prompt")
        matched, dropped = _matched_cells(clean, wrapped, here[0], there[0])
        pairs |= matched
        lost |= dropped
        candidates |= dict.fromkeys(clean.positions(here[0]))
    if with_tail and pairs:
        return _finish(window, clean, pairs | _tail(clean, wrapped), range(len(clean.ids)), lost)
    return _finish(window, clean, pairs, candidates, lost)


def _matched_cells(
    clean: Rendered, wrapped: Rendered, here: Span, there: Span
) -> tuple[dict[int, int], dict[int, str]]:
    """Matched positions of two spans of the same text, and the reason of each clean position without a match."""
    left, right = _cells(clean, here), _cells(wrapped, there)
    crossing = [(begin, end) for begin, end in (*left, *right) if begin < 0 or end > here[1] - here[0]]
    pairs: dict[int, int] = {}
    lost: dict[int, str] = {}
    for cell, positions in left.items():
        twins = right.get(cell, [])
        if cell not in crossing and [clean.ids[c] for c in positions] == [wrapped.ids[w] for w in twins]:
            pairs |= zip(positions, twins, strict=True)
        else:
            fused = any(begin < cell[1] and cell[0] < end for begin, end in crossing)
            lost |= dict.fromkeys(positions, FUSED if fused else RETOKENISED)
    return pairs, lost


def _find_all(prompt: Rendered, text: str) -> list[Span]:
    """The characters of every occurrence of `text` in the prompt's messages, overlaps included."""
    spans: list[Span] = []
    for start, end in prompt.contents:
        index = prompt.text.find(text, start, end) if text else -1
        while index >= 0:
            spans.append((index, index + len(text)))
            index = prompt.text.find(text, index + 1, end)
    return spans


def _cells(prompt: Rendered, span: Span) -> dict[Span, list[int]]:
    """Groups the positions that touch a span by their characters, counted from its start.

    Byte-level tokenizers cut one character into several tokens. These share a cell, which matches
    as a whole or not at all: a part of it could be shifted by a byte.
    """
    cells: defaultdict[Span, list[int]] = defaultdict(list)
    for position in prompt.positions(span):
        left, right = prompt.offsets[position]
        cells[left - span[0], right - span[0]].append(position)
    return dict(cells)


def _finish(
    window: str,
    clean: Rendered,
    pairs: Mapping[int, int],
    candidates: Iterable[int],
    lost: Mapping[int, str] | None = None,
) -> Alignment:
    """Each candidate is matched or dropped for one reason, whatever stretches of text it stands in."""
    wanted = [c for c in candidates if clean.offsets[c] != _ADDED]
    reasons = lost or {}
    found = dict(sorted(pairs.items()))
    return Alignment(
        window=window,
        clean=tuple(found),
        wrapped=tuple(found.values()),
        candidates=len(wanted),
        drops=dict(Counter(reasons.get(c, UNSHARED) for c in wanted if c not in pairs)),
        refusal="" if pairs else "the prompts share no token in this window",
    )


def opening(clean: Rendered, wrapped: Rendered) -> int:
    """Counts the tokens that both prompts begin with before their last messages: BOS, template, earlier messages.

    No window holds these tokens, but attention rests on them, on the BOS above all.
    """
    length = 0
    for position, (here, there) in enumerate(zip(clean.ids, wrapped.ids, strict=False)):
        inside = any(side.offsets[position][1] > side.contents[-1][0] for side in (clean, wrapped))
        if here != there or inside:
            break
        length += 1
    return length


def wrapper_positions(clean: Rendered, wrapped: Rendered) -> tuple[int, ...]:
    """Finds the positions of the wrapped prompt that the attack added: its messages without the clean messages.

    Empty where the clean content does not stand in the wrapped prompt exactly once, or another
    clean message stands there several times: which part was added is then not known.
    """
    *earlier, content = [_find_all(wrapped, clean.text[slice(*span)]) for span in clean.contents]
    if len(content) != 1 or any(len(found) > 1 for found in earlier):
        return ()
    kept = {position for found in (*earlier, content) for span in found for position in wrapped.positions(span)}
    messages = {position for span in wrapped.contents for position in wrapped.positions(span)}
    return tuple(sorted(messages - kept))
