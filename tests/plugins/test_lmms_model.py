"""The plugin's model inside this process, on a randomly initialised Qwen2.5-VL; lmms-eval has to be installed."""

import importlib.util

import pytest
import torch
from PIL import Image

from tiny_checkpoint import save_tiny_checkpoint

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None,
    reason="lmms-eval is not installed: nox -s lmms_eval, or pip install '.[eval]' after torch",
)


@pytest.fixture(scope="module")
def model_class():
    from lmms_eval.models import get_model

    return get_model("sparsevlm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def make(model_class, checkpoint):
    """Make a model of the plugin from the text of ``--model_args``."""

    def make_model(arguments="keep=0.6,min_keep=4", **more):
        return model_class.create_from_arg_string(f"pretrained={checkpoint},{arguments}", {"device": "cpu", **more})

    return make_model


def ask(model, *conversations, **options):
    """Answers to messages, all in one call."""
    from lmms_eval.api.instance import Instance

    options = {"max_new_tokens": 6, **options}
    model.task_dict = {"task": {"test": conversations}}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=(str(i), lambda doc: [dict(message) for message in doc], options, i, "task", "test"),
            idx=0,
            metadata={"task": "task", "doc_id": i, "repeats": 1},
        )
        for i in range(len(conversations))
    ]
    return [one.text for one in model.generate_until(requests)]


def user(*parts):
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "video" if isinstance(part, list) else "image", "url": part}
        for part in parts
    ]
    return {"role": "user", "content": content}


def picture(width=168, height=140, seed=0):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


CONVERSATIONS = [
    [user(picture(), "What is in the picture?")],
    [user(picture(seed=1), "the first", picture(112, 196, 2), "How many red circles are there?")],
    [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, user(picture(seed=3), "And now?")],
    [user([picture(seed=seed) for seed in range(4, 8)], "What happens?")],
    [user("Say something.")],
]


def test_a_batch_answers_as_each_alone(make):
    """Several pictures, a system message, a video and a text without any, padded together."""
    model = make(batch_size="5")
    together = ask(model, *CONVERSATIONS)
    assert together == [ask(model, one)[0] for one in CONVERSATIONS]
    assert len(set(together)) > 1
    assert model.totals.tasks["task"].n_samples == 8  # the text has no visual tokens


def test_pruning_changes_what_is_kept_and_dense_nothing(make):
    pruned, dense = make(batch_size=2), make("keep=1.0")
    ask(pruned, *CONVERSATIONS[:2])
    ask(dense, *CONVERSATIONS[:2])
    assert not dense.model._forward_pre_hooks
    assert pruned.totals.tasks["task"].n_visual_sum == dense.totals.tasks["task"].n_visual_sum
    assert pruned.totals.tasks["task"].average_in <= 0.6 * dense.totals.tasks["task"].average_in


def test_a_system_prompt_takes_the_place_of_the_task_s(make, tmp_path):
    said = ask(make(), CONVERSATIONS[2])
    (tmp_path / "prompt.txt").write_text("Be brief.\n")
    model = make(f"keep=0.6,min_keep=4,system_prompt={tmp_path / 'prompt.txt'}")
    assert ask(model, CONVERSATIONS[2][1:]) == said


def test_generation_options_reach_generate(make, monkeypatch):
    model, seen = make(), []
    generate = model.model.generate
    monkeypatch.setattr(model.model, "generate", lambda **given: seen.append(given) or generate(**given))
    whole = ask(model, CONVERSATIONS[0])[0]
    assert (seen[-1]["do_sample"], seen[-1]["temperature"], seen[-1]["max_new_tokens"]) == (False, None, 6)
    middle = whole[len(whole) // 2]
    assert ask(model, CONVERSATIONS[0], until=[middle])[0] == whole.split(middle)[0]
    ask(model, CONVERSATIONS[0], num_beams=2)
    assert seen[-1]["num_beams"] == 2
    torch.manual_seed(0)
    ask(model, CONVERSATIONS[0], temperature=0.7, top_p=0.9)
    assert (seen[-1]["do_sample"], seen[-1]["temperature"], seen[-1]["top_p"]) == (True, 0.7, 0.9)
    assert model.totals.tasks["task"].n_samples == 4


def test_a_fixed_number_of_visual_tokens(make):
    model = make("keep=dense,n_visual=48")
    ask(model, [user(picture(400, 300), "What?")], [user(picture(90, 50), "What?")], [user(picture(56, 56), "What?")])
    assert model.totals.tasks["task"].n_visual_sum == 8 * 6 + 10 * 5 + 7 * 7
    with pytest.raises(ValueError, match="n_visual is for images"):
        ask(model, CONVERSATIONS[3])


def test_smaller_images_instead_of_pruning(make):
    """Of 8 x 6 and 7 x 7 tokens at most 24 are left; of several pictures each keeps its share, from its own pixels."""
    wide, square = picture(400, 300), picture(56, 56)
    model = make("selector=downsample,keep=24,n_visual=48")
    assert not model.model._forward_pre_hooks
    ask(model, [user(wide, "What?")], [user(square, "What?")])
    assert model.totals.tasks["task"].n_visual_sum == 4 * 6 + 4 * 5
    assert [image.size for image in model._sizes([wide])] == [(6 * 28, 4 * 28)]
    assert sum(image.width * image.height for image in model._sizes([wide, wide])) <= 24 * 28**2
    assert [image.size for image in make("selector=downsample,keep=60,n_visual=48")._sizes([wide])] == [(224, 168)]
    half = make("selector=downsample,keep=0.5")
    ask(half, CONVERSATIONS[0])
    assert half.totals.tasks["task"].n_visual_sum == 5 * 3
    with pytest.raises(ValueError, match="selector=downsample is for images"):
        ask(half, CONVERSATIONS[3])


def test_a_draw_differs_from_batch_to_batch(make):
    """The same picture under two questions loses other tokens; the same question again the same."""
    model, kept = make("selector=random,keep=0.6,min_keep=4,seed=3"), []
    count = model._count
    model._count = lambda *given: kept.append(model._state.report.samples[0].stages[0].kept) or count(*given)
    for _ in range(2):
        ask(model, CONVERSATIONS[0], [user(picture(), "Is there a circle at all in this picture?")])
    assert len(kept) == 4
    assert kept[:2] == kept[2:]
    assert kept[0] != kept[1]


def test_bounds_on_pixels(make):
    model = make(f"keep=dense,max_pixels={10 * 28 * 28}")
    ask(model, CONVERSATIONS[0], CONVERSATIONS[3])
    per_frame = 3 * 2  # both sides are rounded down
    assert model.totals.tasks["task"].n_visual_sum == per_frame + 2 * per_frame


def test_a_video_file(make, tmp_path):
    import av

    with av.open(str(tmp_path / "video.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 112, 112, "yuv420p"
        for seed in range(9):
            packet = stream.encode(av.VideoFrame.from_image(picture(112, 112, seed)))
            video.mux(packet)
        video.mux(stream.encode())
    message = {"role": "user", "content": [{"type": "video", "url": str(tmp_path / "video.mp4")}]}
    message["content"].append({"type": "text", "text": "What happens?"})
    model = make(f"keep=dense,max_num_frames=4,max_pixels={16 * 28 * 28},min_pixels=784")
    assert ask(model, [message])
    assert model.totals.tasks["task"].n_visual_sum == 2 * 16
    (tmp_path / "text.mp4").write_text("no video")
    message["content"][0]["url"] = str(tmp_path / "text.mp4")
    with pytest.raises(ValueError, match=r"task task, document 0 of test: .*text\.mp4 is not a video"):
        ask(model, [message])


def test_the_arguments_go_before_the_command_line(make):
    model = make("keep=dense,batch_size=3", batch_size="1")
    assert model.batch_size == 3
    assert model.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ("keep", ValueError, "model_args must be name=value"),
        ("keep=0.5,selector=best", ValueError, "there is no selector 'best'"),
        ("selector=span,keep=0.1", ValueError, "keep"),
        ("target_layers=2;70", ValueError, "70"),
    ],
)
def test_what_the_model_refuses(make, arguments, error, words):
    with pytest.raises(error, match=words):
        make(arguments)


def test_other_kinds_of_tasks_are_refused(make):
    model = make("keep=dense")
    with pytest.raises(NotImplementedError, match="generate_until only"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="several rounds"):
        model.generate_until_multi_round([])


def test_clean_frees_the_model_and_tells_once(make):
    from lmms_eval.models.model_utils import gen_metrics

    model = make()
    ask(model, CONVERSATIONS[0])
    inner, kept = model.model, model.totals.figures()
    gen_metrics.reset_logged_metrics()
    model.clean()
    assert not hasattr(model, "model")
    assert not inner.model.language_model.layers[1]._forward_pre_hooks
    summary = gen_metrics.summarize_logged_metrics()
    assert summary["avg_kept_tokens_layer_input"] == kept["kept_tokens_layer_input"]
    assert summary["total_gen_tokens"] == model.totals.new_tokens
