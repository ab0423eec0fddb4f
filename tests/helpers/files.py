"""Lines and conversations as the field's files hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[3] / "shared" / "data"
QUESTION = "Which floats?\n\nAnswer choices:\n(A) a cork\n(B) a coin\n(C) a brick\n"
OPTIONS = ("A) a cork", "B) a coin", "C) a brick")


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def messages(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
