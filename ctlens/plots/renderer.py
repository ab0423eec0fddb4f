"""The process that draws images; a file of its own so that it can be ended when it gets stuck, and loads no more.

`ctlens.plots.export` starts it with a folder in which `figures.json` lists the JSON files of figures.
It writes their images there by their number, and a byte to `answered` after each figure, drawn or not.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import zlib
from pathlib import Path
from typing import Any, cast

import plotly.io as pio

IMAGES = {"png": 2, "svg": 1}  # the formats, and the pixels of the image for one of the figure
WIDTH = 900  # of figures that do not say how wide they are, in pixels


def draw(source: Path, stem: Path) -> None:
    """Draws the figure in a JSON file as `<stem>.png` and `<stem>.svg`."""
    figure = pio.from_json(source.read_text(encoding="utf-8"))
    for number, trace in enumerate(cast(tuple[Any, ...], figure.data)):
        trace.uid = str(number)  # else by chance, see `_settle`
    for kind, scale in IMAGES.items():
        figure.write_image(f"{stem}.{kind}", format=kind, width=figure.layout.width or WIDTH, scale=scale)
    _settle(stem.with_suffix(".svg"), source.stem)


def _settle(image: Path, name: str) -> None:
    """Takes chance out of an SVG, so that equal figures are equal files.

    plotly names its parts by chance, here they are named by the figure; and it leaves empty styles
    now before and now behind other attributes.
    """
    text = image.read_text(encoding="utf-8").replace(' style=""', "")
    if chance := re.search(r'id="defs-(\w+)"', text):
        settled = f"{zlib.crc32(name.encode()):08x}"
        text = re.sub(rf'((?:id="|#)[a-z-]+){chance[1]}', rf"\g<1>{settled}", text)
    image.write_text(text, encoding="utf-8")


def main(work: Path) -> None:
    """Draws every figure that `figures.json` in the folder lists."""
    scope = pio.kaleido.scope  # type: ignore[attr-defined]
    scope.mathjax = None  # else the browser asks the network for it
    # The browser deadlocks now and then at start-up when it is split into several processes.
    scope.chromium_args += ("--single-process",)
    for number, source in enumerate(json.loads((work / "figures.json").read_text(encoding="utf-8"))):
        with contextlib.suppress(Exception):  # a figure that cannot be drawn must not take the others with it
            draw(Path(source), work / str(number))
        with (work / "answered").open("a") as answered:
            answered.write(".")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
