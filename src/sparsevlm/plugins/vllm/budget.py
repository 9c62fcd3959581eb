"""How many tokens of an image or video go on, by their number alone: vLLM has to know it before it sees a feature."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ...selection.budget import plan_budget
from .options import Options


def kept_per_run(sizes: Sequence[int], options: Options) -> list[int]:
    """Tokens that go on of each run of an image's or video's placeholders.

    The number of all of them is that of the budget before the decoder, as under transformers. Where frames of a video
    stand apart in the prompt, each is a run, of one size; the number is spread over them evenly, at least one each.

    Parameters
    ----------
    sizes : sequence of int
        Tokens of each run, one size.
    options : Options
    """
    n_visual, n_runs = sum(sizes), len(sizes)
    (n_keep,) = plan_budget(options.keep, "single", n_visual, (-1,), 1, options.min_keep).counts
    # Even steps: the j-th run ends at ⌊j · n_keep / n_runs⌋.
    ends = [j * n_keep // n_runs for j in range(n_runs + 1)]
    return [max(1, end - start) for start, end in itertools.pairwise(ends)]
