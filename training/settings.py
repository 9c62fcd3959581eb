"""Settings of one training run."""

from dataclasses import dataclass

# How often a task of a single picture is asked, relative to the others.
TASK_SHARES = {
    "number": 3,
    "word": 2,
    "colour": 5,
    "exist": 6,
    "count": 4,
    "half": 2,
    "compare": 4,
    "list": 2,
    "box": 5,
}


@dataclass(frozen=True)
class StageSettings:
    """What any run has; written next to its log.

    Attributes
    ----------
    init : str
        Folder to go on from that an earlier run has written, or "" to begin.
    seconds : float
        Wall-clock limit of training, compilation included; progress of the schedules is measured against it.
    steps : int
        Upper limit of steps, or 0 for none.
    mix : str
        Samples per step by layout, such as "square:32,huge:1,pair:8".
    draw_ahead : int
        Steps whose scenes are drawn at once, and that a CUDA graph holds.
    questions, tail : int
        Questions per sample, and text tokens that they have to fit in.
    rate, matrix_rate : float
        Peak learning rates of AdamW and of Muon.
    warmup, floor, decay, clip : int, float, float, float
        Warm-up steps, last rate as a share of the peak, weight decay of matrices, gradient norm limit.
    auxiliary_from, auxiliary_until : float
        The auxiliary losses have full weight up to progress ``auxiliary_from`` and none from ``auxiliary_until`` on;
        an ``auxiliary_until`` of 0 leaves them out.
    place_weight : float
        Weight of the readout within the decoder beside that of the vision tower.
    seed : int
        Seed of the weights, and of the range of training scenes.
    compiled, graphed : bool
        Compile the blocks; replay the step as a CUDA graph. Both need a GPU.
    """

    init: str = ""
    seconds: float = 450.0
    steps: int = 0
    mix: str = "square:24,small:6,wide:5,tall:5,panorama:3,large:3,huge:2,pair:6"
    draw_ahead: int = 1
    questions: int = 8
    tail: int = 176
    rate: float = 1e-3
    matrix_rate: float = 3e-3
    warmup: int = 200
    floor: float = 0.01
    decay: float = 0.1
    clip: float = 1.0
    auxiliary_from: float = 0.0
    auxiliary_until: float = 0.5
    place_weight: float = 0.5
    seed: int = 1
    compiled: bool = False
    graphed: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.auxiliary_until <= 1.0:
            raise ValueError(f"auxiliary_until must lie in [0, 1], got {self.auxiliary_until}")
        if self.auxiliary_until and not 0.0 <= self.auxiliary_from < self.auxiliary_until:
            raise ValueError(
                f"auxiliary_from must lie in [0, auxiliary_until={self.auxiliary_until}), got {self.auxiliary_from}"
            )
        if self.seed < 0 or self.seed >= 2**15:
            raise ValueError(f"seed must lie in [0, {2**15}), got {self.seed}")


@dataclass(frozen=True)
class TrainSettings(StageSettings):
    """A run that trains the bundled model.

    Attributes
    ----------
    layers, mlp, rope_theta : int, int, float
        Decoder depth, MLP width and rotary base of a fresh model; one that ``init`` names is grown to ``layers``.
    """

    layers: int = 4
    mlp: int = 448
    rope_theta: float = 1e4
