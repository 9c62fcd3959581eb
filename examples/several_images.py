"""Question about two images; the budget is for both together."""

from sparsevlm import apply_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_example

CHECKPOINT = bundled_path()  # or a folder or hub id, such as "Qwen/Qwen2.5-VL-7B-Instruct"
model, processor = load_model(CHECKPOINT), load_processor(CHECKPOINT)
state = apply_sparsevlm(model, keep=0.5, processor=processor)

example = draw_example("pair", 3)
content = [{"type": "image", "image": image} for image in example.images]
content.append({"type": "text", "text": example.question})
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
print(f"{example.question} {answer} (right: {example.answer})")

sample = state.report.samples[0]
first = 0
for number, (t, h, w) in enumerate(sample.grids, 1):
    kept = sum(first <= index < first + t * h * w for index in sample.stages[0].kept)
    print(f"image {number}: {kept} of {t * h * w} visual tokens go on from layer {sample.stages[0].layer}")
    first += t * h * w
