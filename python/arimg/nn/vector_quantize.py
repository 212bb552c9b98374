"""Vector quantization with a learned codebook, under the names and conventions of vector-quantize-pytorch.

Arguments, outputs and state-dict keys are those of that package (1.32), so its weights load; differences are
listed in docs/ops/quantize.md. Arguments that are not offered are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.ops._common import StraightThrough

_EPS = 1e-6  # of normalisations

# Arguments of the package that are taken with their default alone.
_DEFAULTS: dict[str, Any] = dict(
    commitment_use_cross_entropy_loss=False,
    orthogonal_reg_weight=0.0,
    orthogonal_reg_active_codes_only=False,
    orthogonal_reg_max_codes=None,
    codebook_diversity_loss_weight=0.0,
    codebook_diversity_temperature=100.0,
    stochastic_sample_codes=False,
    sample_codebook_temp=1.0,
    straight_through=False,
    directional_reparam=False,
    directional_reparam_variance=5e-3,
    sync_codebook=None,
    sync_affine_param=False,
    vq_bridge=None,
    in_place_codebook_optimizer=None,
    manual_in_place_optimizer_update=False,
    affine_param=False,
    affine_param_batch_decay=0.99,
    affine_param_codebook_decay=0.9,
    sync_update_v=0.0,
    route_gradients_to_input=True,
)


class LossBreakdown(NamedTuple):
    """The parts of the loss; the last three are always 0 here."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


def refuse(what: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise for arguments that are unknown, or known but not offered with that value."""
    for name, value in given.items():
        if name not in defaults:
            raise TypeError(f"{what} has no argument {name!r}")
        if value != defaults[name] and (value or defaults[name]):
            raise ValueError(f"{what} does not offer {name}: expected {defaults[name]!r}, got {value!r}")


def _processes() -> int:
    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


class Codebook(nn.Module):
    """Codes [heads, K, D] that follow the mean of their rows (exponential moving average), or are trained."""

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        heads: int = 1,
        *,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 2,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        learnable: bool = False,
        cosine: bool = False,
    ) -> None:
        super().__init__()
        self.codebook_size, self.cosine, self.learnable = codebook_size, cosine, learnable
        self.kmeans_iters, self.decay, self.eps = kmeans_iters, decay, eps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        embed = torch.zeros(heads, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            embed = self.normalised(embed)
        self._ready = not kmeans_init  # spares a look at `initted`, which a GPU would have to wait for
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(heads, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)

    def normalised(self, x: Tensor) -> Tensor:
        """Rows of length 1 where the nearest code is the one at the smallest angle, else x."""
        return F.normalize(x, dim=-1, eps=_EPS) if self.cosine else x

    def forward(self, x: Tensor, mask: Tensor | None, update: bool) -> tuple[Tensor, Tensor]:
        """Rows x [heads, M, D] -> (codes of x's dtype, int64 [heads, M]); `update` learns from the rows.

        mask [heads, M] tells which rows are learnt from.
        """
        if not self._ready:
            self._start(x.detach(), mask)
        # Rows and codes have length 1 if `cosine`: the largest product is the smallest angle.
        metric = "dot" if self.cosine else "l2"
        codes, indices = [], []
        for rows, embed in zip(x, self.embed):
            index = ops.nearest_code(rows, embed, metric)
            codes.append(ops.lookup(index, embed).to(x.dtype))
            indices.append(index)
        index = torch.stack(indices)
        found = torch.stack(codes)
        if update:
            self.update(x.detach(), index, mask)
        return found, index

    @torch.no_grad()
    def update(self, x: Tensor, index: Tensor, mask: Tensor | None) -> None:
        """Move counts and sums by 1 - decay towards those of these rows, then the codes."""
        if not self.ema_update and self.threshold_ema_dead_code <= 0:
            return
        if _processes() > 1:
            raise RuntimeError("expected one process: codebooks are not synchronised between several")
        if mask is not None:
            index = index.masked_fill(~mask, -1)
        for head in range(len(x)):
            counts, sums = ops.code_statistics(x[head], index[head], self.codebook_size)
            self.cluster_size[head].lerp_(counts.to(self.cluster_size), 1 - self.decay)
            self.embed_avg[head].lerp_(sums.to(self.embed_avg), 1 - self.decay)
        if self.ema_update and not self.manual_ema_update:
            self.update_ema()
        self.replace_dead(x, mask)

    @torch.no_grad()
    def update_ema(self) -> None:
        """Codes are the means of their rows; counts are smoothed so that none divides by zero."""
        total = self.cluster_size.sum(-1, keepdim=True)
        smooth = (self.cluster_size + self.eps) / (total + self.codebook_size * self.eps) * total
        self.embed.copy_(self.normalised(self.embed_avg / smooth[..., None]))

    @torch.no_grad()
    def replace_dead(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Codes of fewer than `threshold_ema_dead_code` rows become rows of x, drawn without repetition."""
        if self.threshold_ema_dead_code <= 0:
            return
        dead = self.cluster_size < self.threshold_ema_dead_code
        if not dead.any():
            return
        for head, all_rows in enumerate(self.normalised(x)):
            rows = all_rows if mask is None else all_rows[mask[head]]
            codes = dead[head].nonzero()[:, 0]
            if len(rows) == 0 or len(codes) == 0:
                continue
            if len(codes) > len(rows):  # the others wait for a later step
                codes = codes[torch.randperm(len(codes), device=x.device)[: len(rows)]]
                codes = codes.sort().values
            drawn = rows[torch.randperm(len(rows), device=x.device)[: len(codes)]].to(self.embed_avg)
            self.embed.data[head, codes] = drawn
            self.cluster_size[head, codes] = float(self.threshold_ema_dead_code)
            self.embed_avg[head, codes] = drawn * self.threshold_ema_dead_code

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *others: Any) -> None:
        super()._load_from_state_dict(state, prefix, *others)
        self._ready = bool(self.initted)

    @torch.no_grad()
    def _start(self, x: Tensor, mask: Tensor | None) -> None:
        if not self.initted:
            for head, all_rows in enumerate(x):
                rows = all_rows if mask is None else all_rows[mask[head]]
                n, k = len(rows), self.codebook_size
                draw = (
                    torch.randperm(n, device=x.device)[:k]
                    if n >= k
                    else torch.randint(0, n, (k,), device=x.device)
                )
                metric = "cosine" if self.cosine else "l2"
                found = ops.kmeans(rows, k, self.kmeans_iters, metric=metric, init=rows[draw], empty="keep")
                self.cluster_size[head] = found.counts.to(self.cluster_size)
                self.embed_avg[head] = found.centres * self.cluster_size[head, :, None]
            self.update_ema()
            self.initted.fill_(True)
        self._ready = True


class VectorQuantize(nn.Module):
    """Nearest codes with a commitment loss: x [B, N, dim] -> (quantized [B, N, dim], indices [B, N], loss).

    Also x [B, dim]; [B, dim, N] with channel_last=False; [B, dim, H, W] with accept_image_fmap and
    [B, dim, T, H, W] with accept_3d_fmap (indices then [B, H, W] and [B, T, H, W]).
    With several heads indices end in [heads].

    Codes follow the mean of their rows with `decay` (in training, unless freeze_codebook); learnable_codebook
    (with ema_update=False) trains them by the loss instead. The gradient reaches x by the rotation trick
    (Fifty et al. 2024, arXiv 2410.06424), or unchanged with rotation_trick=False.
    """

    zero: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        rotation_trick: bool | None = None,
        ema_update: bool | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        return_zeros_for_masked_padding: bool = True,
        **others: Any,
    ) -> None:
        super().__init__()
        others.pop("sync_kmeans", None)  # it speaks of several processes
        refuse("VectorQuantize", others, _DEFAULTS)
        ema_update = True if ema_update is None else ema_update
        learnable = bool(learnable_codebook)
        if learnable and ema_update:
            raise ValueError("expected ema_update=False with learnable_codebook=True")
        if learnable and use_cosine_sim:
            raise ValueError("expected use_cosine_sim=False with learnable_codebook=True")
        codebook_dim = dim if codebook_dim is None else codebook_dim
        inner = codebook_dim * heads
        self.dim, self.heads, self.codebook_size = dim, heads, codebook_size
        self.separate_codebook_per_head = separate_codebook_per_head
        self.channel_first = not channel_last or accept_image_fmap or accept_3d_fmap
        self.commitment_weight, self.freeze_codebook = commitment_weight, freeze_codebook
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.use_cosine_sim, self.learnable_codebook = use_cosine_sim, learnable
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.has_projections = inner != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            self.project_in = nn.Linear(dim, inner)
            if layernorm_after_project_in:
                self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner))
            self.project_out = nn.Linear(inner, dim)
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            heads if separate_codebook_per_head else 1,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            ema_update=ema_update,
            manual_ema_update=manual_ema_update,
            learnable=learnable,
            cosine=use_cosine_sim,
        )
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    @property
    def codebook(self) -> Tensor:
        """[K, D], or [heads, K, D] with separate codebooks."""
        return self._codebook.embed if self.separate_codebook_per_head else self._codebook.embed[0]

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes before the projection out, [..., heads * D]; channels first where the input's are."""
        if self.separate_codebook_per_head:
            codebook = self.codebook
            parts = [book[indices[..., head]] for head, book in enumerate(codebook)]
            codes = torch.cat(parts, -1)
        else:
            codes = self.codebook[indices]
            if self.heads > 1:
                codes = codes.flatten(-2)
        return codes.movedim(-1, 1) if self.channel_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What `forward` gives for these indices."""
        codes = self.get_codes_from_indices(indices)
        if not self.channel_first:
            return self.project_out(codes)
        return self.project_out(codes.movedim(1, -1)).movedim(-1, 1)

    def forward(
        self,
        x: Tensor,
        indices: None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
    ) -> tuple[Any, ...]:
        """mask [B, N] (or lens [B]): other tokens are not learnt from and give zeros and the index -1."""
        if indices is not None:
            raise ValueError("VectorQuantize does not offer a cross entropy with given indices")
        given = x
        if x.dim() == 2:
            x = x[:, None]
        first = self.channel_first and given.dim() > 2
        if first:
            x = x.flatten(2).transpose(1, 2)
        if x.dim() != 3 or x.shape[-1] != self.dim:
            wanted = f"[B, {self.dim}, ...]" if self.channel_first else f"[B, N, {self.dim}]"
            raise ValueError(f"expected x {wanted}, got {list(given.shape)}")
        if lens is not None:
            mask = torch.arange(x.shape[1], device=x.device) < lens[:, None]
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook

        rows = self._codebook.normalised(self._split_heads(self.project_in(x)))
        row_mask = None if mask is None else self._split_mask(mask)
        learns = self.training and not frozen
        codes, index = self._codebook(rows, row_mask, learns)
        commitment = self.zero
        if self.training:
            target = codes if self.learnable_codebook and not frozen else codes.detach()
            error = (target - rows).square()
            commitment = error.mean() if row_mask is None else error[row_mask].mean()
            if given.requires_grad:
                path = _Rotation if self.rotation_trick else StraightThrough
                codes = path.apply(rows, codes)
        loss = commitment * self.commitment_weight if self.commitment_weight > 0 else self.zero

        quantized = self.project_out(self._merge_heads(codes, x.shape[:2]))
        index = self._merge_indices(index, x.shape[:2])
        if mask is not None:
            other = torch.zeros_like(x) if self.return_zeros_for_masked_padding else x
            quantized = torch.where(mask[..., None], quantized, other)
            index = torch.where(mask if self.heads == 1 else mask[..., None], index, -1)
        tail = index.shape[2:]
        if first:
            quantized = quantized.transpose(1, 2).reshape(given.shape)
            index = index.reshape(len(x), *given.shape[2:], *tail)
        elif given.dim() == 2:
            quantized, index = quantized[:, 0], index[:, 0]
        if return_loss_breakdown:
            return quantized, index, loss, LossBreakdown(commitment, self.zero, self.zero, self.zero)
        return quantized, index, loss

    # [B, N, heads * D] <-> [codebooks, rows, D]: codebooks is `heads` if they are separate, else 1.

    def _split_heads(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        x = x.reshape(B, N, self.heads, -1)
        if self.separate_codebook_per_head:
            return x.movedim(2, 0).reshape(self.heads, B * N, -1)
        return x.transpose(1, 2).reshape(1, B * self.heads * N, -1)

    def _split_mask(self, mask: Tensor) -> Tensor:
        if self.separate_codebook_per_head:
            return mask.reshape(1, -1).expand(self.heads, -1)
        return mask[:, None].expand(-1, self.heads, -1).reshape(1, -1)

    def _merge_heads(self, codes: Tensor, shape: torch.Size) -> Tensor:
        B, N = shape
        if self.separate_codebook_per_head:
            return codes.view(self.heads, B, N, -1).movedim(0, 2).flatten(2)
        return codes.view(B, self.heads, N, -1).transpose(1, 2).flatten(2)

    def _merge_indices(self, index: Tensor, shape: torch.Size) -> Tensor:
        B, N = shape
        if self.heads == 1:
            return index.view(B, N)
        if self.separate_codebook_per_head:
            return index.view(self.heads, B, N).movedim(0, 2)
        return index.view(B, self.heads, N).transpose(1, 2)


class _Rotation(torch.autograd.Function):
    """The codes q; the gradient goes to x as if q were x rotated and stretched by constants.

    With u and v the directions of x and q, w that of u + v: q = (|q| / |x|) (1 - 2 w w' + 2 v u') x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(x, codes)
        return codes.view_as(codes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, q = (t.detach().float() for t in ctx.saved_tensors)
        g = grad.float()
        length_x, length_q = (t.norm(dim=-1, keepdim=True) for t in (x, q))
        u, v = x / length_x.clamp(min=_EPS), q / length_q.clamp(min=_EPS)
        w = F.normalize(u + v, dim=-1, eps=_EPS)
        turned = g - 2 * w * (w * g).sum(-1, keepdim=True) + 2 * u * (v * g).sum(-1, keepdim=True)
        return (turned * (length_q / length_x.clamp(min=_EPS))).to(grad.dtype), None
