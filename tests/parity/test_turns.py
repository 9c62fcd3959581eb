"""A second turn under other options: layers of one earlier stage can end up in different stages of the next turn."""

from __future__ import annotations

import pytest
from runs import IMAGE_TURNS, OPTIONS, AtRandom, BeforeAndInside, build, check_second_turn
from ways import ATTENTIONS

from covering import covering_array, factor_groups
from toys import FAMILIES, IS_OLD, PROMPTS

TURNS = {
    "prunes later than before": ({"target_layers": [1, 3]}, {"target_layers": [2]}),
    "reads later than before": ({"target_layers": [1, 3]}, {"target_layers": [3]}),
    "between": ({"target_layers": [1, 3]}, {"target_layers": [0, 2, 4]}),
    "after one before the decoder": ({"selector": AtRandom(), "target_layers": None}, {"target_layers": [1, 3]}),
    "then before the decoder": ({"target_layers": [1, 3]}, {"selector": AtRandom(), "target_layers": None}),
    "after one everywhere": ({"selector": BeforeAndInside()}, {"target_layers": [1, 3]}),
    "then everywhere": ({"target_layers": [1, 3]}, {"selector": BeforeAndInside(), "target_layers": [2]}),
    "dense in between": ({"target_layers": [1, 3]}, {"target_layers": [1, 3], "keep": 1.0}),
}
OTHERS = ("llava", "llava_next") if IS_OLD else ("llava", "llava_next", "gemma3")  # which takes no new image there
FACTORS = {
    "turns": tuple(TURNS),
    "attention": ATTENTIONS,
    "prompt": ("one image", "batch, left padding", "batch, unequal counts"),
    "cache": ("dynamic", "static"),
    "selector": ("sparsevlm", "random"),
    # Of plain text models two, of those with windows one: second turns of every family are in test_oracle.
    "family": (*(name for name, one in FAMILIES.items() if "qwen" in name and not one.is_hybrid), *OTHERS),
}
TOGETHER = (("turns", "prompt", "cache"),)  # what meets in the slots of a layer


def possible(case) -> bool:
    family = FAMILIES[case["family"]]
    return family.runs(case["attention"], case["cache"])


CASES = covering_array(FACTORS, factor_groups(FACTORS, 2, *TOGETHER), possible)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case.values()))
def test_second_turn_under_other_options(case, place):
    before, after = (
        {**OPTIONS, "keep": 0.7, "selector": case["selector"], **changes} for changes in TURNS[case["turns"]]
    )
    run = build(
        PROMPTS[case["prompt"]], before, place, attention=case["attention"], family=case["family"], cache=case["cache"]
    )
    turn = check_second_turn(run, IMAGE_TURNS[0], options=after)  # rows that keep equal numbers behind unequal ones
    layers = turn.output.past_key_values.layers
    tables = [layer.table for layer in layers]
    assert any(table is not None for table in tables)
    for table, layer in zip(tables, layers, strict=True):
        if table is not None and case["cache"] == "dynamic":  # the buffers of a static one keep their length
            assert table.slots(table.appended).shape[1] == layer.keys.shape[-2]
