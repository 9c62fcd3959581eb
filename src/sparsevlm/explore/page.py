"""The page itself, of gradio's components."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..scenes import Scene
from ..selection.selectors import DEFAULT, SELECTORS
from .answers import DENSE, DONE, WAITING, Answer, Answerer, Side
from .drawing import draw_patches, legend, numbers
from .question import MAX_CHARACTERS, Question, read_picture
from .runs import Run, Runs

TITLE = "sparsevlm explore"
LEAST_KEEP, MOST_NEW_TOKENS = 0.05, 512
_NO_OTHER = "none"
_SETTLES = 0.3  # seconds after which a slider that moves no further is obeyed
_FILES_LIVE = 3600  # seconds for which pictures stay on the server
_PREVIEW = 1024  # pixels of its longer side
_AT_ONCE, _IN_QUEUE = 16, 64
Updates = dict[Any, Any]


def build_page(answerer: Answerer, scene: Scene, note: str = "") -> gr.Blocks:
    """Make the page of a model.

    Parameters
    ----------
    answerer : Answerer
    scene : Scene
        The picture that is there at the start, with the questions to pick from.
    note : str
        Said above the answers.
    """
    return _Page(answerer, scene, note).blocks


class _Column:
    """Components of one side."""

    def __init__(self, key: str, title: str, *, is_visible: bool = True) -> None:
        with gr.Column(visible=is_visible, min_width=280, elem_id=key) as self.box:
            self.title = gr.Markdown(f"### {title}")
            self.text = gr.Textbox(
                label="answer", lines=3, interactive=False, elem_id=f"{key}-answer", buttons=["copy"]
            )
            self.numbers = gr.HTML(elem_id=f"{key}-numbers")
            self.drawing = gr.Image(
                label="patches", interactive=False, height=420, buttons=["fullscreen"], elem_id=f"{key}-patches",
                alt_text=f"Patches of the picture that are kept, recycled and dropped: {title}",
            )  # fmt: skip
            self.caption = gr.HTML(elem_id=f"{key}-counts")

    @property
    def outputs(self) -> list[Any]:
        """Components that answers change."""
        return [self.title, self.text, self.numbers, self.drawing, self.caption]

    def show(self, answer: Answer) -> Updates:
        """The answer as far as it is."""
        return {self.title: f"### {answer.side.name}", self.text: answer.text, self.numbers: numbers(answer)}

    def draw(self, picture: Image.Image, answer: Answer, layer: int, processor: Any) -> Updates:
        """The patches of an answer that is there."""
        drawing, caption = draw_patches(picture, answer, layer, processor)
        return {self.drawing: drawing, self.caption: f"<p>{escape(caption)}</p>"}


class _Page:
    """Components of the page, and what they do."""

    def __init__(self, answerer: Answerer, scene: Scene, note: str) -> None:
        self._answerer, self._runs = answerer, Runs()
        refusals = answerer.refusals(list(SELECTORS))
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(_FILES_LIVE, _FILES_LIVE)) as self.blocks:
            gr.Markdown(f"# {TITLE}\n{answerer.name}. {note}")
            with gr.Row():
                self._place_picture(scene)
                self._place_options(scene, refusals)
            self.message = gr.HTML(elem_id="message")
            self.layer = gr.Slider(
                -1, answerer.n_layers - 1, answerer.n_layers - 1, step=1, elem_id="layer",
                label="Patches behind decoder layer (-1: before the decoder)", buttons=[],
            )  # fmt: skip
            gr.HTML(legend(), elem_id="legend")
            with gr.Row():
                self.columns = [_Column("dense", "dense"), _Column("first", DEFAULT)]
                self.columns.append(_Column("second", "second selector", is_visible=False))
            self.asked, self.answers = gr.State(None), gr.State(())
            self._connect()
        self.blocks.queue(max_size=_IN_QUEUE, api_open=False)

    def _place_picture(self, scene: Scene) -> None:
        with gr.Column(min_width=280):
            self.picture = gr.Image(
                scene.image, label="Picture", interactive=False, height=320, buttons=["fullscreen"], elem_id="picture",
                alt_text="The picture that is asked about",
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:  # gradio copies it
                example = Path(folder) / f"scene-{scene.seed}.png"
                scene.image.save(example)
                self.file = gr.File(str(example), label="Upload a picture", height=120, elem_id="file")

    def _place_options(self, scene: Scene, refusals: dict[str, str]) -> None:
        choices = [(f"{name} (refused by this model)" if name in refusals else name, name) for name in SELECTORS]
        with gr.Column(scale=2, min_width=320):
            texts = [question.text for question in scene.questions]
            self.question = gr.Textbox(
                texts[0], label="Question", max_length=MAX_CHARACTERS, elem_id="question", submit_btn=False
            )
            gr.Examples([[text] for text in texts], [self.question], label="Questions about the drawn scene")
            with gr.Row():
                self.first = gr.Dropdown(choices, value=DEFAULT, label="Selector", elem_id="selector")
                self.second = gr.Dropdown(
                    [(_NO_OTHER, _NO_OTHER), *choices],
                    value=_NO_OTHER,
                    label="Second selector",
                    elem_id="other-selector",
                )
            with gr.Row():
                self.keep = gr.Slider(
                    LEAST_KEEP, 1.0, 0.25, step=0.01, elem_id="keep", interactive=True,
                    label="Budget: share of the visual tokens, averaged over the layers (keep)", buttons=[],
                )  # fmt: skip
                self.adaptive = gr.Checkbox(
                    False, label="No budget: the selector decides, or the rank of the attention", elem_id="adaptive"
                )
            self.max_new_tokens = gr.Slider(
                1, MOST_NEW_TOKENS, 64, step=1, label="New tokens, at most", buttons=[], elem_id="most"
            )
            with gr.Row():
                self.ask = gr.Button("Ask", variant="primary", elem_id="ask")
                self.stop = gr.Button("Stop", elem_id="stop")

    def _connect(self) -> None:
        pruning = [self.keep, self.adaptive, self.first, self.second, self.layer]
        shown = [component for column in self.columns for component in column.outputs]
        shown += [self.message, self.asked, self.answers]
        common = {"show_progress": "hidden", "api_visibility": "private"}
        slow = {**common, "trigger_mode": "multiple", "concurrency_limit": _AT_ONCE, "concurrency_id": "answers"}
        fresh = [self.file, self.question, self.max_new_tokens, *pruning, self.asked, self.answers]
        gr.on([self.ask.click, self.question.submit], self._ask, fresh, shown, **slow)
        changed = [self.keep.release, self.adaptive.input, self.first.input, self.second.input]
        gr.on(changed, self._prune_again, [self.asked, self.answers, *pruning], shown, **slow)
        self.second.change(self._show_second, [self.second], [self.columns[2].box], **common)
        self.adaptive.change(
            lambda adaptive: gr.Slider(interactive=not adaptive), [self.adaptive], [self.keep], **common
        )
        self.file.change(self._look, [self.file], [self.picture, self.message], **common)
        drawn = [component for column in self.columns for component in (column.drawing, column.caption)]
        self.layer.change(
            self._draw, [self.asked, self.answers, self.layer], drawn, trigger_mode="always_last", **common
        )
        self.stop.click(self._stop, None, None, queue=False, **common)
        self.blocks.unload(self._leave)

    def _look(self, file: str | None) -> tuple[Image.Image | None, str]:
        """Show an uploaded picture, or why it cannot be asked about."""
        try:
            picture = read_picture(file)
        except (ValueError, OSError) as error:
            return None, _problem(error) if file is not None else ""
        picture.thumbnail((_PREVIEW, _PREVIEW))
        return picture, ""

    def _ask(
        self,
        file: str | None,
        text: str,
        max_new_tokens: int,
        keep: float,
        adaptive: bool,
        first: str,
        second: str,
        layer: int,
        asked: Question | None,
        answers: Sequence[Answer],
        request: gr.Request,
    ) -> Iterator[Updates]:
        """Answer the page's question under all its sides."""
        run = self._runs.begin(str(request.session_hash), layer)
        try:
            question = Question(read_picture(file), text, int(max_new_tokens))
        except (ValueError, OSError) as error:
            yield {self.message: _problem(error)}
            return
        yield from self._run(run, question, answers if asked == question else (), _sides(keep, adaptive, first, second))

    def _prune_again(
        self,
        asked: Question | None,
        answers: Sequence[Answer],
        keep: float,
        adaptive: bool,
        first: str,
        second: str,
        layer: int,
        request: gr.Request,
    ) -> Iterator[Updates]:
        """Answer the last question under other options, once they have stayed a moment."""
        if asked is None:
            return
        run = self._runs.begin(str(request.session_hash), layer)
        if not run.stop.wait(_SETTLES):
            yield from self._run(run, asked, answers, _sides(keep, adaptive, first, second))

    def _run(self, run: Run, question: Question, former: Sequence[Answer], sides: Sequence[Side]) -> Iterator[Updates]:
        known = {answer.side: answer for answer in former if answer.side == DENSE and answer.state == DONE}
        yield {self.message: "", self.asked: question}
        shown: list[Answer | None] = [None] * len(sides)
        for answers in self._answerer.compare(question, sides, run.stop, known):
            if not run.is_shown:
                return
            updates: Updates = {self.answers: answers}
            for index, (column, answer) in enumerate(zip(self.columns, answers, strict=False)):
                if answer is not shown[index]:
                    updates |= column.show(answer)
                    if answer.state == WAITING and not known:  # what is drawn is of another picture or question
                        updates |= {column.drawing: None, column.caption: ""}
                    if not answer.is_open:
                        updates |= column.draw(question.picture, answer, run.layer, self._answerer.processor)
                    shown[index] = answer
            yield updates

    def _draw(self, asked: Question | None, answers: Sequence[Answer], layer: int, request: gr.Request) -> Updates:
        """Draw the patches of all answers behind another layer, and let those to come follow."""
        self._runs.turn_to(str(request.session_hash), layer)
        updates: Updates = {self.columns[0].caption: gr.skip()}
        for column, answer in zip(self.columns, answers, strict=False):
            if asked is not None and not answer.is_open:
                updates |= column.draw(asked.picture, answer, layer, self._answerer.processor)
        return updates

    def _show_second(self, second: str) -> Any:
        return gr.Column(visible=second != _NO_OTHER)

    def _stop(self, request: gr.Request) -> None:
        self._runs.stop(str(request.session_hash))

    def _leave(self, request: gr.Request) -> None:
        self._runs.leave(str(request.session_hash))


def _sides(keep: float, adaptive: bool, first: str, second: str) -> list[Side]:
    budget = None if adaptive else keep
    return [DENSE, *(Side.pruned(name, budget) for name in (first, second) if name != _NO_OTHER)]


def _problem(error: Exception) -> str:
    return f'<p class="problem" role="alert">{escape(" ".join(str(error).split()))}</p>'
