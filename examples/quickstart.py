"""One question, dense and pruned, with the report of the pruned call."""

from sparsevlm import apply_sparsevlm, remove_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene

CHECKPOINT = bundled_path()  # or a folder or hub id, such as "Qwen/Qwen2.5-VL-7B-Instruct"
model, processor = load_model(CHECKPOINT), load_processor(CHECKPOINT)

image = draw_scene(8).image  # or PIL.Image.open("photo.jpg"); the bundled model knows drawn scenes only
content = [{"type": "image", "image": image}, {"type": "text", "text": "Read the number on the blue card."}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)


def answer():
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    new_tokens = output[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new_tokens, skip_special_tokens=True)[0]


print("dense: ", answer())
state = apply_sparsevlm(model, keep=0.25, processor=processor)  # generate prunes from here on
print("pruned:", answer())
print(state.report)
with state.options(keep=0.5, selector="sparsevlm"):  # other options for the calls inside
    print("the paper's method, half of the tokens:", answer())
remove_sparsevlm(model)  # bit-equal to before
