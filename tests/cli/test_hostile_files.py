"""Every command that reads a file answers a hostile one with one sentence that names it, and leaves no trace."""

from __future__ import annotations

import json
import os
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from helpers.hostile import BYTES, MARK, OBJECTS
from helpers.models import Call, byte_level_tokenizer, hf_model

from ctlens import cli
from ctlens.core.reading import LINE_LIMIT

GOOD = {"clean": "Is it right?", "wrapped": "I say no.\nIs it right?", "good": "yes", "bad": "no"}
LINE = json.dumps(GOOD).encode() + b"\n"
READERS = {
    "train": "train --quiet --model hf --loss act --out new --pairs {}",
    "evaluate": "evaluate --model hf --out new.csv --pairs {}",
    "patch": "patch --quiet --model hf --out new --site z --direction noising --pairs {}",
    "compare": "compare --quiet --out new --pairs {}",
    "inspect": "pairs inspect {} --model hf",
    "inspect wrapped": "pairs inspect good.jsonl --wrapped {} --model hf",
    "convert": "pairs convert {} --out new.jsonl",
    "wrap": "pairs wrap {} --threat jailbreak --out new.jsonl",
    "facts": "pairs wrap good.jsonl --threat persona --facts {} --out new.jsonl",
    "prefills": "pairs wrap good.jsonl --threat prefill --prefills {} --out new.jsonl",
}
JSONL = {
    **{
        kind: (LINE + content + b"\n" + LINE, f"x.jsonl, line 2: {words}") for kind, (content, words) in OBJECTS.items()
    },
    **{kind: (LINE + content, f"is not UTF-8 text in line 2 ({words})") for kind, (content, words) in BYTES.items()},
    "carriage returns": (LINE.replace(b"\n", b"\r") * 2, "x.jsonl, line 1: its lines end in carriage returns alone"),
    "a long line": (LINE + b'{"clean": "' + b"x" * LINE_LIMIT, f"x.jsonl, line 2: longer than {LINE_LIMIT} bytes"),
    "no bytes": (b"", "x.jsonl holds no rows"),
    "blank lines": (MARK + b"\n \n\r\n", "x.jsonl holds no rows"),
    "NUL bytes": (bytes(100), "x.jsonl, line 1: not JSON"),
}
CSV = {
    "no bytes": (b"", "x.csv is no CSV with a header"),
    "a header alone": (b"prompt,prefill\n", "x.csv holds no rows"),
    "a column twice": (b"prompt,prompt\na,b\n", "x.csv has two columns 'prompt'"),
    "a cell too few": (b"prompt,prefill\na,b\nc\n", "x.csv, row 2: 1 cells, but the header has 2"),
    "an open quote": (b'prompt,prefill\na,"b\n', "x.csv, line 2: no CSV with a header (unexpected end of data)"),
    "carriage returns": (b"prompt,prefill\ra,b\r", "its lines end in carriage returns alone"),
    "a long cell": (b"prompt,prefill\na," + b"x" * 200_000, "x.csv, line 2: no CSV with a header (a cell is longer"),
    "a long line": (b"prompt,prefill\na," + b"x" * LINE_LIMIT, f"x.csv, line 2: longer than {LINE_LIMIT} bytes"),
    "a NUL byte": (b"prompt,prefill\na,b\0\n", "x.csv, row 1: a NUL byte"),
    **{kind: (b"prompt\n" + content, f"UTF-8 text in line 2 ({words})") for kind, (content, words) in BYTES.items()},
}
LABELS = {
    "true": "True",
    "1.5": "1.5",
    "null": "None",
    '["a"]': "['a']",
    '{"a": "b"}': "{'a': 'b'}",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "hf"
    hf_model("llama").save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def place(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a model and a good file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf").symlink_to(model)
    (tmp_path / "good.jsonl").write_bytes(LINE)
    return tmp_path


def refused(call: Call, line: str, words: str) -> None:
    """Runs a command that has to end with one sentence which holds these words, and no new file."""
    before = sorted(Path().iterdir())

    ended = call(line)

    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("ctlens: ") and ended.err.count("\n") == 1 and words in ended.err, ended.err
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("kind", JSONL)
def test_a_hostile_jsonl_is_one_sentence_in_every_command(call: Call, place: Path, kind: str) -> None:
    content, words = JSONL[kind]
    Path("x.jsonl").write_bytes(content)

    for line in READERS.values():
        refused(call, line.format("x.jsonl"), words)


@pytest.mark.parametrize("kind", CSV)
def test_a_hostile_csv_is_one_sentence_in_every_command(call: Call, place: Path, kind: str) -> None:
    content, words = CSV[kind]
    Path("x.csv").write_bytes(content)

    for line in READERS.values():
        refused(call, line.format("x.csv"), words)


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize("kind", ["absent", "folder", "device", "pipe"])
def test_what_is_no_file_is_one_sentence_in_every_command(call: Call, place: Path, kind: str, ending: str) -> None:
    name = f"x.{ending}"
    if kind == "folder":
        Path(name).mkdir()
    elif kind == "device":
        Path(name).symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(name)

    for line in READERS.values():
        refused(call, line.format(name), f"{name} does not exist or is no file")


@pytest.mark.parametrize("value", LABELS)
def test_a_label_of_another_type_is_one_sentence(call: Call, place: Path, value: str) -> None:
    row = json.dumps({**GOOD, "labels": {"kind": "MARK"}}).replace('"MARK"', value)
    Path("x.jsonl").write_bytes(LINE + row.encode())

    for name in ("train", "evaluate", "patch", "compare", "convert"):
        words = f"x.jsonl, line 2: the label 'kind' is {LABELS[value]}, but a text or a whole number is expected"
        refused(call, READERS[name].format("x.jsonl"), words)


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(call: Call, place: Path) -> None:
    rows = json.dumps({**GOOD, "labels": {"k": 1}}).encode() + b"\n" + LINE
    for name, content in (("plain", rows), ("windows", MARK + rows.replace(b"\n", b"\r\n"))):
        Path(f"{name}.jsonl").write_bytes(content)
        assert call(f"pairs convert {name}.jsonl --out {name}.out.jsonl").code == 0
    assert Path("plain.out.jsonl").read_bytes() == Path("windows.out.jsonl").read_bytes()


@pytest.mark.parametrize("line", ["evaluate --out {}", "pairs convert good.jsonl --out {}", "organism card --out {}"])
def test_an_output_that_is_a_device_is_refused_and_stays_one(call: Call, place: Path, line: str) -> None:
    Path("link").symlink_to("/dev/full")
    os.mkfifo("pipe")
    for out in ("/dev/full", "link", "pipe"):
        refused(call, line.format(out), f"{out} is a device, a pipe or a socket: name a plain file")
        assert not Path(out).is_file()


MARKUP = ["[/INST]", "[bold]", "[red]x[/red]", ":apple:", "</s>", "[link=x]"]


def test_tokens_are_no_markup(call: Call, place: Path) -> None:
    tokenizer = byte_level_tokenizer(chat=True)
    tokenizer.add_tokens([*MARKUP, "\x1b[2J"])
    tokenizer.save_pretrained("marked")
    text = "".join(MARKUP) + "\x1b[2J"
    Path("x.jsonl").write_text(json.dumps({"clean": f"what {text}", "wrapped": f"no. what {text}"}))

    ended = call("pairs inspect x.jsonl --model marked")

    assert ended.code == 0, ended.err
    assert all(token in ended.out for token in MARKUP)
    assert "\x1b" not in ended.out and "\\x1b[2J" in ended.out


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_a_console_of_any_encoding_gets_what_it_can_show(
    place: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    byte_level_tokenizer(chat=True).save_pretrained("hf2")
    Path("x.jsonl").write_text(
        json.dumps({"clean": "what \u4e2d \U0001f600 é", "wrapped": "no. what \u4e2d \U0001f600 é"})
    )
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding=encoding, errors="strict"))
    monkeypatch.setattr(sys, "argv", ["ctlens", "pairs", "inspect", "x.jsonl", "--model", "hf2"])

    with pytest.raises(SystemExit) as end:
        cli.main()

    sys.stdout.flush()
    shown = written.getvalue().decode(encoding)
    assert end.value.code == 0 and "1 pairs read, 0 rows refused" in shown
    assert ("?" in shown) == (encoding != "utf-8")
