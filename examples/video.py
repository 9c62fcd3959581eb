"""Frames of a video, pruned as one sample."""

from sparsevlm import apply_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene

CHECKPOINT = bundled_path()  # or a folder or hub id, such as "Qwen/Qwen2.5-VL-7B-Instruct"
model, processor = load_model(CHECKPOINT), load_processor(CHECKPOINT)
state = apply_sparsevlm(model, keep=0.25, processor=processor)

# A camera that moves over a scene; sparsevlm.inputs.load_frames reads a folder of frames, or a GIF. The bundled model
# was trained on single images: its answer says nothing here, only the pruning does.
scene = draw_scene(8).image
frames = [scene.crop((16 * step, 0, 16 * step + 336, 336)) for step in range(6)]
content = [{"type": "video"}, {"type": "text", "text": "Count the yellow shapes."}]
text = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
metadata = {"fps": 2.0, "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
inputs = processor(text=[text], videos=[frames], video_metadata=[metadata], return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])

sample = state.report.samples[0]
t, h, w = sample.grids[0]
print(f"{len(frames)} frames are {t} steps of {h} x {w} visual tokens")
for step in range(t):
    kept = sum(index // (h * w) == step for index in sample.stages[0].kept)
    print(f"step {step}: {kept} go on from layer {sample.stages[0].layer}")
