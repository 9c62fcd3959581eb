"""Chat of three turns on one KV cache; the last turn brings a second image."""

import torch
from transformers import DynamicCache

from sparsevlm import apply_sparsevlm
from sparsevlm.bundled import bundled_path
from sparsevlm.inputs import load_model, load_processor
from sparsevlm.scenes import draw_scene


class Chat:
    """Conversation whose earlier turns stay in the KV cache: only what is new is computed."""

    def __init__(self, model, processor):
        self.model, self.processor = model, processor
        self.messages = []
        self.tokens = None  # all so far
        self.cache = DynamicCache(config=model.config)

    def ask(self, question, image=None, max_new_tokens=24):
        """Answer one more question, about one more image if there is one."""
        inputs = self.new_inputs(question, image)
        if self.tokens is not None:
            inputs["input_ids"] = torch.cat([self.said(), inputs["input_ids"]], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        self.tokens = self.model.generate(**inputs, cache=self.cache, max_new_tokens=max_new_tokens, do_sample=False)
        new_tokens = self.tokens[:, inputs["input_ids"].shape[1] :]
        answer = self.processor.batch_decode(new_tokens, skip_special_tokens=True)[0]
        self.messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return answer

    def new_inputs(self, question, image):
        """Inputs of the new turn alone: what the chat template adds for it, from the end of the last answer on."""
        before = self.rendered().removesuffix("<|im_end|>\n") if self.messages else ""
        images = [] if image is None else [{"type": "image"}]
        self.messages.append({"role": "user", "content": [*images, {"type": "text", "text": question}]})
        text = self.rendered(add_generation_prompt=True).removeprefix(before)
        visuals = {} if image is None else {"images": [image]}
        return self.processor(text=[text], return_tensors="pt", **visuals).to(self.model.device)

    def rendered(self, **options):
        return self.processor.apply_chat_template(self.messages, tokenize=False, **options)

    def said(self):
        """Tokens so far, without the end of the last answer: the new turn begins with it."""
        ended = self.tokens[0, -1] == self.processor.tokenizer.eos_token_id
        return self.tokens[:, :-1] if ended else self.tokens


CHECKPOINT = bundled_path()  # or a folder or hub id, such as "Qwen/Qwen2.5-VL-7B-Instruct"
model, processor = load_model(CHECKPOINT), load_processor(CHECKPOINT)
state = apply_sparsevlm(model, keep=0.5, processor=processor)

chat = Chat(model, processor)
print(chat.ask("Read the number on the blue card.", draw_scene(8).image))
print(chat.ask("Read the number on the orange card."))
print(chat.ask("List all cards.", draw_scene(9).image))  # the bundled model was trained on single questions
print(state.report)  # of the last turn
lengths = [layer.keys.shape[-2] for layer in chat.cache.layers]
print(f"cached tokens per layer: {lengths}, of {chat.tokens.shape[1] - 1}")
