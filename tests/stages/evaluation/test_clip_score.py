"""The CLIP score of tiny random weights, from disk, against transformers' own logits and a plain computation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

from stages.errors import ConfigError
from stages.evaluation.clip_score import ClipNetwork, measure_clip_score

CPU = torch.device("cpu")
PROMPTS = ["a red ball", "a blue square", "a red ball", "ball " * 200]
SOURCES = [str(number) for number in range(4)]
FRAMES = np.random.default_rng(0).integers(0, 256, (4, 12, 20, 24, 3), np.uint8)


def tiny_clip(folder: Path) -> Path:
    """Both towers with random weights, and a tokenizer of letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = size | {"vocab_size": len(words), "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53}
    vision = size | {"image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "weights")


@torch.no_grad()
def plain_cosines(weights: Path) -> np.ndarray:
    """[clips, prompts]: from the logits of CLIP itself, frame by frame."""
    model, processor = CLIPModel.from_pretrained(weights).eval(), CLIPProcessor.from_pretrained(weights)
    chosen = [0, 2, 3, 5, 6, 8, 9, 11]  # 8 of 12, evenly
    rows = []
    for clip in FRAMES:
        images = [Image.fromarray(frame) for frame in clip[chosen]]
        inputs = processor(text=PROMPTS, images=images, return_tensors="pt", padding=True, truncation=True)
        rows.append(model(**inputs).logits_per_image.mean(0) / model.logit_scale.exp())
    return torch.stack(rows).numpy()


def test_the_score_is_that_of_clips_own_logits(weights: Path) -> None:
    network, cosines = ClipNetwork(str(weights), CPU), plain_cosines(weights)
    directions = np.stack([network.of_frames(clip) for clip in FRAMES])
    found = measure_clip_score(network, (directions, PROMPTS), (directions[::-1], PROMPTS[::-1], SOURCES))
    own = 100 * np.diag(cosines)
    assert np.ptp(own) > 1e-3
    assert found.samples.value == pytest.approx(own.mean(), rel=1e-4)
    assert found.real.value == pytest.approx(own.mean(), rel=1e-4)
    others = [
        np.mean([100 * cosines[clip, prompt] for prompt in (0, 1, 3) if PROMPTS[prompt] != PROMPTS[clip]])
        for clip in range(4)
    ]
    assert found.other_prompts.value == pytest.approx(np.mean(others), rel=1e-4)
    assert found.samples_apart.value == pytest.approx((own - others).mean(), abs=1e-3)
    assert (found.samples.samples, found.samples.groups, found.real.groups) == (4, 3, 4)


def test_one_prompt_has_no_others(weights: Path) -> None:
    network = ClipNetwork(str(weights), CPU)
    directions = np.stack([network.of_frames(clip) for clip in FRAMES])
    found = measure_clip_score(network, (directions, ["a ball"] * 4), (directions, PROMPTS, SOURCES))
    assert found.other_prompts is None and found.samples_apart is None


def test_a_folder_without_clip_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="could not be opened as CLIP weights"):
        ClipNetwork(str(tmp_path), CPU)
