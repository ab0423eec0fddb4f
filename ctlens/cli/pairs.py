"""`ctlens pairs inspect | convert | wrap`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ctlens.cli.common import ModelSource, Seed
from ctlens.cli.output import command, print_table, say
from ctlens.core.errors import CtlensError, UnknownWords, located

if TYPE_CHECKING:
    from ctlens.data.batch import EncodedPair
    from ctlens.data.pairs import Pair

pairs_app = typer.Typer(help="Inspect, convert or make pairs of a clean and a wrapped prompt.", no_args_is_help=True)

File = Annotated[Path, typer.Argument(help="JSONL or CSV file of pairs, in ctlens's format or a published one.")]
WrappedFile = Annotated[
    Path | None, typer.Option(help="File of the wrapped prompts, if the first file holds only the clean ones.")
]
Out = Annotated[Path, typer.Option(help="New JSONL file.")]


@pairs_app.command("inspect")
@command
def inspect_command(
    file: File,
    wrapped: WrappedFile = None,
    model: ModelSource = None,
    pair: Annotated[int, typer.Option(help="Number of the pair to show, counted from 1.")] = 1,
    window: Annotated[
        str,
        typer.Option(
            help="Tokens to align: shared, suffix, content, lines or last; explicit takes those that the pairs name."
        ),
    ] = "shared",
) -> None:
    """Shows one pair token by token with its alignment, and counts how much of the file aligns."""
    from ctlens.cli.common import chosen_tokenizer
    from ctlens.data.formats import read_pairs

    tokenizer = chosen_tokenizer(model)
    reading = read_pairs(file, wrapped)
    if not 1 <= pair <= len(reading.pairs):
        why = f"; rows refused: {len(reading.refused)}, the first {reading.refused[0]}" if reading.refused else "."
        raise CtlensError(f"there is no pair {pair}: the file holds {len(reading.pairs)}, counted from 1{why}")
    with located(f"pair {pair}"):
        _show(tokenizer, reading.pairs[pair - 1], window)
    _coverage(tokenizer, reading.pairs)
    say(f"{len(reading.pairs)} pairs read, {len(reading.refused)} rows refused")
    for reason in reading.refused:
        say(f"  {reason}")


@pairs_app.command("convert")
@command
def convert_command(file: File, out: Out, wrapped: WrappedFile = None) -> None:
    """Converts pairs of a published format to ctlens's own JSONL."""
    from ctlens.core.files import new_file
    from ctlens.data.formats import load_pairs
    from ctlens.data.inputs import save_pairs

    new_file(out, ".jsonl")
    pairs = load_pairs(file, wrapped)
    save_pairs(out, pairs)
    say(f"{len(pairs)} pairs: {out}")


@pairs_app.command("wrap")
@command
def wrap_command(
    prompts: Annotated[Path, typer.Argument(help="JSONL or CSV file of prompts, with or without answers.")],
    threat: Annotated[
        str, typer.Option(help="Threat whose wrappers, written in plain English, are put around the prompts.")
    ],
    out: Out,
    split: Annotated[
        str, typer.Option(help="Split of the wrappers: train or heldout; no wrapper is in both.")
    ] = "train",
    facts: Annotated[
        Path | None, typer.Option(help="File of facts about a persona, put before the prompts as chat turns.")
    ] = None,
    n_facts: Annotated[int, typer.Option(help="Number of facts to put before each prompt; needs --facts.")] = 8,
    prefills: Annotated[
        Path | None, typer.Option(help="CSV file of beginnings of answers, to use instead of the built-in ones.")
    ] = None,
    name: Annotated[str, typer.Option(help="Name of the persona, which the persona's wrappers mention.")] = "",
    kind: Annotated[
        str,
        typer.Option(help="Label of every pair, for the metrics: identity or values (persona), way out (frustration)."),
    ] = "",
    seed: Seed = 0,
) -> None:
    """Puts the wrappers of a threat around plain prompts, and writes the pairs."""
    from ctlens import threats
    from ctlens.core.files import new_file
    from ctlens.data.formats import load_facts, load_prefills, load_prompts
    from ctlens.data.inputs import save_pairs

    new_file(out, ".jsonl")
    if (facts and threat != "persona") or (prefills and threat != "prefill"):
        raise CtlensError("--facts goes with --threat persona, and --prefills with --threat prefill.")
    if name and threat != "persona":
        raise CtlensError("--name goes with --threat persona: the wrappers of other threats name nobody.")
    if facts:
        wrappers = threats.fact_wrappers(load_facts(facts), [n_facts], seed=seed)
    elif prefills:
        wrappers = threats.prefill_wrappers(load_prefills(prefills))
    else:
        wrappers = threats.natural_wrappers(threat, split)
    pairs = threats.wrap(load_prompts(prompts), wrappers, {"name": name} if name else {}, kind=kind, seed=seed)
    save_pairs(out, pairs)
    say(f"{len(pairs)} pairs, of {len(wrappers)} wrappers as many as there are prompts: {out}")


def _show(tokenizer: Any, pair: Pair, window: str) -> None:
    """Prints the wrapped prompt's tokens, each with its clean token, and then the clean tokens without a match."""
    from ctlens.data.batch import encode_pair
    from ctlens.data.token_kinds import token_kinds

    encoded = encode_pair(pair, tokenizer, [window])
    found = encoded.alignments[window]
    clean_kinds, wrapped_kinds = token_kinds(encoded.clean, encoded.wrapped, encoded.answer)
    clean_ids = encoded.clean.ids + encoded.answer
    matched = dict(zip(found.wrapped, found.clean, strict=True))
    rows = [
        (str(position), _token(tokenizer, token), kind, *_twin(matched.get(position)))
        for position, (token, kind) in enumerate(zip(encoded.wrapped.ids + encoded.answer, wrapped_kinds, strict=True))
    ]
    _print_tokens(f"Wrapped prompt, window {window}", ("wrapped", "token", "is", "clean"), rows)
    left = set(range(len(clean_ids))) - set(found.clean)
    alone = [
        (str(position), _token(tokenizer, clean_ids[position]), clean_kinds[position]) for position in sorted(left)
    ]
    if alone:
        _print_tokens("Clean tokens without a match", ("clean", "token", "is"), alone)
    say(f"Window {window}: {found.refusal or f'{found.coverage:.1%} of {found.candidates} clean tokens matched'}")
    for reason, count in found.drops.items():
        say(f"  {count} tokens: {reason}")


def _twin(position: int | None) -> tuple[str]:
    return ("" if position is None else str(position),)


def _token(tokenizer: Any, token: int) -> str:
    """Writes a token with visible line breaks and spaces; a token of half a character is given by its name."""
    text = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    return tokenizer.convert_ids_to_tokens(token) if "\ufffd" in text else text.replace("\n", "\\n").replace(" ", "·")


def _print_tokens(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    import pandas as pd

    print_table(title, pd.DataFrame(rows, columns=list(columns)))


def _coverage(tokenizer: Any, pairs: tuple[Pair, ...]) -> None:
    """Prints how many pairs and tokens of the file each window aligns, and why the rest is left out."""
    import pandas as pd

    from ctlens.core.progress import progress_bar
    from ctlens.data.batch import encode_pair

    windows = ["shared", "content", "suffix", "lines", "last"]
    if any(pair.shared for pair in pairs):
        windows.append("explicit")
    reasons: Counter[tuple[str, str]] = Counter()
    encoded: list[EncodedPair] = []
    shown = progress_bar(pairs, desc="pairs", delay=2, leave=False, shown=True)
    for number, pair in enumerate(shown, start=1):
        try:
            with located(f"pair {number}"):
                encoded.append(encode_pair(pair, tokenizer, windows))
        except UnknownWords:
            raise  # another model's pairs: what aligns in them says nothing
        except CtlensError as error:
            reasons["every window, pairs", str(error)] += 1
    rows = []
    for window in windows:
        found = [row.alignments[window] for row in encoded]
        aligned = [alignment for alignment in found if not alignment.refusal]
        candidates = sum(alignment.candidates for alignment in aligned)
        share = sum(len(alignment.clean) for alignment in aligned) / max(candidates, 1)
        rows.append((window, f"{len(aligned)} of {len(pairs)}", f"{share:.1%}"))
        reasons.update((f"{window}, pairs", alignment.refusal) for alignment in found if alignment.refusal)
        for alignment in aligned:
            reasons.update({(f"{window}, tokens", reason): count for reason, count in alignment.drops.items()})
    print_table("Coverage over the file", pd.DataFrame(rows, columns=["window", "pairs aligned", "their tokens"]))
    for (where, reason), count in reasons.items():
        say(f"  {where}: {count} left out: {reason}")
