"""A page in the browser that generates images and classifies dropped ones, on this machine or as a Space of the Hub.

    python recipes/app.py
    python recipes/app.py --pipeline runs/brain_mri/unet --server_port 7861
    python recipes/app.py --pipeline user/name --push_space user/page

As a Space, this file is `app.py` and finds its pipeline in the variable MEDSD_PIPELINE. See docs/app.md.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING, Any

from medsd.commandline import run
from medsd.config import AppConfig
from medsd.errors import InputError

if TYPE_CHECKING:
    import gradio

    from medsd.inference.pipeline import MedSDPipeline

PIPELINE = "MEDSD_PIPELINE"
"""Environment variable: what a Space loads, where no flag can be given."""
UPLOAD_LIMIT_MB = 512
SESSIONS = 16
"""Of which the server keeps the dropped image; the oldest ones are forgotten first."""
MOST_STEPS = 100
MOST_WAITING = 32
"""Visitors in the queue; the next one is told to come back."""


def main(config: AppConfig) -> None:
    """Load the pipeline, and serve until Ctrl-C or SIGTERM; or send the page to the Hub."""
    if find_spec("gradio") is None:
        raise InputError('the page needs Gradio: pip install -c constraints.txt -e ".[app]"')
    if config.push_space:
        return push(config)
    from medsd.inference.pipeline import MedSDPipeline
    from medsd.runtime import quiet_libraries, start_processes

    quiet_libraries()
    pipe = MedSDPipeline.from_pretrained(chosen_pipeline(config)).to(start_processes().device)
    pipe.set_progress_bar_config(disable=True)
    with private_folder():
        serve(build(pipe, config), config)


def push(config: AppConfig) -> None:
    """Send this file and medsd to a Space."""
    from medsd.hub.space import push_space

    print(f"pushed to {push_space(Path(__file__), config.pipeline, config.push_space, config.hub_private_repo)}")
    print("a private pipeline needs a secret HF_TOKEN in the Space's settings, a token that may read it")


def chosen_pipeline(config: AppConfig) -> str:
    """The flag's; where that was left as it is, the environment's."""
    return os.environ.get(PIPELINE, config.pipeline) if config.pipeline == AppConfig().pipeline else config.pipeline


@contextmanager
def private_folder() -> Iterator[None]:
    """Gradio keeps files in a folder of this process alone, which is gone when it ends; and tells nobody that it runs."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with TemporaryDirectory(prefix="medsd_app_", dir=os.environ.get("GRADIO_TEMP_DIR")) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield


def serve(page: "gradio.Blocks", config: AppConfig) -> None:
    """Gradio's server, without what it would load or keep elsewhere."""
    import gradio as gr

    from medsd.report.fragments import stylesheet

    _, here, elsewhere = page.queue(max_size=MOST_WAITING).launch(
        server_name=config.server_name,
        server_port=config.server_port,
        share=config.share,
        theme=calm(gr),
        css=stylesheet(),
        max_file_size=f"{UPLOAD_LIMIT_MB}mb",
        state_session_capacity=SESSIONS,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
    )
    print(f"open {elsewhere or here} in a browser; Ctrl-C ends it", flush=True)
    try:
        Event().wait()
    finally:
        page.close(verbose=False)


def calm(gr: Any) -> Any:
    """A theme of fonts that every machine has, and of buttons that can be read."""
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return theme.set(button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700")


def build(pipe: "MedSDPipeline", config: AppConfig) -> "gradio.Blocks":
    """The page."""
    import gradio as gr

    from medsd.report.fragments import WARNING, about
    from medsd.report.visitor import cannot_classify

    with gr.Blocks(title="medsd", analytics_enabled=False, delete_cache=(60, 60)) as page:
        gr.HTML(WARNING, elem_classes="medsd-top")
        with gr.Tab("Generate"):
            add_generation(gr, pipe, config)
        with gr.Tab("Classify"):
            if reason := cannot_classify(pipe):
                gr.Markdown(reason)
            else:
                add_classification(gr, pipe, config)
        with gr.Tab("About"):
            gr.HTML(about(pipe))
    return page


def add_generation(gr: Any, pipe: "MedSDPipeline", config: AppConfig) -> None:
    """The tab that draws an image."""
    from medsd.config.use import SEEDS
    from medsd.report.visitor import generate, or_alert, takes_prompts

    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            names = gr.Dropdown(pipe.class_names, value=next(iter(pipe.class_names), None), label="Class", visible=bool(pipe.class_names))
            prompt = gr.Textbox(label="Prompt", visible=takes_prompts(pipe))
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=SEEDS - 1)
            most = min(MOST_STEPS, pipe.noise_schedule.config.num_train_timesteps)
            steps = gr.Slider(1, most, min(config.num_inference_steps, most), step=1, label="Denoising steps")
            guidance = gr.Slider(1, 10, config.guidance_scale, step=0.5, label="Guidance (1 is none)", visible=pipe.reads_prompts)
            start = gr.Button("Generate", variant="primary")
        with gr.Column(scale=2, min_width=280):
            shown = gr.HTML(min_height=160)

    def draw(name, text, seed, steps, guidance, progress=gr.Progress()):  # noqa: ANN001, ANN202, B008
        return or_alert(generate, pipe, name, text, int(seed or 0), int(steps), guidance, progress)

    start.click(draw, [names, prompt, seed, steps, guidance], shown, concurrency_id="model", api_name="generate")


def add_classification(gr: Any, pipe: "MedSDPipeline", config: AppConfig) -> None:
    """The tab that scores a dropped image."""
    from medsd.report.fragments import alert
    from medsd.report.visitor import MINUTES, classify, look, or_alert, receive, takes_prompts

    upload = gr.State(time_to_live=60 * MINUTES)
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            file = gr.File(label="Image file", height=170)
            gr.HTML(f'<p class="medsd-note">DICOM, NIfTI, PNG, JPEG, TIFF or NPY, up to {UPLOAD_LIMIT_MB} MB</p>')
            seen = gr.HTML(min_height=80)
            place = gr.Slider(1, 2, 1, step=1, label="Slice", visible=False)
            prompts = gr.Textbox(label="Prompts to choose between, one a line", lines=3, visible=takes_prompts(pipe))
            start = gr.Button("Classify", variant="primary")
        with gr.Column(scale=2, min_width=280):
            shown = gr.HTML(min_height=160)

    def take(path):  # noqa: ANN001, ANN202
        found, words = receive(pipe, Path(path))
        if found is None:
            return None, None, gr.Slider(visible=False), alert(words), ""
        label = "Frame" if found.modality else "Slice, from the lowest"
        slider = gr.Slider(1, max(2, len(found)), found.middle + 1, label=label, visible=len(found) > 1)
        return None, found, slider, look(pipe, found, found.middle + 1), ""

    def turn(found, number):  # noqa: ANN001, ANN202
        return look(pipe, found, int(number)), ""

    def score(found, number, texts, progress=gr.Progress()):  # noqa: ANN001, ANN202, B008
        return or_alert(classify, pipe, found, int(number), texts, config.max_pairs, progress)

    file.upload(take, file, [file, upload, place, seen, shown], show_progress_on=[seen], api_visibility="private")
    place.input(turn, [upload, place], [seen, shown], show_progress="hidden", trigger_mode="always_last", api_visibility="private")
    start.click(score, [upload, place, prompts], shown, concurrency_id="model", api_visibility="private")


if __name__ == "__main__":
    run(main, AppConfig)
