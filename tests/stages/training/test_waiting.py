"""Nothing in a step before DeepSpeed's own look at the gradient's norm waits for the device."""

import pytest
import torch

from models.latents import LatentStats
from models.transformer import Transformer, TransformerConfig
from stages.engine import Engine, largest_over_ranks, start_ranks
from stages.training.given_frames import ConditioningConfig
from stages.training.loss import LatentLoss
from stages.training.optimizer import OptimizerConfig
from tests.stages.training.test_loss import NULL, OBJECTIVES, TOKENS, make_batch

OPTIONS = {"pooled_text": True, "qk_norm": True, "size_conditioning": True, "fps_conditioning": True}
SIZES = {"num_layers": 2, "num_heads": 2, "head_dim": 6, "text_dim": 6, "in_channels": 2}


def loss_on(name: str, device: torch.device, first: float) -> LatentLoss:
    return LatentLoss(
        OBJECTIVES[name], LatentStats(0.5, 0.1), NULL, frame_interval_s=1 / 8, caption_dropout=0.5, seed=3,
        device=device, conditioning=ConditioningConfig(first=first),
    )  # fmt: skip


def model_of(name: str) -> Transformer:
    return Transformer(TransformerConfig(**SIZES, **OPTIONS, out_channels=OBJECTIVES[name].out_channels(2)))


@pytest.mark.parametrize("first", [0.0, 0.5])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_forward_and_backward_need_no_value_from_the_device(name: str, first: float) -> None:
    """Tensors of the meta device have no values: what asks for one, or for a copy on the host, fails."""
    model = model_of(name).to("meta")
    loss = loss_on(name, torch.device("meta"), first).training(model, make_batch(), TOKENS)
    loss.backward()
    assert all(parameter.grad.is_meta for parameter in model.parameters())
    with pytest.raises(RuntimeError):
        float(loss)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # PyTorch's own, of what the test asks for
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OBJECTIVES)
def test_no_copy_waits_for_the_gpu(name: str) -> None:
    ranks = start_ranks()
    optimizer, settings = OptimizerConfig(), {"zero_optimization": {"stage": 1}}
    engine = Engine(model_of(name), optimizer, precision="bf16", accumulation=1, deepspeed_settings=settings)
    loss_of = loss_on(name, ranks.device, 0.5)
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step allocates
        try:
            largest_over_ranks([0])
            engine.backward(loss_of.training(engine.module, make_batch(), TOKENS))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        engine.step(1.0, 1.0)
