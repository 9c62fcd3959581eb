"""From a decoded picture and a question to the first token: the processor counts as well, and apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..inputs import ImageTextProcessor, load_processor
from ..inputs.processor import has_own_processor
from ..inputs.turns import move_inputs, process, render_turn
from ..models import adapter_for
from ..request.counting import visual_counts
from .cases import Case, PictureCase
from .providers import Inputs, Provider
from .rounds import Measurement, Settings, measure
from .steps import NOTHING_EXPECTED, Expected, OnStep

_LETTERS = 21  # of a question; as many tokens in a tokenizer of bytes


class Pictures:
    """Draws pictures of noise with a question each, and makes inputs of them.

    Parameters
    ----------
    folder : Path
        Of the checkpoint whose processor is used.
    device : torch.device
    case : PictureCase
    seed : int
    """

    def __init__(self, folder: Path, device: Any, case: PictureCase, seed: int) -> None:
        self._device, self._case, self._generator = device, case, np.random.default_rng(seed)
        # transformers' own where torchvision is there, else ours, if there is one; ours cuts on the model's device.
        self._theirs = load_processor(folder)
        self._ours = ImageTextProcessor.from_folder(folder) if has_own_processor(folder) else self._theirs

    def processor_of(self, provider: Provider) -> Any:
        """The processor whose time counts."""
        return self._theirs if provider.state is None else self._ours

    def draw(self) -> Callable[[Provider], Callable[[], Inputs]]:
        """What makes the inputs of a new picture and question, by provider."""
        shape = (self._case.batch, self._case.side, self._case.side, 3)
        pixels = self._generator.integers(0, 256, shape, dtype=np.uint8)
        images = [Image.fromarray(one) for one in pixels]
        letters = self._generator.integers(ord("a"), ord("z") + 1, (self._case.batch, _LETTERS))
        texts = [
            render_turn(
                self._theirs, [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
            )
            for text in ("".join(map(chr, one)) for one in letters)
        ]

        def made_by(provider: Provider) -> Callable[[], Inputs]:
            processor = self.processor_of(provider)
            own = [[image] for image in images]
            if isinstance(processor, ImageTextProcessor) and provider.state is not None:
                return lambda: dict(
                    processor(images=own, text=texts, return_tensors="pt", device=self._device).to(self._device)
                )
            return lambda: dict(move_inputs(process(processor, texts, own), provider.model))

        return made_by


def first_request(case: PictureCase, pictures: Pictures, provider: Provider) -> tuple[Case, Inputs]:
    """Draws a picture and a question, and returns what the processor makes of them."""
    inputs = pictures.draw()(provider)()
    n_visual = visual_counts(adapter_for(provider.model), inputs)[0]
    n_text = inputs["input_ids"].shape[1] - n_visual
    return dataclasses.replace(case.request, n_visual=n_visual, n_text=n_text), inputs


def measure_picture(
    case: PictureCase, providers: list[Provider], settings: Settings, folder: Path,
    on_step: OnStep = lambda step: None, expected: Mapping[Provider, Expected] = NOTHING_EXPECTED,
) -> tuple[Case, dict[Provider, Measurement]]:  # fmt: skip
    """Measures a case; gives the request that the processor makes of it as well.

    Parameters
    ----------
    case : PictureCase
    providers : list of Provider
    settings : Settings
    folder : Path
        Of the checkpoint whose processor is used.
    on_step, expected
        As in :func:`~.rounds.measure`.
    """
    pictures = Pictures(folder, providers[0].model.device, case, settings.seed)
    request, _ = first_request(case, pictures, providers[0])
    measurements = measure(case, providers, settings, pictures.draw, on_step, expected)
    for provider, measured in measurements.items():
        processor = pictures.processor_of(provider)
        names = f"{type(processor).__name__} with {type(processor.image_processor).__name__}"
        measured.remark = "; ".join(filter(None, (measured.remark, names)))
    return request, measurements
