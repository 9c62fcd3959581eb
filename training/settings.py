"""Settings of one training run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainSettings:
    """Everything that defines a run; written next to its log.

    Attributes
    ----------
    layers, mlp, rope_theta : int, int, float
        Decoder depth, MLP width and rotary base of a fresh model; only ``layers`` counts when ``init`` is given.
    init : str
        Folder of a checkpoint to start from, or "" for a fresh model. It is grown to ``layers`` decoder layers.
    seconds : float
        Wall-clock limit of training, compilation included; progress of the schedules is measured against it.
    steps : int
        Upper limit of steps, or 0 for none.
    batch, questions : int
        Scenes per step and questions per scene.
    rate, warmup, floor, decay, clip : float
        Peak learning rate, warm-up steps, last rate as a share of the peak, weight decay of matrices,
        gradient norm limit.
    auxiliary_until : float
        Progress in [0, 1] at which the auxiliary loss has faded from weight 1 to 0; 0 turns it off.
    seed : int
        Seed of the weights, and of the range of training scenes.
    compiled, graphed : bool
        Compile the blocks; replay the step as a CUDA graph. Both need a GPU.
    """

    layers: int = 12
    mlp: int = 448
    rope_theta: float = 2000.0
    init: str = ""
    seconds: float = 450.0
    steps: int = 0
    batch: int = 128
    questions: int = 8
    rate: float = 1e-3
    warmup: int = 300
    floor: float = 0.01
    decay: float = 0.01
    clip: float = 1.0
    auxiliary_until: float = 0.5
    seed: int = 1
    compiled: bool = False
    graphed: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.auxiliary_until <= 1.0:
            raise ValueError(f"auxiliary_until must lie in [0, 1], got {self.auxiliary_until}")
        if self.seed < 0 or self.seed >= 2**15:
            raise ValueError(f"seed must lie in [0, {2**15}), got {self.seed}")
