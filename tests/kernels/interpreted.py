"""How much is tried where kernels run in Triton's interpreter, a hundred times slower than on a GPU."""

import torch


def examples(on_a_gpu: int) -> int:
    """Examples of a property: a third in the interpreter, drawn anew in every run."""
    return on_a_gpu if torch.cuda.is_available() else max(4, on_a_gpu // 3)
