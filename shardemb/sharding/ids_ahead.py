"""The ids of the next step are on their way between ranks while the current one trains.

TorchRec's TrainPipelineSparseDist does so for models that torch.fx can trace. Here any model will
do whose collections are given the batch's own `sparse`: whether they are is seen the step before.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn
from torchrec import KeyedJaggedTensor
from torchrec.distributed.types import Awaitable, ShardedModule


@dataclass
class _Exchange:
    features: KeyedJaggedTensor
    context: Any
    arriving: Awaitable[Any]  # the numbers of ids that each rank gets; then the ids


class IdsAhead:
    """Exchanges of ids of a sharded model, begun before its forward asks for them.

    `current` is the input of the forward that comes next. Every rank must do the same with this
    object in the same order, because ids are exchanged by collectives.
    """

    def __init__(self, model: nn.Module) -> None:
        self.current: KeyedJaggedTensor | None = None
        self._takes_current: dict[Any, bool] = {}  # by collection
        self._begun: dict[Any, _Exchange] = {}
        self._sent: dict[Any, _Exchange] = {}
        for module in model.modules():
            if isinstance(module, ShardedModule):
                self._takes_current[module] = False
                module.forward = partial(self._forward, module)

    def begin(self, following: KeyedJaggedTensor) -> None:
        """Exchange how many ids of `following` each rank gets; before the forward of `current`."""
        for module, takes_it in self._takes_current.items():
            if takes_it:
                context = module.create_context()
                arriving = module.input_dist(context, following)
                self._begun[module] = _Exchange(following, context, arriving)

    def send(self) -> None:
        """Exchange the ids that were begun with; after that forward."""
        for exchange in self._begun.values():
            exchange.arriving = exchange.arriving.wait()
        self._sent, self._begun = self._begun, {}

    def drop(self) -> None:
        """Wait for ids that nobody will look up."""
        while self._sent:
            self._sent.popitem()[1].arriving.wait()

    def _forward(self, module: Any, features: Any) -> Any:
        """That of ShardedModule, but for ids that are on their way."""
        self._takes_current[module] = features is self.current
        exchange = self._sent.get(module)
        if exchange is not None and exchange.features is features:
            del self._sent[module]
            return module.compute_and_output_dist(exchange.context, exchange.arriving.wait())
        context = module.create_context()
        received = module.input_dist(context, features).wait().wait()
        return module.compute_and_output_dist(context, received)
