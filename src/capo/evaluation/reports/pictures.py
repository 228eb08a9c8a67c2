"""Figures as pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping

from matplotlib.figure import Figure


def png_of(figure: Figure, metadata: Mapping[str, str | None] | None = None) -> bytes:
    """The figure as PNG bytes, 110 dots per inch; `metadata` as in `Figure.savefig`."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110, metadata=metadata)
    return png.getvalue()
