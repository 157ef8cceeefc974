"""Pictures of panels side by side, drawn with matplotlib where it is installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rxt_dist.errors import DataError

_WIDTH_PER_PANEL = 6.0
_HEIGHT = 4.0
_DOTS_PER_INCH = 110

Draw = Callable[[Any], None]
"""Draws into the axes of one panel."""


def draw_panels(path: Path, panels: Sequence[Draw]) -> Path:
    """Write a PNG with one panel for each of ``panels``; an earlier file is replaced.

    Raises:
        DataError: matplotlib is not installed.
    """
    figure_class, agg_canvas = _matplotlib()
    figure = figure_class(figsize=(_WIDTH_PER_PANEL * len(panels), _HEIGHT), layout="constrained")
    # A canvas of its own instead of pyplot: no global state, and no display is ever looked for.
    canvas = agg_canvas(figure)
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes)
        axes.grid(visible=True, alpha=0.3)
    canvas.print_figure(path, dpi=_DOTS_PER_INCH)
    return path


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DataError(
            "drawing curves needs matplotlib, which cannot be imported "
            f"({error}); install it with: pip install 'rxt-dist[monitoring]'"
        ) from error
    return Figure, FigureCanvasAgg
