"""From a decoded picture and a question to the first token: the processor counts as well, and apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..inputs import ImageTextProcessor, load_processor
from .cases import Case, PictureCase
from .providers import Inputs, Provider
from .rounds import Measurement, Settings, measure

_PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
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
        # transformers' own where torchvision is there, else ours; ours cuts pictures on the model's device.
        self._theirs, self._ours = load_processor(folder), ImageTextProcessor.from_folder(folder)

    def processor_of(self, provider: Provider) -> Any:
        """The processor whose time counts."""
        return self._theirs if provider.state is None else self._ours

    def draw(self) -> Callable[[Provider], Callable[[], Inputs]]:
        """What makes the inputs of a new picture and question, by provider."""
        shape = (self._case.batch, self._case.side, self._case.side, 3)
        pixels = self._generator.integers(0, 256, shape, dtype=np.uint8)
        images = [Image.fromarray(one) for one in pixels]
        letters = self._generator.integers(ord("a"), ord("z") + 1, (self._case.batch, _LETTERS))
        texts = [_PROMPT.format("".join(map(chr, one))) for one in letters]

        def made_by(provider: Provider) -> Callable[[], Inputs]:
            processor = self.processor_of(provider)
            where = {} if provider.state is None else {"device": self._device}
            return lambda: dict(processor(images=images, text=texts, return_tensors="pt", **where).to(self._device))

        return made_by


def measure_picture(
    case: PictureCase, providers: list[Provider], settings: Settings, folder: Path
) -> tuple[Case, dict[Provider, Measurement]]:
    """Measures a case; gives the request that the processor makes of it as well.

    Parameters
    ----------
    case : PictureCase
    providers : list of Provider
    settings : Settings
    folder : Path
        Of the checkpoint whose processor is used.
    """
    model = providers[0].model
    pictures = Pictures(folder, model.device, case, settings.seed)
    first = pictures.draw()(providers[0])()["input_ids"]
    n_visual = int((first[0] == model.config.image_token_id).sum())
    request = dataclasses.replace(case.request, n_visual=n_visual, n_text=first.shape[1] - n_visual)
    measurements = measure(case, providers, settings, pictures.draw)
    for provider, measured in measurements.items():
        processor = pictures.processor_of(provider)
        names = f"{type(processor).__name__} with {type(processor.image_processor).__name__}"
        measured.remark = "; ".join(filter(None, (measured.remark, names)))
    return request, measurements
