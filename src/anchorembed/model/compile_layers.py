"""Compile a decoder's layers one by one."""

import logging

import torch

from anchorembed.errors import first_line
from anchorembed.model.backbone import Backbone
from anchorembed.model.check_packed_loss import probe_batch
from anchorembed.system.device import autocast

_log = logging.getLogger(__name__)
_GRAPHS = 64  # at most, of each kind of layer: each model, adapter, mode and device in a process needs its own


def compile_layers(backbone: Backbone, dtype: torch.dtype, backend: str = "inductor") -> bool:
    """Compile the decoder's layers one by one; layers of a kind share their graphs, whatever the lengths.

    A small forward and backward pass shows whether that works here. If not, a warning says why and the layers run
    uncompiled.

    Returns:
        Whether the layers are compiled.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    config.specialize_float = True  # scales and dropout rates are constants; as symbols, graphs are traced twice
    for layer in backbone.layers:
        layer.compile(fullgraph=True, dynamic=True, backend=backend)
    batch = probe_batch(backbone)
    try:
        with autocast(backbone.device, dtype):
            states = backbone.states(backbone.embed(batch.tokens), batch)
        trained = [weight for weight in backbone.parameters() if weight.requires_grad]
        if trained:
            torch.autograd.grad(states.float().sum(), trained, allow_unused=True)
    except Exception as error:  # the compiler raises errors of many kinds
        for layer in backbone.layers:
            layer._compiled_call_impl = None
        _log.warning("%s: layers are not compiled, slower: %s", backbone.name, first_line(error))
        return False
    return True
