"""OpenAI's client asks `sparsevlm serve`, whole and as a stream; needs `openai`."""

import base64
import io
import os

import openai

from sparsevlm.scenes import draw_scene

# Started by `sparsevlm serve --model bundled`, or with a folder or hub id, such as "Qwen/Qwen2.5-VL-7B-Instruct".
client = openai.OpenAI(base_url=os.environ.get("SERVER", "http://127.0.0.1:8000/v1"), api_key="none")
model = client.models.list().data[0].id


def data_url(image):
    """A PIL image as an address that holds it."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def messages(question):
    image = {"type": "image_url", "image_url": {"url": data_url(draw_scene(8).image)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


answer = client.chat.completions.create(
    model=model,
    messages=messages("Read the number on the blue card."),
    max_tokens=16,
    extra_body={"sparsevlm": {"keep": 0.25}},
)
kept = answer.sparsevlm
print(answer.choices[0].message.content)
print(f"{kept['visual_tokens_kept']} of {kept['visual_tokens']} visual tokens, path {kept['path']}")

stream = client.chat.completions.create(
    model=model,
    messages=messages("List all cards."),
    max_tokens=24,
    stream=True,
    stream_options={"include_usage": True},
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    else:
        print(f"\n{chunk.usage.prompt_tokens} prompt tokens")
