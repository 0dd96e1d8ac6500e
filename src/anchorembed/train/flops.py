"""Model FLOPs: products with weights that the method needs, in a forward pass and, for gradients, a backward pass.

Attention's own products, and recomputation to save memory, are left out. ``Stage.flops`` counts a step of a stage.
"""

from torch import nn

from anchorembed.model.adapters import expert_weights
from anchorembed.model.backbone import Backbone

TRAINED = 6  # FLOPs per token and weight: one product forward, two backward (gradients of input and weight)
FROZEN = 4  # without the weight's gradient
FORWARD = 2  # without a backward pass


def flops_a_weight(backbone: Backbone) -> int:
    """FLOPs per token and weight of the decoder's layers: `FROZEN` if adapters train, else `TRAINED`."""
    weights = (weight for name, weight in backbone.named_parameters() if "lora_" not in name)
    return TRAINED if any(weight.requires_grad for weight in weights) else FROZEN


def product_shapes(backbone: Backbone) -> list[tuple[int, int]]:
    """Shapes (out, in) of the linear weights of the decoder's layers, without adapters."""
    return [
        (module.out_features, module.in_features)  # 4-bit weights have another shape
        for name, module in backbone.model.base_model.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    ]


def weight_count(backbone: Backbone) -> int:
    """Number of linear weights in the decoder's layers, without adapters, input embedding and output head.

    Of a mixture of experts those count that a token uses.
    """
    used = getattr(backbone.model.config.get_text_config(), "num_experts_per_tok", 0)
    experts = sum(used * weight[0].numel() for _, weight in expert_weights(backbone.model))
    return experts + sum(out * into for out, into in product_shapes(backbone))
