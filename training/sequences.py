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
        The bundled tokenizer.
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

        self.head_ids = torch.tensor(encode("<|im_start|>user\n<|vision_start|>"), device=device)
        self.between_ids = torch.tensor(encode("<|vision_end|><|vision_start|>"), device=device)
        turn_end = "<|im_end|>\n<|im_start|>assistant\n"
        opening = [encode("<|vision_end|>" + text + turn_end) for text in QUESTION_TEXTS]
        follow_up = [encode("\n<|im_start|>user\n" + text + turn_end) for text in QUESTION_TEXTS]
        self._questions, self._question_lengths = _padded_table(opening + follow_up, device)
        pieces = [encode(piece) for piece in PIECES]
        if longest := [piece for piece, ids in zip(PIECES, pieces, strict=True) if len(ids) != 1]:
            raise ValueError(f"the tokenizer splits these pieces of answers: {longest}")
        self._pieces = torch.tensor([ids[0] for ids in pieces], device=device)
        self._end = tokenizer.eos_token_id
        self._n_texts = len(QUESTION_TEXTS)
        self._pad = tokenizer.pad_token_id

    def longest_turn(self, n_pieces: int) -> int:
        """Tokens that any question with an answer of ``n_pieces`` fits in."""
        return self._questions.shape[1] + n_pieces + 1

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
        """Tokens (batch, n, MAX_PIECES + 1), <|im_end|> after the last piece, and their numbers (batch, n)."""
        pieces = torch.nn.functional.pad(pieces, (0, 1), value=NO_PIECE)
        tokens = torch.where(pieces == NO_PIECE, self._end, self._pieces[pieces.clamp(min=0)])
        return tokens, (pieces != NO_PIECE).sum(dim=2) + 1


def _padded_table(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows as (rows, longest), zero-padded, and their lengths."""
    longest = max(map(len, rows))
    table = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    return table, torch.tensor([len(row) for row in rows], device=device)
