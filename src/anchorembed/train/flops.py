"""Model FLOPs: those of the products with weights that the method asks for, a forward and, for gradients, a backward.

Attention's own products and whatever is computed twice to save memory are left out.
"""

from collections.abc import Sequence

from torch import nn

from anchorembed.model.backbone import Backbone
from anchorembed.model.tokens import TokenPair
from anchorembed.train.contrast import Contrastive
from anchorembed.train.reconstruct import Reconstruction


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


def step_flops(
    backbone: Backbone, stage: Reconstruction | Contrastive, number: int, pairs: Sequence[TokenPair]
) -> float:
    """Model FLOPs of training step ``number``."""
    if isinstance(stage, Reconstruction):
        rows = [row for pair in stage.rows(number, pairs) for row in pair]
        encoded = sum(len(row.source) for row in rows)
        decoded = [row for row in rows if stage.decode or not row.source]
        written = sum(row.targets for row in decoded)
        sinks = sum(stage.sink and bool(row.source) for row in decoded)
        bags = sum(stage.bag_weight > 0 and bool(row.source) for row in rows)
        heads = backbone.head.weight.numel() * (written + bags)
        return 6.0 * (weight_count(backbone) * (encoded + sinks + written) + heads)
    encoded = sum(len(pair.query) + len(pair.document) for pair in pairs)
    encoded += sum(len(negative) for pair in pairs for negative in pair.negatives[: stage.hard_negatives])
    frozen = not any(weight.requires_grad for name, weight in backbone.named_parameters() if "lora_" not in name)
    return (4 if frozen else 6) * weight_count(backbone) * encoded


def encode_flops(backbone: Backbone, tokens: int) -> float:
    """Model FLOPs of embedding texts of so many tokens, template included."""
    return 2.0 * weight_count(backbone) * tokens
