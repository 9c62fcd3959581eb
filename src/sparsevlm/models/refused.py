"""Model classes that cannot be pruned, with the reason and what to do instead, as data."""

from __future__ import annotations

_CROSS = (
    "its text layers attend to the image from outside (cross-attention, or an encoder of its own), so that no visual "
    "tokens stand in the decoder. Shorten what the encoder is given: smaller or fewer images"
)
_IN_FRONT = (
    "it puts image features in front of the text without a placeholder for each, so that the prompt does not tell "
    "where they are. Use a model whose processor writes one placeholder a visual token"
)
_INDEXED = (
    "its attention picks keys by an index that each layer caches beside keys and values, and that would go on to name "
    "tokens which are gone. It leaves out keys by itself; run it without SparseVLM"
)
_STREAMS = (
    "its layers work on several streams of hidden states at once, which were not tested. Use a Gemma 3 or a Gemma 4"
)
_DIFFUSION = (
    "it writes blocks of tokens by diffusion, over which attention runs both ways and again and again. Use a model "
    "that generates token by token"
)
REFUSED = {
    "MllamaForConditionalGeneration": _CROSS,
    "IdeficsForVisionText2Text": _CROSS,
    "EvollaForProteinText2Text": _CROSS,
    "BlipForConditionalGeneration": _CROSS,
    "Florence2ForConditionalGeneration": _CROSS,
    "UdopForConditionalGeneration": _CROSS,
    "Pix2StructForConditionalGeneration": _CROSS,
    "PPFormulaNetForConditionalGeneration": _CROSS,
    "T5Gemma2ForConditionalGeneration": _CROSS,
    "VisionEncoderDecoderModel": _CROSS,
    "GitForCausalLM": _IN_FRONT,
    "Gemma3nForConditionalGeneration": _STREAMS,
    "HYV4VLForConditionalGeneration": _INDEXED,
    "Glm5NextForConditionalGeneration": _INDEXED,
    "Qwen4ExpForConditionalGeneration": _INDEXED,
    "Dots3NoteForConditionalGeneration": _INDEXED,
    "MistralLarge4ForConditionalGeneration": _INDEXED,
    "DiffusionGemmaForBlockDiffusion": _DIFFUSION,
}
ENCODER_DECODER = _CROSS
