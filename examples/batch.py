"""Batch of two prompts with a budget each."""

from sparsevlm import apply_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene

CHECKPOINT = bundled_path()  # or a folder or hub id, such as "Qwen/Qwen2.5-VL-7B-Instruct"
model, processor = load_model(CHECKPOINT), load_processor(CHECKPOINT)
state = apply_sparsevlm(model, keep=0.25, processor=processor)

asked = [(draw_scene(8).image, "Read the number on the blue card."), (draw_scene(9).image, "List all cards.")]
conversations = [
    [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    for image, question in asked
]
# Prompts of unequal length are padded on the left, as generate wants it; load_processor sees to the side.
inputs = processor.apply_chat_template(
    conversations,
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
    processor_kwargs={"padding": True},
).to(model.device)

with state.options(keep=[0.25, 0.5]):  # a quarter of the first sample's visual tokens, half of the second's
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
for (_, question), answer, sample in zip(asked, answers, state.report.samples, strict=True):
    print(f"{question} {answer} ({sample.average_in:.0f} of {sample.n_visual} visual tokens)")
