"""Prompts with images and videos, as inputs of the toys, and what they are compared by."""

from __future__ import annotations

import torch

from .kinds import PAD
from .models import FAMILIES


def text(n: int, generator: torch.Generator) -> list[int]:
    return torch.randint(1, 80, (n,), generator=generator).tolist()


def make_inputs(*rows, seed: int = 0, pad: bool = True, family: str = "qwen2_5_vl"):
    """Inputs of a batch; each row is a list of ``("text", n)``, ``("image", h, w)``, ``("video", t, h, w)``.

    Heights and widths count visual (merged) tokens. Left padding, as ``generate`` wants it.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = FAMILIES[family].kinds
    ids, types, visual = [], [], {}
    for row in rows:
        row_ids, row_types = [], []
        for name, *asked in row:
            if name == "text":
                row_ids += text(asked[0], generator)
                row_types += [0] * asked[0]
                continue
            kind = kinds[name]
            size = kind.size_of(asked)
            own = kind.ids(size)
            row_ids += own
            row_types += [kind.token_type if token == kind.token else 0 for token in own]
            for key, value in kind.inputs(generator, *size).items():
                visual.setdefault(key, []).append(value)
        ids.append(row_ids)
        types.append(row_types)
    width = max(map(len, ids))

    def padded(values, filler):
        return torch.tensor([[filler] * (width - len(row)) + row for row in values])

    inputs = {"input_ids": padded(ids, PAD)}
    if all(kind.token_type is not None for kind in kinds.values()):
        inputs[FAMILIES[family].type_input] = padded(types, 0)
    if pad:
        inputs["attention_mask"] = padded([[1] * len(row) for row in ids], 0)
    return inputs | {key: torch.cat(values, dim=FAMILIES[family].axis_of(key)) for key, values in visual.items()}


def equally_long(rows, family: str = "qwen2_5_vl"):
    """Rows that take no padding: short ones get more text at their end."""
    lengths = [make_inputs(row, family=family)["input_ids"].shape[1] for row in rows]
    return [
        row if length == max(lengths) else [*row, ("text", max(lengths) - length)]
        for row, length in zip(rows, lengths, strict=True)
    ]


def split_visual(inputs, rows, family: str = "qwen2_5_vl"):
    """The visual inputs of every sample, in prompt order: a list of dicts, one a row of ``rows``."""
    kinds, queues = FAMILIES[family].kinds, {}
    samples = []
    for row in rows:
        samples.append({})
        for name, *size in row:
            if name == "text":
                continue
            for key, value in kinds[name].inputs(torch.Generator(), *kinds[name].size_of(size)).items():
                axis, start = FAMILIES[family].axis_of(key), queues.get(key, 0)
                queues[key] = start + value.shape[axis]
                samples[-1].setdefault(key, []).append(inputs[key].narrow(axis, start, value.shape[axis]))
    return [join_visual([{key: value} for key, values in own.items() for value in values], family) for own in samples]


def join_visual(samples, family: str = "qwen2_5_vl"):
    """The visual inputs of a batch from those of its samples."""
    keys, axis_of = dict.fromkeys(key for sample in samples for key in sample), FAMILIES[family].axis_of
    return {key: torch.cat([sample[key] for sample in samples if key in sample], dim=axis_of(key)) for key in keys}


PROMPTS = {
    "one image": [[("text", 3), ("image", 4, 6), ("text", 7)]],
    "image first": [[("image", 5, 4), ("text", 6)]],
    "two images": [[("text", 2), ("image", 4, 4), ("text", 4), ("image", 3, 6), ("text", 5)]],
    "video": [[("text", 2), ("video", 3, 3, 4), ("text", 6)]],
    "image and video": [[("image", 4, 4), ("text", 3), ("video", 2, 4, 4), ("text", 5)]],
    "batch, same size": [
        [("text", 3), ("image", 4, 6), ("text", 7)],
        [("text", 3), ("image", 4, 6), ("text", 7)],
    ],
    "batch, left padding": [
        [("text", 3), ("image", 4, 6), ("text", 7)],
        [("text", 2), ("image", 4, 6), ("text", 3)],
    ],
    "batch, unequal counts": [
        [("text", 3), ("image", 4, 6), ("text", 7)],
        [("text", 9), ("image", 3, 4), ("text", 4), ("image", 4, 4), ("text", 2)],
        [("text", 12)],
    ],
}


def runs_on_engine(case) -> bool:
    """Whether the engine runs a case, a family and a prompt of :data:`PROMPTS` by name."""
    family, rows = FAMILIES[case["family"]], PROMPTS[case["prompt"]]
    return family.takes(rows) and not any(kind in family.only_on_hooks for row in rows for kind, *_ in row)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())
