"""The tables of `README.md` here, as the measured files have them.

Run `python benchmarks/quote.py`, as `make benchmarks` does at its end. A table stands behind a comment that names its
file and columns, `<!-- step.csv: step with, layers, ratio -->`.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

HERE = Path(__file__).parent
PLACE = re.compile(r"^<!-- (\S+\.csv): (.+) -->\n\n(?:\|.*\n)*", flags=re.MULTILINE)


def quoted(page: str, folder: Path = HERE) -> str:
    """Returns the page with each of its tables as the file in the folder has it."""

    def table(place: re.Match[str]) -> str:
        name, columns = place.groups()
        rows = pd.read_csv(folder / name, dtype=str, keep_default_na=False)[columns.split(", ")]
        lines = [list(rows.columns), ["---"] * rows.shape[1], *rows.to_numpy().tolist()]
        return f"<!-- {name}: {columns} -->\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)

    return PLACE.sub(table, page)


if __name__ == "__main__":
    index = HERE / "README.md"
    index.write_text(quoted(index.read_text()))
