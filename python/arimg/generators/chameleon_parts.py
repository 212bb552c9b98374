"""What makes a LlamaGen a Chameleon (arXiv 2405.09818): a layer norm of queries and keys, and the names of
its weights in the package transformers.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg.generators.llamagen import Attend, Decoder, Layer, LlamaGen
from arimg.nn import checkpoint

NAMES: dict[str, checkpoint.Theirs] = {  # ours -> Chameleon's in the package transformers
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    **{
        f"layers.{{}}.{ours}.weight": f"model.layers.{{}}.{theirs}.weight"
        for ours, theirs in (
            ("attention_norm", "input_layernorm"),
            ("attention.wo", "self_attn.o_proj"),
            ("attention.q_norm", "self_attn.q_norm"),
            ("attention.k_norm", "self_attn.k_norm"),
            ("ffn_norm", "post_attention_layernorm"),
            ("feed_forward.w1", "mlp.gate_proj"),
            ("feed_forward.w3", "mlp.up_proj"),
            ("feed_forward.w2", "mlp.down_proj"),
        )
    },
    "layers.{}.attention.q_norm.bias": "model.layers.{}.self_attn.q_norm.bias",
    "layers.{}.attention.k_norm.bias": "model.layers.{}.self_attn.k_norm.bias",
    "layers.{}.attention.wqkv.weight": (
        "model.layers.{}.self_attn.q_proj.weight",
        "model.layers.{}.self_attn.k_proj.weight",
        "model.layers.{}.self_attn.v_proj.weight",
    ),
}


class HeadNorm(nn.Module):
    """Weights of a layer norm over the channels of each head, one set a head."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))


class NormedHeads(Decoder):
    """Queries and keys of each head are normalised before the attention."""

    def __init__(self, model: LlamaGen) -> None:
        super().__init__(model)
        self.norms = [self._norm(layer) for layer in cast("list[Layer]", list(model.layers))]

    @staticmethod
    def _norm(layer: Layer) -> tuple[Tensor, Tensor]:
        """Weights and biases of all heads of queries and keys, [Hq + Hkv, D] each."""
        q, k = (cast(HeadNorm, norm) for norm in (layer.attention.q_norm, layer.attention.k_norm))
        return torch.cat((q.weight, k.weight)), torch.cat((q.bias, k.bias))

    def run(self, x: Tensor, attend: Attend, dropout: float = 0.0) -> Tensor:
        def normed(i: int, qkv: Tensor) -> Tensor:
            weight, bias = self.norms[i]
            qk, v = qkv.split((len(weight), qkv.shape[2] - len(weight)), 2)
            qk = torch.addcmul(bias, F.layer_norm(qk.float(), qk.shape[-1:]), weight)
            return attend(i, torch.cat((qk.to(v.dtype), v), 2))

        return super().run(x, normed, dropout)
