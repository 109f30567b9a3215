"""Colours and marks of groups and phases: those of Okabe and Ito, which most colour-blind readers can tell apart."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D00")
MARKERS = (("circle", "o"), ("square", "s"), ("diamond", "D"), ("triangle-up", "^"), ("x", "X"), ("star", "*"))
"""Names of plotly and of matplotlib."""

PHASE_COLOURS = {
    "forward": "#0072B2", "gather": "#56B4E9", "noise": "#E69F00", "update": "#D55E00", "exchange": "#CC79A7",
    "data": "#009E73", "evaluation": "#999999", "other": "#CCCCCC",
}  # fmt: skip
"""In the order in which they are stacked."""


def colour(number: int) -> str:
    """Of a group, by its number."""
    return COLOURS[number % len(COLOURS)]


def faint(hexadecimal: str) -> str:
    """The same colour for a band behind a line."""
    red, green, blue = (int(hexadecimal[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"


def markers(number: int) -> tuple[str, str]:
    """Of a group: the shape changes with the colour, and again where colours repeat."""
    return MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
