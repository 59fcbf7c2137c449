"""Frozen layers sharded over the processes of a training by FSDP2."""

import copy

from semalign_align import Ranks
from semalign_attribution import DecoderView
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


class ShardedLayers:
    """The layers of a target, of which each process holds a share; a layer that trains is whole on every process.

    A sharded layer collects its weights for the moment in which it runs, so that all processes must run it together.
    Embeddings, final norm and head stay whole.
    """

    def __init__(self, view: DecoderView, ranks: Ranks) -> None:
        """Shard every layer; the target's own layers stand aside, without weights, until they are whole again."""
        self._layers = view.layers
        self._whole: list[nn.Module] = list(
            view.layers
        )  # the layers themselves, without weights while they are sharded
        self._mesh = init_device_mesh(view.device.type, (ranks.size,))
        for number in range(1, len(self._whole) + 1):
            self.shard(number)

    def shard(self, number: int) -> None:
        """Leave each process its share of a whole layer."""
        layer = self._whole[number - 1]
        twin = copy.deepcopy(layer)
        fully_shard(twin, mesh=self._mesh, reshard_after_forward=True)  # each is a root, which would stay whole
        self._layers[number - 1] = twin
        for parameter in layer.parameters():
            parameter.data = parameter.data.new_empty(0)

    def gather(self, number: int) -> None:
        """Make a sharded layer whole on every process."""
        twin, layer = self._layers[number - 1], self._whole[number - 1]
        for parameter, share in zip(layer.parameters(), twin.parameters(), strict=True):
            assert isinstance(share, DTensor)
            parameter.data = share.full_tensor()
        self._layers[number - 1] = layer

    def gather_all(self) -> None:
        """Make every layer whole again."""
        for number, layer in enumerate(self._whole, 1):
            if self._layers[number - 1] is not layer:
                self.gather(number)
