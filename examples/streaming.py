"""Answer printed token by token, while a thread generates."""

import contextvars
import threading

from transformers import TextIteratorStreamer

from sparsevlm import apply_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene

CHECKPOINT = bundled_path()  # or a folder or hub id, such as "Qwen/Qwen2.5-VL-7B-Instruct"
model, processor = load_model(CHECKPOINT), load_processor(CHECKPOINT)
state = apply_sparsevlm(model, keep=0.5, processor=processor)

content = [{"type": "image", "image": draw_scene(8).image}, {"type": "text", "text": "List all cards."}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device)

streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
arguments = {**inputs, "max_new_tokens": 24, "do_sample": False, "streamer": streamer}
with state.options(keep=0.25):
    # Options hold in the thread that opened them: a copy of the context carries them, and the report, to another.
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(model.generate,), kwargs=arguments)
    thread.start()
    for text in streamer:
        print(text, end="", flush=True)
    thread.join()
print()
print(context.run(lambda: state.report))
