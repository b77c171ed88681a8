"""The frozen text encoder against transformers' own T5, and its promise that a caption's embedding is its own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from transformers import AutoTokenizer, T5Config, T5EncoderModel

from models.errors import WeightsError
from models.identity import clean_caption
from models.source import TINY_FOLDER
from models.text import TextEncoder
from models.text_lengths import LENGTHS

CAPTIONS = [
    "a red ball moves left",
    "",
    "woman using a computer mouse and keyboard",
    "a blue square moves up",
    "the quick brown fox jumps over the lazy dog, twice; then it sleeps",
    " ".join(["many words"] * 40),
    "a yellow triangle moves down",
    "1 + 1 = 2",
]


@pytest.fixture(scope="module")
def tiny() -> TextEncoder:
    return TextEncoder.load("tiny", batch_tokens=256)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers-style folder whose T5 shares no number with the tiny one."""
    folder = tmp_path_factory.mktemp("other")
    torch.manual_seed(1)
    config = T5Config(vocab_size=256, d_model=24, d_kv=8, d_ff=32, num_layers=1, num_heads=3, dropout_rate=0.0)
    T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    shutil.copytree(TINY_FOLDER / "tokenizer", folder / "tokenizer")
    return folder


def test_cleaning_strips_collapses_and_lowers():
    assert clean_caption("  A Red\n ball\t moves LEFT ") == "a red ball moves left"
    assert clean_caption(" \n") == ""


def test_identity_names_everything_that_decides_an_embedding(tiny: TextEncoder, other_model: Path):
    other = TextEncoder.load(str(other_model), max_tokens=50).identity
    assert (other["class"], other["dim"], other["max_tokens"]) == ("T5EncoderModel", 24, 50)
    assert other["tokenizer_hash"] == tiny.identity["tokenizer_hash"]
    assert other["weights_hash"] != tiny.identity["weights_hash"]
    assert set(tiny.identity) == {"weights_hash", "tokenizer_hash", "class", "dim", "max_tokens", "cleaning"}
    assert json.loads(json.dumps(tiny.identity)) == tiny.identity


@pytest.mark.parametrize("name", ["tiny", "other"])
def test_embeddings_are_those_of_transformers_alone_and_unpadded(name: str, other_model: Path):
    folder = TINY_FOLDER if name == "tiny" else other_model
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    reference = T5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    for caption, embedding in zip(CAPTIONS, TextEncoder.load(str(folder)).encode(CAPTIONS), strict=True):
        ids = tokenizer(clean_caption(caption), truncation=True, max_length=120, return_tensors="pt").input_ids
        assert ids[0, -1] == tokenizer.eos_token_id
        with torch.no_grad():
            wanted = reference(input_ids=ids).last_hidden_state[0]
        assert embedding.dtype == np.float16 and embedding.shape == wanted.shape
        np.testing.assert_allclose(embedding, wanted, atol=4e-3)


@pytest.mark.parametrize("name", ["tiny", "other"])
def test_embeddings_are_bitwise_independent_of_neighbours(name: str, other_model: Path):
    encoder = TextEncoder.load("tiny" if name == "tiny" else str(other_model), batch_tokens=128)
    together = encoder.encode(CAPTIONS)
    order = np.random.default_rng(0).permutation(len(CAPTIONS))
    shuffled = encoder.encode([CAPTIONS[i] for i in order])
    for i, caption in enumerate(CAPTIONS):
        np.testing.assert_array_equal(encoder.encode([caption])[0], together[i])
        np.testing.assert_array_equal(shuffled[list(order).index(i)], together[i])


def test_only_the_fixed_shapes_run(tiny: TextEncoder, monkeypatch: pytest.MonkeyPatch):
    shapes, real = [], T5EncoderModel.forward

    def spying(model: T5EncoderModel, input_ids: torch.Tensor, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return real(model, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(T5EncoderModel, "forward", spying)
    lengths = [len(embedding) for embedding in tiny.encode([*CAPTIONS * 3, "a " * 15, "a " * 31])]
    assert lengths[-2:] == [16, 32]  # they fill two of LENGTHS to the last token
    assert set(shapes) <= {(256 // length, length) for length in LENGTHS}
    fitting = [min(length for length in LENGTHS if length >= tokens) for tokens in lengths]
    assert len(set(fitting)) >= 3
    assert len(shapes) == sum(-(-fitting.count(length) // (256 // length)) for length in set(fitting))


def test_the_empty_caption_is_the_null_text_of_one_token(tiny: TextEncoder):
    assert tiny.encode([]) == []
    null, blank = tiny.encode(["", "  \n"])
    assert null.shape == (1, tiny.identity["dim"])
    np.testing.assert_array_equal(null, blank)


def test_long_captions_are_cut_and_still_end_their_text():
    encoder = TextEncoder.load("tiny", max_tokens=20)
    (cut,) = encoder.encode(["a very long caption " * 30])
    assert cut.shape[0] == 20
    with pytest.raises(ValueError, match="max_tokens is 129"):
        TextEncoder.load("tiny", max_tokens=129)
    with pytest.raises(ValueError, match="batch_tokens is 127"):
        TextEncoder.load("tiny", batch_tokens=127)


def test_any_english_tokenises_and_an_unknown_letter_does_no_harm(tiny: TextEncoder):
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER / "tokenizer")
    text = 'zebras & qwerty-keyboards, 50% of $3.99 (it\'s "new")!? #1 @home [x] {y} <z> a/b\\c ^ ~ ` | ; : _ = + *'
    ids = tokenizer(clean_caption(text))["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == clean_caption(text)
    (embedding,) = tiny.encode(["un café 北京"])
    assert np.isfinite(embedding).all()


def test_outputs_of_the_tiny_encoder_have_about_unit_scale(tiny: TextEncoder):
    scale = np.concatenate(tiny.encode(CAPTIONS)).astype(np.float64).std()
    assert 0.8 < scale < 1.25


def test_overflow_stays_visible(other_model: Path, tmp_path: Path):
    shutil.copytree(other_model, tmp_path / "hot")
    model = T5EncoderModel.from_pretrained(other_model / "text_encoder")
    with torch.no_grad():
        model.encoder.final_layer_norm.weight.fill_(1e6)
    model.save_pretrained(tmp_path / "hot" / "text_encoder")
    (embedding,) = TextEncoder.load(str(tmp_path / "hot")).encode(["a red ball moves left"])
    assert not np.isfinite(embedding).all()


def test_damaged_or_foreign_folders_are_refused(other_model: Path, tmp_path: Path):
    broken = tmp_path / "broken"
    shutil.copytree(other_model, broken)
    weights = broken / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="could not be loaded as a T5EncoderModel"):
        TextEncoder.load(str(broken))
    config = json.loads((other_model / "text_encoder" / "config.json").read_text())
    shutil.copy(other_model / "text_encoder" / "model.safetensors", weights)
    (broken / "text_encoder" / "config.json").write_text(json.dumps({**config, "num_layers": 2}))
    with pytest.raises(WeightsError, match="missing"):
        TextEncoder.load(str(broken))
    (broken / "text_encoder" / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    with pytest.raises(WeightsError):
        TextEncoder.load(str(broken))


def test_the_real_t5_tokenizer_gives_sentencepieces_own_ids(assets: Path, tmp_path: Path):
    """With the ids that T5's authors publish for one sentence, and sentencepiece itself for the others."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(assets / "tokenizers" / "t5_spiece.model", folder / "spiece.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    torch.manual_seed(0)
    config = T5Config(vocab_size=32128, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path / "text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    published = [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1]
    assert tokenizer("translate English to German: The house is wonderful.")["input_ids"] == published
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    wanted = [[*reference.encode(clean_caption(caption)), 1] for caption in CAPTIONS]
    assert [tokenizer(clean_caption(caption))["input_ids"] for caption in CAPTIONS] == wanted
    embeddings = TextEncoder.load(str(tmp_path)).encode(CAPTIONS)
    assert [embedding.shape for embedding in embeddings] == [(min(len(ids), 120), 8) for ids in wanted]
