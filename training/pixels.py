"""Image preprocessing on the training device, equal to ``transformers.Qwen2VLImageProcessorPil``."""

import torch
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

PATCH = 14
MERGE = 2


class Patchifier:
    """uint8 images to normalised patches in the order of the image processor.

    Parameters
    ----------
    device : torch.device
        Where the normalisation constants live.
    """

    def __init__(self, device: torch.device):
        self._mean = torch.tensor(OPENAI_CLIP_MEAN, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(OPENAI_CLIP_STD, device=device).view(1, 3, 1, 1)

    def __call__(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """One temporal slice of the patches; the processor repeats it for an image.

        Parameters
        ----------
        images : torch.Tensor
            uint8 of shape (batch, 3, height, width), both sides multiples of 28.

        Returns
        -------
        torch.Tensor
            Shape (batch, patches, 3 * 14 * 14) in ``dtype``.
        """
        batch, channels, height, width = images.shape
        normalised = self._normalised(images, dtype)
        rows, cols = height // (PATCH * MERGE), width // (PATCH * MERGE)
        blocks = normalised.view(batch, channels, rows, MERGE, PATCH, cols, MERGE, PATCH)
        return blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(batch, rows * cols * MERGE**2, channels * PATCH**2)

    def normalised(self, patches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Values of uint8 patches as the model takes them, both of shape (patches, 3 * 14 * 14)."""
        return self._normalised(patches.view(-1, 3, PATCH, PATCH), dtype).flatten(1)

    def _normalised(self, images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return ((images.to(torch.float32) * (1 / 255) - self._mean) / self._std).to(dtype)


def full_patches(patches: torch.Tensor) -> torch.Tensor:
    """Repeat the temporal slice: (batch, patches, 3 * 196) to ``pixel_values`` (batch * patches, 3 * 2 * 196)."""
    slices = patches.unflatten(2, (3, 1, PATCH * PATCH)).expand(-1, -1, -1, 2, -1)
    return slices.flatten(2).flatten(0, 1)
