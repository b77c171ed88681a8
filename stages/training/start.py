"""What a run takes from the weights that it starts from (``train.init_from``), beside the weights."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.loading import LoadReport, load_into, open_pretrained
from models.objective import ObjectiveConfig
from models.transformer import Transformer
from stages.errors import ConfigError

POSITIONS = ("sample_size", "position_scale")


def model_settings(given: Mapping[str, Any], init_from: str | None, resumed: Path | None) -> dict[str, Any]:
    """The ``model`` section with what the weights call for where it says nothing: above all the range of positions.

    Of sample_size and position_scale, both are taken over or none. A run that goes on takes them from its own
    checkpoint, and does without the weights that it once started from.
    """
    if not init_from:
        return dict(given)
    source = open_pretrained(resumed or init_from)
    sized = any(name in given for name in POSITIONS)
    if not sized and not source.knows_its_positions:
        raise ConfigError(
            f"{init_from} does not say for which size its spatial positions are: set model.sample_size to the latent "
            "size that it was trained at (PixArt-alpha: 32 for 256 px, 64 for 512 px, 128 with "
            "model.position_scale=2 for 1024 px)"
        )
    taken = {name: getattr(source.config, name) for name in source.takes_over if not (sized and name in POSITIONS)}
    return taken | dict(given)


def objective_settings(given: ObjectiveConfig, init_from: str | None, resumed: Path | None) -> ObjectiveConfig:
    """The ``objective`` section with a prediction: what is set, or that of the run so far, or of ``init_from``.

    Fresh weights take rectified flow. Raises ConfigError where the section has settings of another kind.
    """
    source = resumed or init_from
    prediction = given.prediction or (open_pretrained(source).prediction if source else "velocity")
    try:
        return replace(given, prediction=prediction)
    except ValueError as error:
        raise ConfigError(f"objective.{error}, or set objective.prediction") from None


def start_from(path: str, model: Transformer, vae: Mapping[str, Any], text_encoder: Mapping[str, Any]) -> LoadReport:
    """Start from the weights at ``path``. Raises ConfigError if they were trained on other latents or text."""
    report = load_into(model, path)
    if report.info:
        for what, found, here in (
            ("VAE", report.info.vae, vae),
            ("text encoder", report.info.text_encoder, text_encoder),
        ):
            if found != here:
                differing = [
                    f"{name} {found.get(name)!r}, here {here[name]!r}" for name in here if found.get(name) != here[name]
                ]
                raise ConfigError(f"{path} was trained with another {what} than these shards: {'; '.join(differing)}")
    return report
