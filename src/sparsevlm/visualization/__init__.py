"""Pictures of a report, drawn with matplotlib's own canvas and without touching its global state."""

from .headings import heading
from .overlay import Row, draw_report, draw_rows, save_picture

__all__ = ["Row", "draw_report", "draw_rows", "heading", "save_picture"]
