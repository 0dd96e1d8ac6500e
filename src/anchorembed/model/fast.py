"""What makes a loaded model fast on a GPU: the varlen attention kernel, and layers compiled one by one."""

import logging

import torch

from anchorembed.errors import InputError, first_line
from anchorembed.model.attention import LARGEST_HEAD
from anchorembed.model.backbone import Backbone
from anchorembed.model.verify import probe_batch
from anchorembed.system.device import autocast

_log = logging.getLogger(__name__)
_GRAPHS = 64  # that one kind of layer may have: models, adapters, modes and devices of one process
_BY_KERNEL = 0.03  # by which the varlen kernel's states may differ from bucketed attention's in bfloat16, relative


@torch.no_grad()
def use_varlen(backbone: Backbone, dtype: torch.dtype) -> None:
    """Let attention run by the varlen kernel, if it can and gives what bucketed attention gives.

    It needs a GPU of compute capability 8.0, bfloat16, heads of at most 256, and neither soft-caps nor
    dropout; a model that asks for more stays with bucketed attention, which is said once.
    """
    if backbone.device.type != "cuda" or dtype == torch.float32:
        return
    if reason := _not_by_varlen(backbone):
        _log.warning("%s: attention by buckets, slower: %s.", backbone.name, reason)
        return
    batch = probe_batch(backbone)
    with autocast(backbone.device, dtype):
        bucketed = backbone.states(backbone.embed(batch.tokens), batch).float()
        backbone.varlen = True
        try:
            difference = float(
                (backbone.states(backbone.embed(batch.tokens), batch) - bucketed).norm() / bucketed.norm()
            )
            reason = "" if difference <= _BY_KERNEL else f"the varlen kernel's states differ by {difference:.3f}"
        except (RuntimeError, InputError) as error:
            reason = f"the varlen kernel fails: {first_line(error)}"
    if reason:
        backbone.varlen = False
        _log.warning("%s: attention by buckets, slower: %s.", backbone.name, reason)


def _not_by_varlen(backbone: Backbone) -> str:
    """Why a model on a GPU cannot use the varlen kernel; empty if it can."""
    config = backbone.model.config
    if torch.cuda.get_device_capability(backbone.device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention has a soft-cap"
    if getattr(config, "attention_dropout", 0.0):
        return "its attention has dropout"
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return f"its heads of {head} are above {LARGEST_HEAD}" if head > LARGEST_HEAD else ""


def compile_layers(backbone: Backbone, dtype: torch.dtype, backend: str = "inductor") -> bool:
    """Compile the decoder's layers one by one; layers of a kind share their graphs, whatever the lengths.

    A small forward and backward pass shows that it works. If it does not, the layers run as they are, which is said.

    Returns:
        Whether the layers are compiled.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    config.specialize_float = True  # scales and dropout are constants; as symbols each graph is traced twice
    for layer in backbone.layers:
        layer.compile(fullgraph=True, dynamic=True, backend=backend)
    batch = probe_batch(backbone)
    try:
        with autocast(backbone.device, dtype):
            states = backbone.states(backbone.embed(batch.tokens), batch)
        trained = [weight for weight in backbone.parameters() if weight.requires_grad]
        if trained:
            torch.autograd.grad(states.float().sum(), trained, allow_unused=True)
    except Exception as error:  # the compiler raises many kinds; each means that it does not work here
        for layer in backbone.layers:
            layer._compiled_call_impl = None
        _log.warning("%s: layers are not compiled, slower: %s", backbone.name, first_line(error))
        return False
    return True
