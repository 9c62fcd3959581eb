"""Token sequences for a batch of questions, assembled on the training device without host work."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from sparsevlm.scenes import ANSWER_TEXTS, QUESTION_TEXTS, QuestionBatch

IGNORE = -100


@dataclass(frozen=True)
class Sequences:
    """Chat-formatted text after the image, one row per scene.

    Attributes
    ----------
    input_ids : torch.Tensor
        int64 of shape (batch, tail), from <|vision_end|> on, padded on the right.
    answer_rows : torch.Tensor
        int64 of shape (batch, n_questions, answer_len): index into the tail of the token that predicts each answer
        token.
    targets : torch.Tensor
        int64 of shape (batch, n_questions, answer_len): answer tokens and <|im_end|>, then ``IGNORE``.
    """

    input_ids: torch.Tensor
    answer_rows: torch.Tensor
    targets: torch.Tensor


class SequenceBuilder:
    """Multi-turn chats about one image: the first turn is exactly a single-question prompt with its answer.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
        The bundled tokenizer.
    device : torch.device
        Where the tables live.

    Attributes
    ----------
    head_ids : torch.Tensor
        int64 of shape (head,): the prompt before the image tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, device: torch.device):
        def encode(text: str) -> list[int]:
            return list(tokenizer(text, add_special_tokens=False).input_ids)

        self.head_ids = torch.tensor(encode("<|im_start|>user\n<|vision_start|>"), device=device)
        turn_end = "<|im_end|>\n<|im_start|>assistant\n"
        opening = [encode("<|vision_end|>" + text + turn_end) for text in QUESTION_TEXTS]
        follow_up = [encode("\n<|im_start|>user\n" + text + turn_end) for text in QUESTION_TEXTS]
        self._questions, lengths = _padded_table(opening + follow_up, device)
        self._question_lengths = lengths
        self._answers, self._answer_lengths = _padded_table([encode(a + "<|im_end|>") for a in ANSWER_TEXTS], device)
        self._n_texts = len(QUESTION_TEXTS)
        self._pad = tokenizer.pad_token_id

    def tail_length(self, n_questions: int) -> int:
        """Tokens that any ``n_questions`` fit in, rounded up to a multiple of 8."""
        longest = self._questions.shape[1] + self._answers.shape[1]
        return -(-longest * n_questions // 8) * 8

    def __call__(self, questions: QuestionBatch) -> Sequences:
        """Assemble the chats of a batch."""
        batch, n_questions = questions.tasks.shape
        tail = self.tail_length(n_questions)
        turn = torch.arange(n_questions, device=questions.tasks.device)
        text = questions.text_ids + (turn > 0) * self._n_texts
        asked, answered = self._question_lengths[text], self._answer_lengths[questions.answer_ids]
        ends = (asked + answered).cumsum(dim=1)
        answer_starts = ends - answered

        input_ids = torch.full((batch, tail + 1), self._pad, dtype=torch.int64, device=text.device)
        for table, starts, lengths in (
            (self._questions[text], answer_starts - asked, asked),
            (self._answers[questions.answer_ids], answer_starts, answered),
        ):
            offset = torch.arange(table.shape[2], device=text.device)
            # What is past a row's length goes to an extra column that is cut off.
            place = torch.where(offset < lengths[..., None], starts[..., None] + offset, tail)
            input_ids.scatter_(1, place.flatten(1), table.flatten(1))

        offset = torch.arange(self._answers.shape[1], device=text.device)
        used = offset < answered[..., None]
        rows = torch.where(used, answer_starts[..., None] + offset - 1, 0)
        targets = self._answers[questions.answer_ids].masked_fill(~used, IGNORE)
        return Sequences(input_ids[:, :tail], rows, targets)


def _padded_table(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows as (rows, longest), zero-padded, and their lengths."""
    longest = max(map(len, rows))
    table = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    return table, torch.tensor([len(row) for row in rows], device=device)
