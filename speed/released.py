"""The baseline of Stage I: a step as the released research code of Su et al. makes it, written anew in plain PyTorch.

Weights and AdamW's moments are pure bfloat16, and batches are padded on the left. The four passes (encode both sides,
write each from the other's vector) run one after another over the whole batch. All logits of both directions are in
memory at once, in float32. Layers are recomputed in the backward pass, unless ``--no-checkpointing`` is given.

It has the costs of such a step, and is no way to train: the anchor is before the padding and so not next to its text,
the template's tokens are targets, and updates smaller than bfloat16's resolution are lost.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from common import model_source, pair_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from anchorembed.data.pairs import TextPair
from anchorembed.model.load import quiet

D2Q_WEIGHT = 0.8
LEARNING_RATE = 4e-5
_IGNORED = -100


class Released:
    """A model and its optimizer; called with a batch of pairs, it makes one training step."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.tokenizer = pair_tokenizer(args.model, args.cut)
        self.cut: int = args.cut
        with quiet():
            self.model = AutoModelForCausalLM.from_pretrained(model_source(args.model), dtype=torch.bfloat16)
        self.model.train()
        if not args.no_checkpointing:
            self.model.activation_checkpointing_enable()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    def __call__(self, batch: Sequence[TextPair]) -> dict[str, Any]:
        """Make one step, all pairs at once."""
        queries = self._pad_left([pair.query for pair in batch])
        documents = self._pad_left([pair.positive for pair in batch])
        queries_BH, documents_BH = self._encode(*queries), self._encode(*documents)
        q2d = self._decode(queries_BH, *documents)
        d2q = self._decode(documents_BH, *queries)
        loss = D2Q_WEIGHT * d2q + (1 - D2Q_WEIGHT) * q2d
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss.item(), "loss_q2d": q2d.item(), "loss_d2q": d2q.item()}

    def _pad_left(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Templated ids and attention mask, both [B, L]."""
        sequences = self.tokenizer.templated(texts, self.cut)
        longest = max(map(len, sequences))
        end = self.tokenizer.end_id
        ids_BL = torch.tensor([[end] * (longest - len(sequence)) + sequence for sequence in sequences])
        mask_BL = torch.tensor([[0] * (longest - len(sequence)) + [1] * len(sequence) for sequence in sequences])
        return ids_BL, mask_BL

    def _encode(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """The last position's final state, [B, H]."""
        output = self.model.base_model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False)
        states_BH: Tensor = output.last_hidden_state[:, -1]
        return states_BH

    def _decode(self, anchors_BH: Tensor, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Mean loss of writing the padded texts from the vector put before them."""
        vectors_BLH = torch.cat([anchors_BH[:, None], self.model.get_input_embeddings()(ids_BL)], dim=1)
        mask = torch.cat([torch.ones_like(mask_BL[:, :1]), mask_BL], dim=1)
        logits_BLV = self.model(inputs_embeds=vectors_BLH, attention_mask=mask, use_cache=False).logits
        labels_BL = ids_BL.masked_fill(mask_BL == 0, _IGNORED)
        return F.cross_entropy(logits_BLV[:, :-1].float().flatten(0, 1), labels_BL.flatten(), ignore_index=_IGNORED)
