"""A web page to sample on: the settings that matter, the video, and what was made before it."""

import html
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import gradio as gr

from models.errors import WeightsError
from models.weights import read_info
from stages.errors import ConfigError
from stages.output import output_folder
from stages.page import PIXELATED_BELOW_PX
from stages.sampling.checkpoint import check_models, choose_checkpoint, video_size
from stages.sampling.config import SampleConfig
from stages.sampling.models import Models
from stages.sampling.record import read_record
from stages.sampling.sample import sample

SETTINGS = ("text_prompt", "negative_prompt", "seed", "steps", "guidance_scale", "width", "height", "frames")
"""What the page asks for, in its order."""
SANS, MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")  # Gradio's own are fetched from elsewhere
CSS = """
.gradio-container {width: 100% !important; max-width: 1180px !important; margin: 0 auto !important}
#top h1 {margin: 0; font-size: 1.7rem; letter-spacing: -.02em}
#top small, #about small {opacity: .7; overflow-wrap: anywhere}
#video video, #history video {image-rendering: RENDERING}
#video video {width: 100%}
#another {align-self: center}
#history .grid-wrap {min-height: 0; height: auto; padding-top: 36px}
#history .grid-container {grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)) !important}
footer {display: none !important}
"""


@dataclass(frozen=True)
class AppConfig(SampleConfig):
    """The settings of ``app``: those of ``sample``, with which the page begins, and where it is served.

    host: 127.0.0.1 is this machine alone; 0.0.0.0 lets in whoever reaches it, for there is no password.
    """

    output: str = "outputs/app"
    batch_size: int = 1
    host: str = "127.0.0.1"
    port: int = 7860


def serve(config: AppConfig) -> None:
    """The page, until interrupted. Raises ConfigError where it cannot be served or the models do not fit together."""
    page = Page(config)
    print(f"{page.about}: http://{config.host}:{config.port}", flush=True)
    try:
        page.build().launch(server_name=config.host, server_port=config.port, **page.launching())
    except OSError as error:
        where = f"{config.host}:{config.port}"
        raise ConfigError(f"cannot serve on {where} ({error}): give another host= or port=") from None


class Page:
    """One checkpoint, whose models stay in memory; each visitor has a history of their own."""

    def __init__(self, config: AppConfig):
        checkpoint = choose_checkpoint(config.ckpt)
        info = read_info(checkpoint)
        check_models(config.pretrained_model_path, info)
        size = video_size(config, info)
        self._output = output_folder(config.output).absolute()
        self._models = Models.on_this_machine().kept()
        self._config = replace(
            SampleConfig.part_of(config),
            ckpt=str(checkpoint),
            height=size.height,
            width=size.width,
            frames=size.frames,
            formats=("mp4",),
            names="numbered",
            samples_per_prompt=1,
            latents="",
        )
        self.about = f"{checkpoint}, trained for {info.step:,} steps on {', '.join(info.buckets)}"

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="wisesora", analytics_enabled=False) as page:
            gr.HTML(f"<h1>wisesora</h1><small>{html.escape(self.about)}</small>", elem_id="top")
            with gr.Row():
                with gr.Column(scale=5, min_width=300):
                    settings, button = self._settings()
                with gr.Column(scale=6, min_width=300):
                    video = gr.Video(label="Video", autoplay=True, loop=True, interactive=False, elem_id="video",
                                     buttons=["download"])  # fmt: skip
                    about = gr.HTML(elem_id="about")
            made = gr.State([])
            history = gr.Gallery(
                label="History: a click brings back a video and its settings", height="auto",
                allow_preview=False, interactive=False, buttons=[], elem_id="history",
            )  # fmt: skip
            prompt = settings[0]
            assert isinstance(prompt, gr.Textbox)
            gr.on(
                [button.click, prompt.submit], self.make, [made, *settings], [made, video, about, history],
                api_name="make", show_progress_on=video, scroll_to_output=True,
            )  # fmt: skip
            history.select(self.show, made, [video, about, *settings], api_visibility="private")
        return page

    def launching(self) -> dict[str, Any]:
        """For Gradio's launch: our look, and nothing to or from any other server."""
        small = min(self._config.height or 0, self._config.width or 0) < PIXELATED_BELOW_PX
        return {
            "theme": gr.themes.Soft(primary_hue="blue", neutral_hue="stone", font=SANS, font_mono=MONO),
            "css": CSS.replace("RENDERING", "pixelated" if small else "auto"),
            "allowed_paths": [str(self._output)],
            "share": False,
            "ssr_mode": False,
            "show_error": True,
            "quiet": True,
        }

    def _settings(self) -> tuple[list[gr.components.Component], gr.Button]:
        config = self._config
        prompt = config.text_prompt if isinstance(config.text_prompt, str) else ""
        negative = config.negative_prompt if isinstance(config.negative_prompt, str) else ""
        text = gr.Textbox(prompt, label="Prompt", placeholder="a red ball moves left", lines=3, autofocus=True)
        button = gr.Button("Make the video", variant="primary", elem_id="make")
        against = gr.Textbox(negative, label="Negative prompt", placeholder="what it should lead away from", lines=1)
        with gr.Row():
            seed = gr.Number(config.seed, label="Seed", precision=0, min_width=120)
            gr.Button("Another seed", min_width=120, elem_id="another").click(
                lambda: random.randrange(2**31), None, seed, api_visibility="private"
            )
        with gr.Row():
            steps = gr.Slider(1, max(100, config.steps), config.steps, step=1, label="Steps", min_width=220)
            guidance = gr.Slider(1, max(15, config.guidance_scale), config.guidance_scale, step=0.1, label="Guidance",
                                 min_width=220)  # fmt: skip
        with gr.Row():
            sizes = [
                gr.Number(getattr(config, name), label=label, precision=0, min_width=90)
                for name, label in (("width", "Width"), ("height", "Height"), ("frames", "Frames"))
            ]
        return [text, against, seed, steps, guidance, *sizes], button

    def make(
        self,
        made: list[str],
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008  where Gradio looks for it
        *values: Any,
    ) -> tuple[list[str], str, str, list[tuple[str, str]]]:
        """The history, the new video, what is said of it, and the history as a gallery."""
        try:
            config = _asked(self._config, values)
            output = self._output / f"{datetime.now():%Y%m%d-%H%M%S-%f}"
            (row,) = sample(replace(config, output=str(output)), self._models)["samples"]
        except (ConfigError, WeightsError) as mistake:
            raise gr.Error(html.escape(str(mistake)), duration=None, print_exception=False) from None
        path = str(output / row["file"])
        made = [path, *made]
        return made, path, _about(path), [(each, read_record(Path(each))["prompt"]) for each in made]

    def show(self, made: list[str], event: gr.SelectData) -> list[Any]:
        """One of the history: the video, what is said of it, and its settings."""
        path = made[event.index]
        settings = read_record(Path(path))["settings"]
        return [path, _about(path), settings["text_prompt"][0], *(settings[name] for name in SETTINGS[1:])]


def _asked(config: SampleConfig, values: Sequence[Any]) -> SampleConfig:
    """``config`` with the settings on the page. Raises ConfigError for one that is empty or cannot be."""
    asked = dict(zip(SETTINGS, values, strict=True))
    absent = [name for name, value in asked.items() if value is None]
    if absent:
        raise ConfigError(f"{absent[0]}: found nothing, expected a number: fill it in")
    if not asked["text_prompt"].strip():
        raise ConfigError("no prompt: write what the video should show")
    try:
        return replace(config, **asked | {"text_prompt": [asked["text_prompt"]]})
    except ValueError as mistake:
        raise ConfigError(str(mistake)) from None


def _about(path: str) -> str:
    record = read_record(Path(path))
    settings = record["settings"]
    told = (
        f"seed {record['seed']} · {settings['steps']} steps · guidance {settings['guidance_scale']:g} · "
        f"{settings['width']} × {settings['height']}, {settings['frames']} frames"
    )
    return f"<p>{html.escape(record['prompt'])}<br><small>{told}<br>{html.escape(path)}</small></p>"
