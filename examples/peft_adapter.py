"""LoRA adapter of PEFT: trained for a few steps, saved, loaded again, pruned as it is and merged. Needs `peft`."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from sparsevlm import apply_sparsevlm, remove_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene

CHECKPOINT = bundled_path()  # or a folder or hub id, such as "Qwen/Qwen2.5-VL-7B-Instruct"
processor = load_processor(CHECKPOINT)


def asked(question, image, answer=None):
    """Inputs of one turn, with the answer behind it if there is one."""
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": question}]}]
    if answer is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return processor.apply_chat_template(
        messages, add_generation_prompt=answer is None, tokenize=True, return_dict=True, return_tensors="pt"
    )


question, image = "Read the number on the blue card.", draw_scene(8).image
inputs, lesson = asked(question, image), asked(question, image, "blue 354")
labels = lesson["input_ids"].clone()
labels[:, : inputs["input_ids"].shape[1]] = -100  # only the answer is learned

torch.manual_seed(0)
tuned = get_peft_model(load_model(CHECKPOINT, device="cpu"), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
optimizer = torch.optim.AdamW((weight for weight in tuned.parameters() if weight.requires_grad), lr=1e-2)
losses = []
for _ in range(6):  # without SparseVLM, which refuses labels
    loss = tuned(**lesson, labels=labels).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"loss of the lesson: {losses[0]:.1f}, after {len(losses) - 1} steps {losses[-1]:.1f}")
tuned.save_pretrained("adapter")

model = PeftModel.from_pretrained(load_model(CHECKPOINT), "adapter").eval()
inputs = inputs.to(model.device)


def answer(model):
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


state = apply_sparsevlm(model, keep=0.25, processor=processor)
print(f"adapter: {answer(model)} ({state.report.average_in:.0f} of {state.report.n_visual:.0f} visual tokens)")
print(f"path {state.report.path}: {state.report.path_reason}")
remove_sparsevlm(model)

# The engine runs plain linear layers only. On a GPU merge the adapter first, and the model is as fast as without it.
merged = model.merge_and_unload()
state = apply_sparsevlm(merged, keep=0.25, processor=processor)
print(f"merged: {answer(merged)}, path {state.report.path}")
merged.save_pretrained("merged")  # with the processor beside it a checkpoint like any other
processor.save_pretrained("merged")
