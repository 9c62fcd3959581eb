"""Words that pictures show; of each list every fourth is held out for evaluation."""

from __future__ import annotations

import random

from .splits import EVALUATION, part

_LISTS = {
    "given": (
        *("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Irene", "Jonas", "Karen", "Leo"),
        *("Maria", "Nora", "Oscar", "Paula", "Ruth", "Simon", "Tessa", "Victor", "Alice", "Boris", "Clara", "Dana"),
        *("Elena", "Frank", "Greta", "Henry", "Ivan", "Julia", "Kurt", "Linda"),
    ),
    "surname": (
        *("Adams", "Baker", "Carter", "Dawson", "Ellis", "Foster", "Grant", "Hayes", "Ingram", "Jensen", "Keller"),
        *("Lopez", "Meyer", "Norton", "Owens", "Parker", "Quinn", "Reyes", "Shaw", "Turner", "Underwood", "Vargas"),
        *("Walker", "Young", "Abbott", "Brooks", "Conway", "Doyle", "Eaton", "Fisher", "Gibson", "Harmon"),
    ),
    "city": (
        *("Amsterdam", "Boston", "Cairo", "Dublin", "Edinburgh", "Florence", "Geneva", "Hamburg", "Istanbul"),
        *("Jakarta", "Krakow", "Lisbon", "Madrid", "Naples", "Oslo", "Prague", "Quito", "Rome", "Seville", "Tokyo"),
        *("Utrecht", "Vienna", "Warsaw", "Zagreb", "Athens", "Bergen", "Cologne", "Denver"),
    ),
    "street": (
        *("Mill Lane", "Oak Street", "River Road", "Park Avenue", "Hill Street", "Station Road", "Garden Way"),
        *("Market Street", "Church Lane", "Bridge Road", "Forest Drive", "Harbour Street", "King Street"),
        *("Lake View", "Meadow Lane", "North Road"),
    ),
    "company": (
        *("Northwind", "Bluefield", "Cedar", "Delta", "Evergreen", "Falcon", "Granite", "Harvest", "Ironwood"),
        *("Juniper", "Keystone", "Lantern", "Maple", "Nimbus", "Orchard", "Pioneer", "Quarry", "Redstone", "Summit"),
        *("Tidewater", "Union", "Vertex", "Willow", "Zenith"),
    ),
    "trade": ("Foods", "Supplies", "Motors", "Books", "Garden", "Textiles", "Media", "Energy"),
    "product": (
        *("Apples", "Bread", "Butter", "Coffee", "Cheese", "Eggs", "Flour", "Grapes", "Honey", "Juice", "Lemons"),
        *("Milk", "Noodles", "Olives", "Onions", "Pasta", "Pepper", "Rice", "Salad", "Soap", "Sugar", "Tea"),
        *("Tomatoes", "Water", "Yogurt", "Bananas", "Beans", "Biscuits", "Carrots", "Cereal", "Garlic", "Mustard"),
    ),
    "topic": (
        *("Bridge", "Library", "Harbour", "Museum", "Railway", "Market", "Theatre", "School", "Garden", "Hospital"),
        *("Station", "Factory", "Stadium", "Airport", "Castle", "Reservoir"),
    ),
    "department": (
        *("Sales", "Finance", "Research", "Support", "Design", "Legal", "Logistics", "Marketing", "Planning"),
        *("Quality", "Security", "Training"),
    ),
    "job": (
        *("engineer", "teacher", "architect", "nurse", "painter", "driver", "chemist", "lawyer", "gardener"),
        *("librarian", "pilot", "tailor"),
    ),
    "series": (
        *("Imports", "Exports", "Visitors", "Rainfall", "Output", "Demand", "Orders", "Returns", "Members", "Traffic"),
        *("Costs", "Income", "Births", "Flights", "Permits", "Tickets", "Wages", "Stock", "Energy", "Harvest"),
    ),
    "button": (
        *("Save", "Cancel", "Delete", "Open", "Send", "Print", "Share", "Export", "Import", "Refresh", "Search"),
        *("Submit", "Apply", "Reset", "Close", "Upload", "Copy", "Archive", "Rename", "Install", "Continue", "Accept"),
        *("Decline", "Login"),
    ),
    "entry": (
        *("New", "Undo", "Redo", "Paste", "Zoom in", "Zoom out", "Find", "Replace", "Sort", "Filter", "Group", "Merge"),
        *("Split", "Rotate", "Crop", "Align", "Lock", "Hide", "Duplicate", "Preferences", "Recent", "Properties"),
        *("Convert", "Compare"),
    ),
    "setting": (
        *("Dark mode", "Notifications", "Autosave", "Location", "Spell check", "Sound", "Sync", "Updates"),
        *("Bluetooth", "Captions", "Backups", "Cookies", "Tracking", "Previews", "Shortcuts", "Animations"),
    ),
    "menu": (
        *("File", "Edit", "View", "Insert", "Format", "Tools", "Window", "Help", "Layout", "Data", "Review", "Account"),
        *("Project", "Build", "Debug", "Library"),
    ),
}
# Sentences without any fact that is asked about, put together of these.
_WHO = (
    *("The council", "A neighbour", "The committee", "One of the guests", "The owner", "A group of students"),
    *("The older members", "Nobody on the board", "Most of the visitors", "The local paper", "A small team"),
    *("The new tenants", "Several volunteers", "The planning office", "Half of the staff", "A former pupil"),
)
_DID = (
    *("asked for a second opinion", "looked at the drawings", "wrote a long letter", "carried the furniture"),
    *("painted the doors", "measured the ground", "paid for the windows", "closed the northern gate"),
    *("planted a row of trees", "moved the old benches", "counted the chairs", "repaired the roof"),
    *("changed the plan", "agreed to the proposal", "took away the fence", "opened a small kitchen"),
)
_WHEN = (
    *("in the spring", "before the end of the year", "after the first meeting", "on a rainy morning", "last summer"),
    *("without a break", "for the second time", "during the holidays", "at their own cost", "as had been hoped"),
    *("with some delay", "in only three days", "although it was cold", "while the street was closed"),
    *("to everyone's surprise", "when the snow had gone"),
)
MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November"),
    "December",
)


def words(kind: str, split: str) -> tuple[str, ...]:
    """The words of a kind that a split has.

    Parameters
    ----------
    kind : str
        Such as ``"city"``.
    split : str
    """
    return part(_LISTS[kind], split)


def held_out() -> tuple[str, ...]:
    """All words that evaluation alone has."""
    return tuple(word for kind in _LISTS for word in words(kind, EVALUATION))


def word(rng: random.Random, kind: str, split: str) -> str:
    """One of them."""
    return rng.choice(words(kind, split))


def some(rng: random.Random, kind: str, split: str, count: int) -> list[str]:
    """Several unlike ones; fewer where the split has no more."""
    known = words(kind, split)
    return rng.sample(known, min(count, len(known)))


def person(rng: random.Random, split: str) -> str:
    """A given name and a surname."""
    return f"{word(rng, 'given', split)} {word(rng, 'surname', split)}"


def company(rng: random.Random, split: str) -> str:
    """The name of a firm."""
    return f"{word(rng, 'company', split)} {word(rng, 'trade', split)}"


def date(rng: random.Random) -> str:
    """A day such as 7 March 2019."""
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1990, 2029)}"


def filler(rng: random.Random, split: str, count: int) -> list[str]:
    """Sentences without any fact that is asked about."""
    parts = [part(one, split) for one in (_WHO, _DID, _WHEN)]
    return [" ".join(rng.choice(one) for one in parts) + "." for _ in range(count)]


def with_article(noun: str) -> str:
    """The noun behind a or an."""
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
