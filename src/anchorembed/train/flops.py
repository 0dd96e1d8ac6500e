"""Model FLOPs: those of the products with weights that the method asks for, a forward and, for gradients, a backward.

Attention's own products and whatever is computed twice to save memory are left out. What a step of a stage costs is
``Stage.flops``.
"""

from torch import nn

from anchorembed.model.backbone import Backbone

TRAINED = 6  # FLOPs a token and weight: a product forward, and two backward, for the input's and the weight's gradient
FROZEN = 4  # without the weight's gradient


def product_shapes(backbone: Backbone) -> list[tuple[int, int]]:
    """(out, in) of each weight of the decoder's layers that a token is multiplied with."""
    return [
        (module.out_features, module.in_features)  # 4-bit weights have another shape
        for name, module in backbone.model.base_model.named_modules()
        if isinstance(module, nn.Linear) and "lora_" not in name
    ]


def weight_count(backbone: Backbone) -> int:
    """Weights of the decoder's layers that each token is multiplied with; embedding and head are not among them."""
    return sum(out * into for out, into in product_shapes(backbone))


def encode_flops(backbone: Backbone, tokens: int) -> float:
    """Model FLOPs of embedding texts of so many tokens, template included."""
    return 2.0 * weight_count(backbone) * tokens
