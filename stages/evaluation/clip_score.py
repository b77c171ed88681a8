"""Prompt adherence by CLIP (Radford et al., arXiv:2103.00020): how near frames and prompt are in its space."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import CLIPModel, CLIPProcessor

from stages.errors import ConfigError
from stages.evaluation.intervals import Estimate, estimate_mean

FRAMES = 8
TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class ClipScore:
    """100 times the cosine between frames and prompt, a clip's mean over its frames: of samples with their prompts, of
    samples with the prompts of others, and of real clips with their captions. Only differences between the three say
    something. samples_apart: the first less the second, sample by sample; None where all prompts are alike."""

    weights: str
    samples: Estimate
    other_prompts: Estimate | None
    samples_apart: Estimate | None
    real: Estimate


class ClipNetwork:
    """CLIP's two towers from a folder or a hub id, as transformers has them."""

    def __init__(self, name: str, device: torch.device):
        try:
            self._model = CLIPModel.from_pretrained(name).eval().to(device)
            self._processor = CLIPProcessor.from_pretrained(name)
        except (OSError, ValueError) as error:
            found = str(error).splitlines()[0]
            raise ConfigError(f"clip={name} could not be opened as CLIP weights: {found}") from None
        self.name, self._device = name, device

    @torch.no_grad()
    def of_frames(self, frames: np.ndarray) -> np.ndarray:
        """The mean of the directions of evenly spaced frames: uint8 [T, H, W, 3] -> float32 [D].

        Its product with a text's direction is the mean cosine of the frames.
        """
        chosen = np.linspace(0, len(frames) - 1, min(FRAMES, len(frames))).round().astype(int)
        inputs = self._processor(images=list(frames[chosen]), return_tensors="pt").to(self._device)
        return _directions(self._model.visual_projection(self._model.vision_model(**inputs).pooler_output)).mean(0)

    @torch.no_grad()
    def of_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Directions, float32 [n, D]; what is beyond the tokens that CLIP reads is cut."""
        found = []
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            some = list(texts[start : start + TEXTS_AT_ONCE])
            inputs = self._processor(text=some, return_tensors="pt", padding=True, truncation=True).to(self._device)
            found.append(_directions(self._model.text_projection(self._model.text_model(**inputs).pooler_output)))
        return np.concatenate(found)


def measure_clip_score(
    network: ClipNetwork,
    samples: tuple[np.ndarray, Sequence[str]],
    real: tuple[np.ndarray, Sequence[str], Sequence[str]],
) -> ClipScore:
    """From the mean directions of frames [n, D] with their prompts; those of real clips with captions and sources."""
    frames, prompts = samples
    distinct = list(dict.fromkeys(prompts))
    number = {prompt: place for place, prompt in enumerate(distinct)}
    scores = 100 * frames @ network.of_texts(distinct).T  # [n, distinct prompts]
    own = scores[np.arange(len(prompts)), [number[prompt] for prompt in prompts]]
    captioned = 100 * (real[0] * network.of_texts(real[1])).sum(1)
    others = (scores.sum(1) - own) / (len(distinct) - 1) if len(distinct) > 1 else None
    return ClipScore(
        network.name,
        estimate_mean(own, prompts),
        None if others is None else estimate_mean(others, prompts),
        None if others is None else estimate_mean(own - others, prompts),
        estimate_mean(captioned, real[2]),
    )


def _directions(embeddings: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(embeddings.float(), dim=-1).cpu().numpy()
