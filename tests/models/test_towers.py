"""What is read in vision towers, against whole softmax matrices and the tokens that each patch reaches."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface, sdpa_attention_forward

from sparsevlm import apply_sparsevlm
from sparsevlm.models import adapter_for
from sparsevlm.models.plain import SizedFamily
from toys import FAMILIES, make_inputs, tiny_model
from toys.kinds import PATCH

CAPTURED = "captured"
READABLE = [name for name in FAMILIES if adapter_for(tiny_model(name)).vision.readable and "qwen" not in name]
ROW = [("text", 2), ("image", 2, 3), ("text", 3), ("image", 3, 2), ("text", 4)]


class Looks:
    placement, needs = "before_decoder", frozenset({"vision_attention", "vision_keys"})

    def select(self, context, n_keep):
        self.context = context
        return torch.arange(n_keep)


def sharpened(name):
    """A tower whose attention is far from uniform."""
    model = tiny_model(name)
    with torch.no_grad():
        for _, attention in adapter_for(model).vision.readable:
            for part, weight in attention.named_parameters():
                if part.endswith("weight") and weight.ndim == 2 and any(x in part for x in ("q", "k_proj")):
                    weight.mul_(12)
    return model


def encoded(model, inputs):
    """Features of the images, one row a visual token."""
    names = ("pixel_values", "image_sizes", "image_grid_thw", "image_position_ids")
    arguments = {name: value for name, value in inputs.items() if name in names}
    with torch.no_grad():
        features = model.model.get_image_features(**arguments, return_dict=True).pooler_output
    features = torch.cat([x.flatten(0, -2) for x in features]) if isinstance(features, (tuple, list)) else features
    return features.flatten(0, -2)


def tokens_of_patches(model, inputs, block, n_prefix):
    """For every patch behind the last block that is read, the visual tokens that change with it."""
    whole, rows = encoded(model, inputs), []

    def shape(module, args, output):
        states = output[0] if isinstance(output, tuple) else output
        rows.append(states.shape)

    block.register_forward_hook(shape)
    encoded(model, inputs)
    *lead, length, _ = rows[0]
    reached = []
    for image in range(lead[0] if lead else 1):
        for patch in range(n_prefix, length):

            def change(module, args, output, image=image, patch=patch):
                states = (output[0] if isinstance(output, tuple) else output).clone()
                (states[image] if states.ndim == 3 else states)[patch] += torch.linspace(-3, 3, states.shape[-1]) ** 2
                return (states, *output[1:]) if isinstance(output, tuple) else states

            handle = block.register_forward_hook(change, prepend=True)  # before the states are recorded
            reached.append((encoded(model, inputs) - whole).abs().amax(dim=1).gt(1e-6).nonzero().squeeze(-1).tolist())
            handle.remove()
    return reached


def captured(model, inputs, modules):
    """Queries and keys of attention modules, call by call."""
    calls = {module: [] for module in modules}

    def attention(module, query, key, value, attention_mask, **kwargs):
        if module in calls:
            calls[module].append((query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5, attention_mask))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(CAPTURED, attention)
    AttentionMaskInterface.register(CAPTURED, sdpa_mask)
    before = [module.config for module in modules]
    for module in modules:
        module.config._attn_implementation_internal = CAPTURED
    encoded(model, inputs)
    for config in before:
        config._attn_implementation_internal = "sdpa"
    return calls


def received(calls, n_prefix, sizes):
    """Attention that each patch receives, on average 1 an image, and its keys."""
    attention, keys = [], []
    for queries, of_keys, scaling, mask in calls:
        filled_up = mask is not None and mask.dtype == torch.bool
        owns = mask[:, 0, 0].sum(-1).tolist() if filled_up else [None] * len(queries)
        for own, full_query, full_key in zip(owns, queries, of_keys, strict=True):
            query, key = full_query[:, :own], full_key[:, :own]
            packed = query.shape[1] == sum(sizes) and len(calls) == 1 and len(queries) == 1
            lengths = sizes if packed else [query.shape[1]]
            for q, k in zip(query.split(lengths, 1), key.split(lengths, 1), strict=True):
                found = (q @ k.transpose(-1, -2) * scaling).softmax(-1).mean(0).sum(0)[n_prefix:]
                attention.append(found / found.mean())
                keys.append(k.mean(0)[n_prefix:])
    return torch.cat(attention), torch.cat(keys)


def check_readings(model, inputs):
    """Compare what a selector is given of each token with what its patches received."""
    adapter = adapter_for(model)
    vision = adapter.vision
    (_, middle), (_, last) = vision.read_blocks
    block = next(m for m in vision.module.modules() if any(child is last for child in m.children()))
    of_patches = tokens_of_patches(model, inputs, block, vision.n_prefix)
    assert all(len(tokens) <= 1 for tokens in of_patches)
    of_token = torch.tensor([tokens[0] if tokens else -1 for tokens in of_patches])
    n_patches = of_token[of_token >= 0].bincount()
    assert n_patches.tolist() == [vision.patches_per_token] * len(encoded(model, inputs))
    sizes = []  # of images that the tower packs into one row
    if isinstance(adapter.family, SizedFamily):
        sizes = [height * width for height, width in adapter.family.patch_grids(adapter, inputs)]
    calls = captured(model, inputs, [middle, last])
    selector = Looks()
    apply_sparsevlm(model, selector=selector, keep=0.5, min_keep=1, min_keep_per_image=0)
    model.generate(**inputs, max_new_tokens=1)
    for row, module in enumerate((middle, last)):
        attention, keys = received(calls[module], vision.n_prefix, sizes)
        if len(of_token) > len(attention):  # images are filled up
            of_token = of_token[of_token >= 0]
        assert float(attention.std()) > 0.02
        for token in range(len(n_patches)):
            wanted = attention[of_token == token].mean()
            torch.testing.assert_close(selector.context.vision_attention[row, token], wanted, rtol=1e-4, atol=1e-5)
            if module is last:
                own = keys[of_token == token].mean(0)
                torch.testing.assert_close(selector.context.vision_keys[token], own, rtol=1e-4, atol=1e-5)
    return of_token


@pytest.mark.parametrize("name", READABLE)
def test_readings_are_those_of_the_patches_of_each_token(name):
    of_token = check_readings(sharpened(name), make_inputs(ROW, family=name))
    assert (of_token >= 0).all()


@pytest.mark.parametrize("name", ["mistral3", "lighton_ocr"])
def test_patches_too_few_for_a_token_are_not_read(name):
    inputs = make_inputs(ROW, family=name)
    inputs["image_sizes"] += torch.tensor([[PATCH, PATCH], [0, PATCH]])
    of_token = check_readings(sharpened(name), inputs)
    assert int((of_token < 0).sum()) == (5 * 7 - 4 * 6) + (6 * 5 - 6 * 4)


@pytest.mark.parametrize(
    ("name", "selector"),
    [
        *((name, "visionzip") for name in FAMILIES if "qwen" not in name),
        *((name, selector) for name in ("internvl", "llava_next") for selector in ("hiprune", "scope")),
    ],
)
def test_selectors_that_look_into_the_tower_run_or_are_refused(name, selector):
    model = tiny_model(name)
    if name in READABLE:
        state = apply_sparsevlm(model, selector=selector, keep=0.5, min_keep=1)
        model.generate(**make_inputs(ROW, family=name), max_new_tokens=1)
        (sample,) = state.report.samples
        assert sample.final_tokens < sample.n_visual
    else:
        refusal = (
            rf"'{selector}' needs vision_\w+.* not read in the vision tower of a {type(model).__name__}: .+\. Choose"
        )
        with pytest.raises(NotImplementedError, match=refusal):
            apply_sparsevlm(model, selector=selector, keep=0.5)
