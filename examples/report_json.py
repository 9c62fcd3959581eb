"""Report of every call as JSON, and their sum."""

from sparsevlm import Report, ReportTotal, apply_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene

CHECKPOINT = bundled_path()  # or a folder or hub id, such as "Qwen/Qwen2.5-VL-7B-Instruct"
model, processor = load_model(CHECKPOINT), load_processor(CHECKPOINT)
state = apply_sparsevlm(model, keep=0.25, processor=processor)

reports = []
for seed in (8, 9):
    content = [{"type": "image", "image": draw_scene(seed).image}, {"type": "text", "text": "List all cards."}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    model.generate(**inputs, max_new_tokens=24, do_sample=False)
    reports.append(state.report)
    state.report.to_json(f"report-{seed}.json")

total = ReportTotal.of(reports)
print(f"{total.n_requests} requests, {total.n_visual:.0f} visual tokens per sample")
print(f"{total.average_in:.1f} of them computed, averaged over the layers")
print(f"KV cache after the prompts: {total.kv_bytes.sparse / 1e6:.2f} of {total.kv_bytes.dense / 1e6:.2f} MB")
print(f"decoder's prefill: {total.flops.ratio:.0%} of the dense FLOPs (estimate)")
again = Report.from_json("report-8.json")
print("tokens at the input of each layer:", *again.samples[0].layer_tokens)
