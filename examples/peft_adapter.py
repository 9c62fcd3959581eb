"""Model with a LoRA adapter of PEFT."""

from peft import LoraConfig, get_peft_model

from sparsevlm import apply_sparsevlm, remove_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene

CHECKPOINT = bundled_path()  # or a folder or hub id, such as "Qwen/Qwen2.5-VL-7B-Instruct"
model, processor = load_model(CHECKPOINT), load_processor(CHECKPOINT)
peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval()

content = [
    {"type": "image", "image": draw_scene(8).image},
    {"type": "text", "text": "Read the number on the blue card."},
]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)

state = apply_sparsevlm(peft_model, keep=0.25, processor=processor)
output = peft_model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
print(f"{state.report.average_in:.0f} of {state.report.n_visual:.0f} visual tokens, path {state.report.path}")
remove_sparsevlm(peft_model)

# The engine runs plain linear layers only. On a GPU merge the adapter first, and the model is as fast as without it.
merged = peft_model.merge_and_unload()
state = apply_sparsevlm(merged, keep=0.25, processor=processor)
merged.generate(**inputs, max_new_tokens=16, do_sample=False)
print(f"merged: path {state.report.path} ({state.report.path_reason})")
