"""Video processor without torchvision: the frames go through the image processor."""

from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.processing_utils import VideosKwargs
from transformers.video_utils import VideoMetadata, make_batched_metadata, make_batched_videos

from .image_processor import PilImageProcessor, check_tensors, is_elsewhere


# transformers reads the types of these fields: annotations in this file must not be put off.
class VideoOptions(VideosKwargs, total=False):
    """Options of transformers' ``Qwen2VLVideoProcessor``, which cannot be imported without torchvision."""

    min_pixels: int
    max_pixels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_frames: int
    max_frames: int
    cap_pixels_per_frame: bool
    max_video_tokens: int


_SAMPLING = ("do_sample_frames", "num_frames", "fps", "min_frames", "max_frames")
_CAPPING = ("cap_pixels_per_frame", "max_video_tokens")


class PilVideoProcessor(PilImageProcessor):
    """Cuts videos into patches as transformers' ``Qwen2VLVideoProcessor`` does, with Pillow in place of torchvision.

    Options and their defaults are those of that class, and so is what ``to_dict`` and ``save_pretrained`` write.
    """

    size = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}  # noqa: RUF012 - as the base class has it
    do_sample_frames = False
    num_frames = None
    fps = None
    min_frames = 4
    max_frames = 768
    cap_pixels_per_frame = None
    max_video_tokens = 128000
    return_metadata = False
    valid_kwargs: Any = VideoOptions
    model_input_names = ["pixel_values_videos", "video_grid_thw"]  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        # A copy: older transformers write min_pixels and max_pixels into the class's own dict.
        super().__init__(**{**options, "size": dict(options.get("size") or type(self).size)})

    def preprocess(self, videos: Any, **options: Any) -> BatchFeature:
        """Cut videos into patches.

        Parameters
        ----------
        videos : list of arrays
            Each of shape (frames, channels, height, width), or one of :func:`make_batched_videos`' other forms.
        **options
            Of ``VideoOptions``; ``video_metadata`` is a list of one dict or ``VideoMetadata`` per video.

        Returns
        -------
        BatchFeature
            ``pixel_values_videos`` of shape (patches, channels * temporal_patch_size * patch_size²), float32,
            ``video_grid_thw`` of shape (videos, 3), and ``video_metadata`` where ``return_metadata`` is set.

        Raises
        ------
        ValueError
            If videos and metadata differ in number, or frames cannot be sampled as asked.
        """
        return_tensors = options.pop("return_tensors", None)
        if is_elsewhere(device := options.get("device")):
            check_tensors(device, return_tensors)
        return_metadata = self._option(options, "return_metadata")
        clips: list[Any] = make_batched_videos(videos)
        metadata = _metadata_of(clips, options.pop("video_metadata", None))
        sampling = {name: self._option(options, name) for name in _SAMPLING}
        if sampling.pop("do_sample_frames"):
            depth = options.get("temporal_patch_size") or self.temporal_patch_size
            clips = [_sampled(clip, one, depth, **sampling) for clip, one in zip(clips, metadata, strict=True)]
        cut = [self._cut(clip, dict(options)) for clip in clips]
        patches: Any = torch.cat([patches for patches, _ in cut])
        if not is_elsewhere(options.get("device")):
            patches = patches.numpy()
        data = {"pixel_values_videos": patches, "video_grid_thw": np.array([grid for _, grid in cut], dtype=np.int64)}
        inputs = BatchFeature(data, tensor_type=return_tensors)
        if return_metadata:
            inputs["video_metadata"] = metadata
        return inputs

    def get_number_of_video_patches(
        self, num_frames: int, height: int, width: int, videos_kwargs: dict[str, Any] | None = None
    ) -> int:
        """Patches of a video of a size, as in ``Qwen2VLVideoProcessor``."""
        options = dict(videos_kwargs or {})
        size = options.get("size") or self.size
        bounds = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        depth = options.get("temporal_patch_size") or self.temporal_patch_size
        return -(-num_frames // depth) * self.get_number_of_image_patches(height, width, {**bounds, **options})

    # transformers 5.24 calls it by this name.
    get_num_of_video_patches = get_number_of_video_patches

    def to_dict(self) -> dict[str, Any]:
        """Settings as ``Qwen2VLVideoProcessor`` has them, which reads them back."""
        settings = super().to_dict()
        settings.pop("image_processor_type", None)
        return {**settings, "video_processor_type": "Qwen2VLVideoProcessor"}

    def _option(self, options: dict[str, Any], name: str) -> Any:
        """Take an option out of those of a call; this processor's own value where it is not given."""
        value = options.pop(name, None)
        return getattr(self, name) if value is None else value

    def _cut(self, clip: np.ndarray, options: dict[str, Any]) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Patches of one video, and its grid (t, h, w)."""
        depth = options.get("temporal_patch_size") or self.temporal_patch_size
        patch_size = options.get("patch_size") or self.patch_size
        frames = [*clip, *[clip[-1]] * (-len(clip) % depth)]
        cap, budget = (self._option(options, name) for name in _CAPPING)
        if cap:
            factor = patch_size * (options.get("merge_size") or self.merge_size)
            options["size"] = _capped(options.get("size") or self.size, budget * factor**2, depth, len(clip))
        # One temporal copy per frame: the copies that make up a patch are frames here, not repetitions of one image.
        options.update(temporal_patch_size=1, return_tensors="pt")
        cut = super().preprocess(frames, **options)
        _, height, width = (int(length) for length in cut["image_grid_thw"][0])
        steps = len(frames) // depth
        pixels = cut["pixel_values"].reshape(steps, depth, height * width, -1, patch_size**2)
        patches = pixels.permute(0, 2, 3, 1, 4).reshape(steps * height * width, -1)
        return patches, (steps, height, width)


def _metadata_of(clips: Any, metadata: Any) -> list[VideoMetadata]:
    if metadata is None:
        return make_batched_metadata(clips, video_metadata=None)  # type: ignore[arg-type]
    given = [metadata] if isinstance(metadata, (dict, VideoMetadata)) else list(metadata)
    if given and isinstance(given[0], (list, tuple)):
        given = [one for several in given for one in several]
    if len(given) != len(clips):
        raise ValueError(f"got {len(clips)} videos, but metadata of {len(given)}.")
    return [VideoMetadata(**{"total_num_frames": len(clip), **one}) for clip, one in zip(clips, given, strict=True)]


def _sampled(
    clip: np.ndarray,
    metadata: VideoMetadata,
    depth: int,
    num_frames: int | None,
    fps: float | None,
    min_frames: int,
    max_frames: int,
) -> np.ndarray:
    """Evenly spaced frames, as many as ``Qwen2VLVideoProcessor.sample_frames`` takes; noted in the metadata."""
    total = len(clip)
    if metadata.total_num_frames != total:
        raise ValueError(
            f"a video of {metadata.total_num_frames} frames came with {total} of them, already sampled; leave "
            "num_frames, fps and do_sample_frames out."
        )
    if fps is not None and num_frames is not None:
        raise ValueError("num_frames and fps both say how many frames are sampled; give one of them.")
    if num_frames is not None:
        wanted = round(num_frames / depth) * depth
    elif fps is not None:
        if metadata.fps is None:
            raise ValueError(
                "sampling by fps needs the frames per second of the video: give video_metadata=[{'fps': ...}]."
            )
        most = min(max_frames, total) // depth * depth
        wanted = int(min(max(total / metadata.fps * fps, min_frames), most)) // depth * depth
    else:
        wanted = total
    if not 0 < wanted <= total:
        raise ValueError(
            f"{wanted} frames cannot be sampled from a video of {total}, in steps of {depth}; change num_frames or fps."
        )
    metadata.frames_indices = [index * total // wanted for index in range(wanted)]
    return clip[metadata.frames_indices]


def _capped(size: Any, budget: int, depth: int, n_frames: int) -> dict[str, int]:
    """Bounds on a frame's pixels where a whole video gets 90 % of ``budget`` pixels."""
    longest = min(size["longest_edge"], int(budget * 0.9) * depth // n_frames)
    return {**dict(size), "longest_edge": max(longest, int(size["shortest_edge"] * 1.05))}
