"""Selection method of your own: an object with one method."""

import torch

from sparsevlm import apply_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene


class LargestChange:
    """Keeps the tokens that the layer changed most."""

    name = "largest-change"
    needs = frozenset({"previous_hidden_states"})  # what context must hold, see docs/selectors.md

    def select(self, context, n_keep):
        change = (context.hidden_states - context.previous_hidden_states).norm(dim=-1)
        return torch.sort(change, descending=True, stable=True).indices[:n_keep].sort().values


class Border:
    """Keeps the tokens nearest to the border of the image, before the decoder runs."""

    placement = "before_decoder"
    default_schedule = "single"

    def select(self, context, n_keep):
        _, height, width = context.coordinates.float()
        distance = torch.minimum(
            torch.minimum(height - height.min(), height.max() - height),
            torch.minimum(width - width.min(), width.max() - width),
        )
        return torch.sort(distance, stable=True).indices[:n_keep].sort().values


CHECKPOINT = bundled_path()  # or a folder or hub id, such as "Qwen/Qwen2.5-VL-7B-Instruct"
model, processor = load_model(CHECKPOINT), load_processor(CHECKPOINT)
content = [{"type": "image", "image": draw_scene(8).image}, {"type": "text", "text": "Is there a yellow heart?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)

state = apply_sparsevlm(model, selector=LargestChange(), keep=0.5, processor=processor)
for selector in (LargestChange(), Border(), "random"):
    with state.options(selector=selector):
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
    print(f"{state.report.selector}: {answer} ({state.report.average_in:.0f} of {state.report.n_visual:.0f} tokens)")
