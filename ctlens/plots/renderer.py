"""The program that draws images: a process of its own, so that it can be ended when it gets stuck.

`ctlens.plots.export` starts it with a folder in which `figures.json` lists the JSON files of figures.
It writes their images there by their number, and a byte to `answered` after each figure, drawn or not.
It imports nothing of ctlens, so that it starts fast.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import plotly.io as pio

IMAGES = {"png": 2, "svg": 1}  # the formats, and how many pixels of the image one pixel of the figure becomes
_USUAL_SIZE = (900, 500)  # pixels, of figures that do not say how wide and high they are; chosen by eye


def draw(source: Path, stem: Path) -> None:
    """Draws the figure in a JSON file as `<stem>.png` and `<stem>.svg`, in the browser that `browser` has started."""
    import kaleido

    figure = pio.from_json(source.read_text(encoding="utf-8"))
    for number, trace in enumerate(cast(tuple[Any, ...], figure.data)):
        trace.uid = str(number)  # plotly chooses it by chance otherwise, see `_settle`
    layout = cast(Any, figure.layout)
    size = {"width": layout.width or _USUAL_SIZE[0], "height": layout.height or _USUAL_SIZE[1]}
    for kind, scale in IMAGES.items():
        image = kaleido.calc_fig_sync(figure.to_dict(), {"format": kind, "scale": scale, **size})
        Path(f"{stem}.{kind}").write_bytes(image)
    _settle(stem.with_suffix(".svg"), source.stem)


def _settle(image: Path, name: str) -> None:
    """Takes chance out of an SVG, so that equal figures are equal files.

    plotly gives the parts of an image a random name, which becomes one made from the figure's name; and it
    writes empty styles now before and now behind other attributes, so they are dropped.
    """
    text = image.read_text(encoding="utf-8").replace(' style=""', "")
    if chance := re.search(r'id="defs-(\w+)"', text):
        settled = f"{zlib.crc32(name.encode()):08x}"
        text = re.sub(rf'((?:id="|#)[a-z-]+){chance[1]}', rf"\g<1>{settled}", text)
    image.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def browser() -> Iterator[None]:
    """Starts the Chrome or Chromium of this machine, with a page that asks no network, and ends it."""
    import kaleido

    kaleido.start_sync_server(n=1, page_generator=kaleido.PageGenerator(mathjax=False))
    try:
        yield
    finally:
        kaleido.stop_sync_server()


def draw_listed(work: Path) -> None:
    """Draws every figure that `figures.json` in the folder lists."""
    with browser():
        for number, source in enumerate(json.loads((work / "figures.json").read_text(encoding="utf-8"))):
            try:
                draw(Path(source), work / str(number))
            except Exception:  # a figure that cannot be drawn must not take the others with it, nor leave half an image
                for left in work.glob(f"{number}.*"):
                    left.unlink()
            with (work / "answered").open("a") as answered:
                answered.write(".")


if __name__ == "__main__":
    draw_listed(Path(sys.argv[1]))
