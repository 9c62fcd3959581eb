"""Image of which patches were kept and dropped, layer by layer. Needs matplotlib."""

from sparsevlm import apply_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene
from sparsevlm.visualization import draw_report, save_picture

CHECKPOINT = bundled_path()  # or a folder or hub id, such as "Qwen/Qwen2.5-VL-7B-Instruct"
model, processor = load_model(CHECKPOINT), load_processor(CHECKPOINT)
state = apply_sparsevlm(model, keep=0.25, target_layers=[2, 8, 14], schedule="geometric", processor=processor)

image, question = draw_scene(8).image, "Read the number on the blue card."
content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)
output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
answer = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
file = save_picture(draw_report(state.report, [image], title=f"{question} {answer}"), "overlay.png")
print(f"wrote {file}")
