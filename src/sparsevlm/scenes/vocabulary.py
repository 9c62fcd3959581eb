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
DARK_INK = (False, False, False, True, False, True, True, True)  # which card colours carry dark text

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "diamond", "heart")
HALVES = ("left", "right", "top", "bottom")
PICTURES = ("first", "second")

DIGITS = "0123456789"
LETTERS = "ACEHKLNPRSTU"
GLYPHS = DIGITS + LETTERS
# Only of LETTERS, which no number can be mistaken for.
WORDS = (
    *("CAT", "HAT", "RAT", "CAP", "TAP", "CUP", "PEN", "HEN", "TEN", "NET", "SUN", "RUN", "NUT", "HUT", "CAR", "EAR"),
    *("TEA", "SEA", "LAKE", "CAKE", "PARK", "NEST", "REST", "SEAT", "HEAT", "SALT", "NECK", "TREE", "PLAN", "RACK"),
    *("TUNA", "LUCK"),
)

N_NUMBER_CARDS = 2
N_WORD_CARDS = 1
N_CARDS = N_NUMBER_CARDS + N_WORD_CARDS
N_DIGITS = 3
MAX_GLYPHS = 4
MIN_SHAPES = 4
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

PAIR = "pair"
SINGLE_TASKS = ("number", "word", "colour", "exist", "count", "half", "compare", "list", "box")
TASKS = (*SINGLE_TASKS, PAIR)

BOX_UNIT = 14  # pixels: boxes are told in patches, which do not depend on the size of the picture


@dataclass(frozen=True)
class Layout:
    """Grid of square cells that a scene is drawn on.

    Parameters
    ----------
    rows, cols : int
        Cells in each direction; every object stays inside its cell.
    cell : int
        Cell side in pixels.
    margin : tuple of int
        Pixels that a picture is higher and wider than its grid. The grid lies anywhere within it, so that objects do
        not line up with what a vision tower cuts a picture into.
    """

    rows: int = 4
    cols: int = 4
    cell: int = 112
    margin: tuple[int, int] = (0, 0)

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.rows * self.cols

    @property
    def height(self) -> int:
        """Image height in pixels."""
        return self.rows * self.cell + self.margin[0]

    @property
    def width(self) -> int:
        """Image width in pixels."""
        return self.cols * self.cell + self.margin[1]


# Cells are a little smaller than a window of Qwen2.5-VL's vision tower (112 pixels), and the grid lies anywhere in its
# picture: a model must not find an object by where its window begins.
_CELL = 104
DEFAULT_LAYOUT = Layout(rows=4, cols=4, cell=_CELL, margin=(32, 32))
PAIR_LAYOUT = Layout(rows=3, cols=4, cell=_CELL, margin=(24, 32))
# Visual tokens: 256, 144, 240, 240, 512, 576, 1024.
LAYOUTS: dict[str, Layout] = {
    "square": DEFAULT_LAYOUT,
    "small": Layout(rows=3, cols=3, cell=_CELL, margin=(24, 24)),
    "wide": Layout(rows=3, cols=5, cell=_CELL, margin=(24, 40)),
    "tall": Layout(rows=5, cols=3, cell=_CELL, margin=(40, 24)),
    "panorama": Layout(rows=4, cols=8, cell=_CELL, margin=(32, 64)),
    "large": Layout(rows=6, cols=6, cell=_CELL, margin=(48, 48)),
    "huge": Layout(rows=8, cols=8, cell=_CELL, margin=(64, 64)),
}


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _texts(wordings: tuple[str, ...], arguments: list[dict[str, str]]) -> tuple[tuple[str, ...], ...]:
    """Texts of a task by wording and argument."""
    return tuple(tuple(wording.format(**argument) for argument in arguments) for wording in wordings)


_BY_COLOUR = [{"colour": colour} for colour in COLOURS]
# By task, wording and argument; what an argument stands for is said beside the askers in questions.py.
_TEXTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "number": _texts(
        (
            "What number is on the {colour} card?",
            "Which number does the {colour} card show?",
            "Read the number on the {colour} card.",
        ),
        _BY_COLOUR,
    ),
    "word": _texts(("What word is on the {colour} card?", "Read the word on the {colour} card."), _BY_COLOUR),
    "colour": _texts(
        ("What colour is the {shape}?", "Which colour does the {shape} have?"), [{"shape": shape} for shape in SHAPES]
    ),
    "exist": _texts(
        ("Is there {thing}?", "Does the picture show {thing}?"),
        [{"thing": f"{_with_article(colour)} {shape}"} for colour in COLOURS for shape in SHAPES],
    ),
    "count": _texts(("How many {colour} shapes are there?", "Count the {colour} shapes."), _BY_COLOUR),
    "half": _texts(
        ("Is the {colour} card in the {sides} half?",),
        [{"colour": colour, "sides": sides} for colour in COLOURS for sides in ("left or right", "top or bottom")],
    ),
    "compare": _texts(
        ("Which card shows the larger number, {one} or {other}?", "Is the number on {one} or on {other} larger?"),
        [{"one": one, "other": other} for one in COLOURS for other in COLOURS],
    ),
    "list": _texts(("Read all cards.", "List all cards."), [{}]),
    "box": _texts(
        ("Where is the {thing}?", "Give the box of the {thing}."),
        [{"thing": thing} for thing in (*(f"{colour} card" for colour in COLOURS), *SHAPES)],
    ),
    PAIR: _texts(
        ("{question}",),
        [
            *(
                {"question": f"What number is on the {colour} card in the {picture} picture?"}
                for colour in COLOURS
                for picture in PICTURES
            ),
            *({"question": f"Which picture shows the {colour} card?"} for colour in COLOURS),
        ],
    ),
}

N_WORDINGS = {task: len(_TEXTS[task]) for task in TASKS}
N_ARGUMENTS = {task: len(_TEXTS[task][0]) for task in TASKS}
QUESTION_TEXTS: tuple[str, ...] = tuple(text for task in TASKS for texts in _TEXTS[task] for text in texts)
TEXT_OFFSET = {
    task: sum(N_WORDINGS[earlier] * N_ARGUMENTS[earlier] for earlier in TASKS[:i]) for i, task in enumerate(TASKS)
}

# An answer is a row of pieces; each is one token of the bundled tokenizer.
SPACE, COMMA = " ", ","
PIECES: tuple[str, ...] = (
    *GLYPHS,
    SPACE,
    COMMA,
    *COLOURS,
    *(SPACE + colour for colour in COLOURS),
    "no",
    "yes",
    *HALVES,
    *PICTURES,
)
PIECE_ID = {piece: i for i, piece in enumerate(PIECES)}
NO_PIECE = -1
MAX_PIECES = N_CARDS * (2 + MAX_GLYPHS) + N_CARDS - 1  # a list of all cards
