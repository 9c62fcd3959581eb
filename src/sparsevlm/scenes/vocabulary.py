"""Everything a scene can contain and everything that can be asked or answered about it."""

from dataclasses import dataclass

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
COLOUR_RGB = (
    (208, 36, 36),
    (36, 150, 60),
    (40, 80, 220),
    (236, 214, 40),
    (130, 50, 175),
    (242, 130, 20),
    (60, 205, 225),
    (246, 140, 196),
)
DARK_INK = (False, False, False, True, False, True, True, True)  # which card colours carry dark digits

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
HALVES = ("left", "right", "top", "bottom")

N_CARDS = 3
N_DIGITS = 3
MIN_SHAPES = 3
MAX_SHAPES = 6

# Files of matplotlib's own font folder, so that no font has to be installed or shipped.
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSansMono-Bold.ttf",
    "STIXGeneral.ttf",
    "DejaVuSans-Oblique.ttf",
)

TASKS = ("number", "colour", "exist", "count", "half")


@dataclass(frozen=True)
class Layout:
    """Grid of square cells that a scene is drawn on.

    Parameters
    ----------
    rows, cols : int
        Cells in each direction; every object stays inside its cell.
    cell : int
        Cell side in pixels.
    """

    rows: int = 4
    cols: int = 4
    cell: int = 112

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.rows * self.cols

    @property
    def height(self) -> int:
        """Image height in pixels."""
        return self.rows * self.cell

    @property
    def width(self) -> int:
        """Image width in pixels."""
        return self.cols * self.cell


DEFAULT_LAYOUT = Layout()


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


_WORDINGS: dict[str, tuple[str, ...]] = {
    "number": (
        "What number is on the {colour} card?",
        "Which number does the {colour} card show?",
        "Read the number on the {colour} card.",
    ),
    "colour": ("What colour is the {shape}?", "Which colour does the {shape} have?"),
    "exist": ("Is there {a_colour} {shape}?", "Does the picture show {a_colour} {shape}?"),
    "count": ("How many {colour} shapes are there?", "Count the {colour} shapes."),
    "half": ("Is the {colour} card in the {first} or the {second} half?",),
}


def _texts_of(task: str) -> list[str]:
    """All texts of a task: wording slowest, then colour, then shape or direction."""
    uses_shape, uses_half = task in ("colour", "exist"), task == "half"
    colours = ("",) if task == "colour" else COLOURS
    tails = SHAPES if uses_shape else ("across", "along") if uses_half else ("",)
    return [
        wording.format(
            colour=colour,
            a_colour=_with_article(colour) if colour else "",
            shape=tail,
            first=HALVES[0] if tail == "across" else HALVES[2],
            second=HALVES[1] if tail == "across" else HALVES[3],
        )
        for wording in _WORDINGS[task]
        for colour in colours
        for tail in tails
    ]


N_WORDINGS = {task: len(_WORDINGS[task]) for task in TASKS}

QUESTION_TEXTS: tuple[str, ...] = tuple(text for task in TASKS for text in _texts_of(task))
TEXT_OFFSET = {task: sum(len(_texts_of(earlier)) for earlier in TASKS[:i]) for i, task in enumerate(TASKS)}

_FIRST_NUMBER = 10 ** (N_DIGITS - 1)
_ANSWER_GROUPS: dict[str, tuple[str, ...]] = {
    "number": tuple(str(number) for number in range(_FIRST_NUMBER, 10**N_DIGITS)),
    "colour": COLOURS,
    "exist": ("no", "yes"),
    "count": tuple(str(count) for count in range(MAX_SHAPES + 1)),
    "half": HALVES,
}
ANSWER_TEXTS: tuple[str, ...] = tuple(text for task in TASKS for text in _ANSWER_GROUPS[task])
ANSWER_OFFSET = {task: sum(len(_ANSWER_GROUPS[earlier]) for earlier in TASKS[:i]) for i, task in enumerate(TASKS)}
