"""stub"""

import torch
from torch import Tensor, nn


def saved_bytes(network: nn.Module, *arguments: Tensor) -> tuple[int, Tensor]:
    """What autograd holds after a forward pass, parameters apart and each storage once, and the output."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        output = network(*arguments)
    return sum(storage.nbytes() for storage in storages.values()), output if isinstance(output, Tensor) else output[0]
