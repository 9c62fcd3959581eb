"""Token sequences for a batch of questions, assembled on the training device without host work."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from sparsevlm.scenes import NO_PIECE, PIECES, QUESTION_TEXTS, QuestionBatch

IGNORE = -100


@dataclass(frozen=True)
class Sequences:
    """Chat-formatted text after the last image, one row per scene.

    Attributes
    ----------
    input_ids : torch.Tensor
        int64 of shape (batch, tail), from <|vision_end|> on, padded on the right.
    targets : torch.Tensor
        int64 of shape (batch, tail): at each row that predicts a token of an answer (or its <|im_end|>) that token,
        else ``IGNORE``.
    owner : torch.Tensor
        int64 of shape (batch, tail): question that a target belongs to; anything where there is no target.
    complete : torch.Tensor
        bool of shape (batch, n_questions): whether the whole answer fits into the tail. Of others nothing is a target.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    complete: torch.Tensor


class SequenceBuilder:
    """Multi-turn chats about pictures: the first turn is exactly a single-question prompt with its answer.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        With the tokens of Qwen's chats.
    device : torch.device
        Where the tables live.

    Attributes
    ----------
    head_ids, between_ids : torch.Tensor
        int64: the prompt before the first image's tokens, and between two images.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: torch.device):
        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False).input_ids)

        image = [{"role": "user", "content": [{"type": "image"}]}]
        head, _, _ = tokenizer.apply_chat_template(image, tokenize=False).partition("<|image_pad|>")
        self.head_ids = torch.tensor(encode(head), device=device)
        self.between_ids = torch.tensor(encode("<|vision_end|><|vision_start|>"), device=device)
        turn_end = "<|im_end|>\n<|im_start|>assistant\n"
        opening = [encode("<|vision_end|>" + text + turn_end) for text in QUESTION_TEXTS]
        follow_up = [encode("\n<|im_start|>user\n" + text + turn_end) for text in QUESTION_TEXTS]
        self._questions, self._question_lengths = _padded_table(opening + follow_up, device)
        self._pieces, self._piece_lengths = _padded_table([encode(piece) for piece in PIECES], device)
        self._end = tokenizer.eos_token_id
        self._n_texts = len(QUESTION_TEXTS)
        self._pad = tokenizer.pad_token_id

    def longest_turn(self, n_pieces: int) -> int:
        """Tokens that any question with an answer of ``n_pieces`` fits in."""
        return self._questions.shape[1] + n_pieces * self._pieces.shape[1] + 1

    def __call__(self, questions: QuestionBatch, tail: int) -> Sequences:
        """Assemble the chats of a batch in ``tail`` tokens; questions that do not fit are cut off."""
        batch, n_questions = questions.tasks.shape
        device = questions.tasks.device
        turn = torch.arange(n_questions, device=device)
        text = questions.text_ids + (turn > 0) * self._n_texts
        answers, answered = self._answers(questions.pieces)
        asked = self._question_lengths[text]
        ends = (asked + answered).cumsum(dim=1)
        answer_starts = ends - answered

        input_ids = torch.full((batch, tail + 1), self._pad, dtype=torch.int64, device=device)
        targets, owner = torch.full_like(input_ids, IGNORE), torch.zeros_like(input_ids)
        complete = ends <= tail
        # What is past a row's length, or past the tail, goes to an extra column that is cut off.
        offset = torch.arange(self._questions.shape[1], device=device)
        place = torch.where(offset < asked[..., None], (answer_starts - asked)[..., None] + offset, tail)
        input_ids.scatter_(1, place.clamp(max=tail).flatten(1), self._questions[text].flatten(1))
        offset = torch.arange(answers.shape[2], device=device)
        used = offset < answered[..., None]
        place = torch.where(used, answer_starts[..., None] + offset, tail).clamp(max=tail)
        input_ids.scatter_(1, place.flatten(1), answers.flatten(1))
        place = torch.where(used & complete[..., None], place - 1, tail).flatten(1)
        targets.scatter_(1, place, answers.flatten(1))
        owner.scatter_(1, place, turn[:, None].expand(batch, -1, answers.shape[2]).flatten(1))
        return Sequences(input_ids[:, :tail], targets[:, :tail], owner[:, :tail], complete)

    def _answers(self, pieces: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (batch, n, longest), <|im_end|> after those of the last piece, and their numbers (batch, n)."""
        lengths = torch.where(pieces == NO_PIECE, 0, self._piece_lengths[pieces.clamp(min=0)])
        ends = lengths.cumsum(dim=2)
        offset = torch.arange(self._pieces.shape[1], device=pieces.device)
        longest = pieces.shape[2] * self._pieces.shape[1]
        # What a shorter piece does not use goes to an extra column that is cut off.
        used = offset < lengths[..., None]
        place = torch.where(used, (ends - lengths)[..., None] + offset, longest + 1)
        tokens = torch.full((*pieces.shape[:2], longest + 2), self._end, device=pieces.device)
        tokens.scatter_(2, place.flatten(2), self._pieces[pieces.clamp(min=0)].flatten(2))
        return tokens[..., :-1], ends[..., -1] + 1


def _padded_table(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows as (rows, longest), zero-padded, and their lengths."""
    longest = max(map(len, rows))
    table = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    return table, torch.tensor([len(row) for row in rows], device=device)
