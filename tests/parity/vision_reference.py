"""What the vision tower's tokens receive, by hand: whole softmax matrices, frame by frame, windows undone."""

from __future__ import annotations

import contextlib
import itertools

import torch
from transformers.modeling_utils import AttentionInterface

from toys import family_of

FLASH = "emulated_flash_varlen"


def varlen(module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **kwargs):
    """What flash attention makes of packed sequences; every block has to come in one call."""
    assert attention_mask is None
    assert not kwargs["is_causal"]
    assert kwargs["max_length_q"] == int(cu_seq_lens_q.diff().max())
    bounds = cu_seq_lens_q.tolist()
    parts = [
        (query[:, :, a:b] @ key[:, :, a:b].transpose(-1, -2) * scaling).softmax(-1) @ value[:, :, a:b]
        for a, b in itertools.pairwise(bounds)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def use_vision_attention(model, name: str) -> None:
    """Set the tower's attention by its bare name."""
    AttentionInterface.register(FLASH, varlen)
    family_of(model).tower_of(model).config._attn_implementation_internal = name


def sharpen(model) -> None:
    """Make the tower's attention far from uniform."""
    with torch.no_grad():
        for block in family_of(model).tower_of(model).blocks:
            for name in ("qkv", "q", "k", "v"):
                if hasattr(block.attn, name):
                    getattr(block.attn, name).weight.mul_(25)


def rotated(x, cos, sin):
    """(tokens, heads, head_dim), rotated in float32 and rounded back."""
    cos, sin, kind, x = cos[:, None].float(), sin[:, None].float(), x.dtype, x.float()
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(kind)


@contextlib.contextmanager
def inputs_of(modules):
    """Record what the attention modules are called with."""
    seen = {}

    def hook(module, args, kwargs):
        seen[module] = (args[0], kwargs["position_embeddings"])

    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def window_order(model, t, h, w):
    """Reading-order index of each merged patch as Qwen2.5-VL lays them out: frame by frame, window by window."""
    config = model.config.vision_config
    side = config.window_size // config.patch_size // config.spatial_merge_size
    order = []
    for frame in range(t):
        for top in range(0, h, side):
            for left in range(0, w, side):
                for y in range(top, min(top + side, h)):
                    order += [(frame * h + y) * w + x for x in range(left, min(left + side, w))]
    return order


def frame_by_frame(q, k, n_frames):
    """Column sums of each frame's own softmax matrix, mean over heads."""
    received = []
    for query, key in zip(q.chunk(n_frames), k.chunk(n_frames), strict=True):
        logits = torch.einsum("ihd,jhd->hij", query, key) / query.shape[-1] ** 0.5
        received.append(logits.softmax(-1).mean(dim=0).sum(dim=0))
    return torch.cat(received)


def reference(model, pixels, grid):
    """Attention (2, n_visual) and keys (n_visual, head_dim) of one image or video of patch grid (t, h, w)."""
    t, h, w = grid[0], grid[1] // 2, grid[2] // 2
    tower = family_of(model).tower_of(model)
    blocks = list(tower.blocks)
    windowed = hasattr(tower, "fullatt_block_indexes")
    full = model.config.vision_config.fullatt_block_indexes if windowed else range(len(blocks))
    middle, last = blocks[min(full, key=lambda i: abs(i - len(blocks) / 2))].attn, blocks[full[-1]].attn
    dtype = next(tower.parameters()).dtype
    with torch.no_grad(), inputs_of([middle, last]) as seen:
        tower(pixels.to(dtype), torch.tensor([grid], device=pixels.device))
    order = window_order(model, t, h, w) if windowed else list(range(t * h * w))
    attention = torch.zeros(2, t * h * w)
    keys = torch.zeros(t * h * w, middle.head_dim)
    for row, module in enumerate((middle, last)):
        hidden, (cos, sin) = seen[module]
        with torch.no_grad():
            parts = (
                module.qkv(hidden).chunk(3, dim=-1) if hasattr(module, "qkv") else (module.q(hidden), module.k(hidden))
            )
            q, k = (part.view(len(hidden), module.num_heads, -1) for part in parts[:2])
        q, k = rotated(q, cos, sin).float().cpu(), rotated(k, cos, sin).float().cpu()
        received = frame_by_frame(q, k, t)
        for place, index in enumerate(order):
            attention[row, index] = received[4 * place : 4 * place + 4].mean()
            if row == 1:
                keys[index] = k[4 * place : 4 * place + 4].mean(dim=(0, 1))
    return attention, keys


def references_of_samples(model, inputs):
    """Per sample of a prompt, attention and keys of its visual tokens in prompt order."""
    queues = {}
    for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        grids = inputs.get(f"{kind}_grid_thw", torch.zeros(0, 3, dtype=torch.long)).tolist()
        sizes = [t * h * w for t, h, w in grids]
        pixels = inputs[name].split(sizes) if grids else []
        token = getattr(model.config, f"{kind}_token_id")
        queues[token] = [reference(model, p, g) for p, g in zip(pixels, grids, strict=True)]
    samples = []
    for row in inputs["input_ids"].tolist():
        found, position = [], 0
        while position < len(row):
            if row[position] not in queues:
                position += 1
                continue
            token = row[position]
            found.append(queues[token].pop(0))
            own = [at for at in range(position, len(row)) if row[at] == token]  # frames may stand apart
            position = own[found[-1][0].shape[1] - 1] + 1
        attentions, keys = [attention for attention, _ in found], [key for _, key in found]
        samples.append((torch.cat(attentions, dim=1), torch.cat(keys)) if found else None)
    assert not any(queues.values())
    return samples
