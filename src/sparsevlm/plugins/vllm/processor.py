"""The part of a processor of vLLM that makes room in a prompt for the tokens that will be kept."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptUpdateDetails

from ...models import special_token_ids
from ...template import Template, template_of
from .budget import kept_per_run
from .compat import processor_arguments, without_prompt_updates
from .options import KEY, Options

FIELD = "sparsevlm_{}"  # by modality: the options of each item
_MODALITIES = ("image", "video")


class PruningProcessor:
    """Mixin before a processor of vLLM; without options of the engine it changes nothing."""

    info: Any

    @functools.cached_property
    def _options(self) -> Options | None:
        given = getattr(self.info.ctx.model_config.hf_config, KEY, None)
        return None if given is None else Options.of_engine(given)

    def apply(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Processes a prompt, with the options of the request, and the text if it matters, in its images' identity."""
        arguments = dict(inputs.hf_processor_mm_kwargs)
        asked = arguments.pop(KEY, None)
        if self._options is None:
            if asked is not None:
                raise ValueError(
                    f"mm_processor_kwargs holds {KEY!r}, but the engine was started without pruning. Start it with "
                    f"hf_overrides={{'{KEY}': {{}}}}, which by itself drops nothing."
                )
            return super().apply(inputs, *args, **kwargs)  # type: ignore[misc]
        options = self._options.of_request(asked)
        prompt = inputs.prompt
        if isinstance(prompt, str):  # as older vLLM profiles; the processor of transformers would miss the images
            prompt = self.info.get_tokenizer().encode(prompt, **inputs.tokenization_kwargs)
        if options.reads_text:
            options = options.with_text(self._text_of(prompt))
        inputs = dataclasses.replace(inputs, prompt=prompt, hf_processor_mm_kwargs={**arguments, KEY: options.key()})
        processed = super().apply(inputs, *args, **kwargs)  # type: ignore[misc]
        self._check(processed)
        return processed

    def _apply_hf_processor_main(self, **arguments: Any) -> Any:
        """Calls the processor of transformers without our options."""
        name = processor_arguments(arguments)
        arguments[name], _ = _taken_apart(arguments[name])
        if self._options is not None:
            arguments = without_prompt_updates(arguments)
        return super()._apply_hf_processor_main(**arguments)  # type: ignore[misc]

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Puts the options of each image and video beside its pixels."""
        rest, key = _taken_apart(hf_processor_mm_kwargs)
        fields = dict(super()._get_mm_fields_config(hf_inputs, rest))  # type: ignore[misc]
        if key is None:
            return fields
        for modality in _MODALITIES:
            grids = hf_inputs.get(f"{modality}_grid_thw")
            if grids is not None and len(grids):
                written = torch.frombuffer(bytearray(key.encode()), dtype=torch.uint8)
                hf_inputs[FIELD.format(modality)] = written.repeat(len(grids), 1)
                fields[FIELD.format(modality)] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        """Shortens what stands for an image or video in the prompt."""
        rest, key = _taken_apart(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, rest, out_mm_kwargs)  # type: ignore[misc]
        if key is None:
            return updates
        options = Options.from_key(key)
        return [
            dataclasses.replace(update, replacement=self._shortened(update.replacement, update.modality, options))
            for update in updates
        ]

    def _shortened(self, replacement: Any, modality: str, options: Options) -> Any:
        token_id = self._placeholders[modality]

        def shorter(item_idx: int) -> Any:
            content = replacement(item_idx) if callable(replacement) else replacement
            if not isinstance(content, PromptUpdateDetails):
                return _shorter(content, token_id, options)
            return PromptUpdateDetails.select_token_id(_shorter(content.full, token_id, options), token_id)

        return shorter

    @functools.cached_property
    def _placeholders(self) -> dict[str, int]:
        config = self.info.get_hf_config()
        return {modality: getattr(config, f"{modality}_token_id") for modality in _MODALITIES}

    @functools.cached_property
    def _template(self) -> Template:
        """Template of the processor, with all ids that are no words."""
        template = template_of(self.info.get_hf_processor())
        config = self.info.get_hf_config()
        generation = SimpleNamespace(**self.info.ctx.model_config.try_get_generation_config())
        apart = special_token_ids(config, config.get_text_config(), generation) | set(self._placeholders.values())
        return dataclasses.replace(template, special=template.special | apart)

    def _text_of(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """Token ids of a prompt's text, as the library takes them under transformers."""
        placeholders = set(self._placeholders.values())
        text = [token_id for token_id in prompt if token_id not in placeholders]
        words = tuple(one for one in text[self._template.within(text)] if one not in self._template.special)
        return words or tuple(prompt[-1:])

    def _check(self, processed: Any) -> None:
        """Refuses prompts in which positions of images could not be told; those of vLLM's profiling hold nothing but
        images, and are not answered.

        Raises
        ------
        ValueError
        """
        prompt, ranges = processed["prompt_token_ids"], processed["mm_placeholders"]
        if all(token_id in self._placeholders.values() for token_id in prompt):
            return
        ranges = sorted((one for found in ranges.values() for one in found), key=lambda one: one.offset)
        n_found = sum(token_id in self._placeholders.values() for token_id in prompt)
        n_features = sum(one.get_num_embeds() for one in ranges)
        if n_found != n_features:
            raise ValueError(
                f"the prompt holds {n_found - n_features} placeholders of images or videos beside those of the ones "
                "that were given. Leave them out of the text, or give an image for each."
            )
        for before, after in itertools.pairwise(ranges):
            if before.offset + before.length == after.offset and prompt[after.offset] in self._placeholders.values():
                raise ValueError(
                    "two images stand in the prompt with no token between them, so that pruned ones cannot be told "
                    "apart. Put text between them: a chat template writes <|vision_end|><|vision_start|>."
                )
        if prompt and prompt[-1] in self._placeholders.values():
            raise ValueError(
                "the prompt ends in a visual token, which has to predict the next token and cannot be judged. End the "
                "prompt in text: a chat template closes an image with <|vision_end|>."
            )


def _taken_apart(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Arguments of the processor of transformers, and the key of our options beside them."""
    rest = dict(arguments)
    return rest, rest.pop(KEY, None)


def _shorter(tokens: Sequence[int], token_id: int, options: Options) -> list[int]:
    """Tokens in the place of an image or video, with as many placeholders in each run as will be kept."""
    runs = [(is_visual, list(run)) for is_visual, run in itertools.groupby(tokens, lambda one: one == token_id)]
    counts = iter(kept_per_run([len(run) for is_visual, run in runs if is_visual], options))
    return [one for is_visual, run in runs for one in (run[: next(counts)] if is_visual else run)]
