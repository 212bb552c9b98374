"""Quantizers without a learned codebook, under the names and conventions of vector-quantize-pytorch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.nn.vector_quantize import refuse

_FSQ_DEFAULTS: dict[str, Any] = dict(
    scale=None,
    allowed_dtypes=(torch.float32, torch.float64),
    force_quantization_f32=True,
    preserve_symmetry=False,
    noise_dropout=0.0,
    bound_hard_clamp=False,
    orthogonal_rotation=False,
)
_LFQ_DEFAULTS: dict[str, Any] = dict(
    frac_per_sample_entropy=1.0,
    cosine_sim_project_in=False,
    cosine_sim_project_in_scale=None,
    experimental_softplus_entropy_loss=False,
    entropy_loss_offset=5.0,
    force_quantization_f32=True,
    orthogonal_rotation=False,
)
_LARGEST_ENTROPY = 24  # bits: the entropy of a batch needs the mean probability of every code


class _Scalar(nn.Module):
    """Projections, several codebooks and layouts, which both kinds share."""

    def __init__(
        self,
        dim: int,
        codebook_dim: int,
        num_codebooks: int,
        keep_num_codebooks_dim: bool | None,
        projects: bool,
        bias: bool,
        channel_first: bool | None,
    ) -> None:
        super().__init__()
        keep = num_codebooks > 1 if keep_num_codebooks_dim is None else keep_num_codebooks_dim
        if num_codebooks > 1 and not keep:
            raise ValueError(f"expected keep_num_codebooks_dim=True with {num_codebooks} codebooks")
        inner = codebook_dim * num_codebooks
        self.dim, self.codebook_dim, self.num_codebooks = dim, codebook_dim, num_codebooks
        self.keep_num_codebooks_dim, self.has_projections = keep, projects
        self.channel_first = channel_first
        self.project_in: nn.Module = nn.Linear(dim, inner, bias=bias) if projects else nn.Identity()
        self.project_out: nn.Module = nn.Linear(inner, dim, bias=bias) if projects else nn.Identity()

    def _is_channel_first(self, image: bool) -> bool:
        return image if self.channel_first is None else self.channel_first

    def _enter(self, x: Tensor) -> Tensor:
        """x in its layout -> [B, ..., codebooks, codebook_dim]."""
        moved = x.movedim(1, -1) if self._is_channel_first(x.dim() >= 4) else x
        if x.dim() < 2 or moved.shape[-1] != self.dim:
            raise ValueError(f"expected {self.dim} channels, got x {list(x.shape)}")
        return self.project_in(moved).unflatten(-1, (self.num_codebooks, self.codebook_dim))

    def _leave(self, codes: Tensor, image: bool) -> Tensor:
        out = self.project_out(codes.flatten(-2))
        return out.movedim(-1, 1) if self._is_channel_first(image) else out

    def _indices_out(self, indices: Tensor) -> Tensor:
        return indices if self.keep_num_codebooks_dim else indices[..., 0]

    def _indices_in(self, indices: Tensor) -> tuple[Tensor, bool]:
        image = indices.dim() >= 3 + int(self.keep_num_codebooks_dim)
        return (indices if self.keep_num_codebooks_dim else indices[..., None]), image


class FSQ(_Scalar):
    """Finite scalar quantization: x [B, ..., dim] or [B, dim, H, W] -> (codes, projected; indices int64)."""

    def __init__(
        self,
        levels: Sequence[int],
        dim: int | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        channel_first: bool = False,
        projection_has_bias: bool = True,
        return_indices: bool = True,
        **others: Any,
    ) -> None:
        refuse("FSQ", others, _FSQ_DEFAULTS)
        if any(level == 2 for level in levels):
            raise ValueError(f"expected levels of 3 or more (2 has the codes -1 and 0), got {list(levels)}")
        inner = len(levels) * num_codebooks
        dim = inner if dim is None else dim
        super().__init__(
            dim,
            len(levels),
            num_codebooks,
            keep_num_codebooks_dim,
            dim != inner,
            projection_has_bias,
            channel_first or None,  # images have their channels first anyway
        )
        self.levels, self.return_indices = list(levels), return_indices
        self.codebook_size = prod(levels)

    @property
    def implicit_codebook(self) -> Tensor:
        """All codes, [codebook_size, number of levels]."""
        return ops.fsq_codes(torch.arange(self.codebook_size), self.levels)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """What `forward` gives for these indices."""
        indices, image = self._indices_in(indices)
        return self._leave(ops.fsq_codes(indices.long(), self.levels), image)

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """Codes [..., number of levels], before the projection out -> int64 [...]."""
        width = torch.tensor([level // 2 for level in self.levels], device=codes.device)
        place = torch.tensor([prod(self.levels[:c]) for c in range(len(self.levels))], device=codes.device)
        return ((codes * width).round().long() + width).mul(place).sum(-1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        codes, indices = ops.fsq(self._enter(z), self.levels)
        return self._leave(codes, z.dim() >= 4), self._indices_out(indices) if self.return_indices else None


class Return(NamedTuple):
    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LossBreakdown(NamedTuple):
    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


class LFQ(_Scalar):
    """Lookup-free quantization: a sign per dimension -> Return(quantized, indices, entropy_aux_loss).

    x [B, N, dim] or [B, dim, H, W]; indices are the packed bits, first bit highest; up to 64 bits.
    spherical: x is first normalised (BSQ). In training the loss is the entropy of each token's code
    probabilities minus diversity_gamma times that of their mean, plus the commitment loss.
    """

    mask: Tensor
    zero: Tensor

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: nn.Module | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        channel_first: bool | None = None,
        spherical: bool = False,
        **others: Any,
    ) -> None:
        refuse(type(self).__name__, others, _LFQ_DEFAULTS)
        if not isinstance(straight_through_activation, nn.Identity | None):
            raise ValueError("expected straight_through_activation Identity, got another")
        if codebook_size is None:
            if dim is None:
                raise ValueError("expected dim or codebook_size")
            codebook_size = 2**dim
        bits = codebook_size.bit_length() - 1
        if codebook_size != 2**bits or not 1 <= bits <= ops.quantize_codes.MAX_BITS:
            raise ValueError(f"expected a codebook size of 2^1 to 2^64, a power of 2, got {codebook_size}")
        if entropy_loss_weight != 0 and bits > _LARGEST_ENTROPY:
            raise ValueError(
                f"expected entropy_loss_weight=0 beyond {_LARGEST_ENTROPY} bits (a batch's entropy needs "
                f"the mean probability of each of 2^{bits} codes), got {entropy_loss_weight}"
            )
        dim = bits * num_codebooks if dim is None else dim
        projects = dim != bits * num_codebooks if has_projections is None else has_projections
        super().__init__(
            dim, bits, num_codebooks, keep_num_codebooks_dim, projects, projection_has_bias, channel_first
        )
        if soft_clamp_input_value is not None and soft_clamp_input_value < codebook_scale:
            raise ValueError(
                f"expected soft_clamp_input_value >= {codebook_scale}, got {soft_clamp_input_value}"
            )
        self.codebook_size, self.codebook_scale, self.spherical = codebook_size, codebook_scale, spherical
        self.entropy_loss_weight, self.diversity_gamma = entropy_loss_weight, diversity_gamma
        self.commitment_loss_weight = commitment_loss_weight
        self.soft_clamp_input_value = soft_clamp_input_value
        self.value = codebook_scale * bits**-0.5 if spherical else codebook_scale
        self.register_buffer("mask", torch.ones((), dtype=torch.int64) << torch.arange(bits - 1, -1, -1))
        self.register_buffer("zero", torch.tensor(0.0), persistent=False)

    @property
    def codebook(self) -> Tensor:
        """All codes, [codebook_size, bits]."""
        if self.codebook_dim > _LARGEST_ENTROPY:
            raise ValueError(f"expected at most {_LARGEST_ENTROPY} bits to list, got {self.codebook_dim}")
        every = torch.arange(self.codebook_size, device=self.mask.device)
        return ops.unpack_signs(every, self.codebook_dim, self.value)

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """What `forward` gives for these indices, or the codes before the projection out."""
        indices, image = self._indices_in(indices)
        codes = ops.unpack_signs(indices.long(), self.codebook_dim, self.value)
        if project_out:
            return self._leave(codes, image)
        codes = codes.flatten(-2)
        return codes.movedim(-1, 1) if self._is_channel_first(image) else codes

    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> Return | tuple[Return, LossBreakdown]:
        """mask [B, ...]: tokens that the losses are taken from."""
        z = self._enter(x)
        if self.soft_clamp_input_value is not None:
            z = (z / self.soft_clamp_input_value).tanh() * self.soft_clamp_input_value
        dtype, z = z.dtype, z.float()
        if self.spherical:
            z = F.normalize(z, dim=-1) * self.codebook_scale
        codes, indices = ops.sign_codes(z, self.value)
        rows = (z if mask is None else z[mask]).reshape(-1, self.num_codebooks, self.codebook_dim)
        fixed = codes.detach() if mask is None else codes.detach()[mask]
        sample = batch = entropy = commitment = self.zero
        wanted = self.entropy_loss_weight != 0 or (
            return_loss_breakdown and self.codebook_dim <= _LARGEST_ENTROPY
        )
        if self.training and wanted:
            sample, batch = code_entropies(rows, 4 * inv_temperature * self.value)
            entropy = sample - self.diversity_gamma * batch
        if self.training and self.commitment_loss_weight > 0:
            commitment = F.mse_loss(rows, fixed.view_as(rows))
        loss = entropy * self.entropy_loss_weight + commitment * self.commitment_loss_weight
        out = self._leave(codes.to(dtype), x.dim() >= 4)
        result = Return(out, self._indices_out(indices), loss)
        return (result, LossBreakdown(sample, batch, commitment)) if return_loss_breakdown else result


class BSQ(LFQ):
    """Binary spherical quantization: `LFQ` on normalised x, with codes sign / sqrt(bits)."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**{"spherical": True, **arguments})


def code_entropies(z: Tensor, sharpness: float) -> tuple[Tensor, Tensor]:
    """Rows z [N, codebooks, bits] -> (mean entropy of a token's codes, entropy of the mean), in nats.

    The softmax over all 2^bits sign codes of 2 t z . code is a product of sigmoids, one per bit, of
    sharpness z = 4 t value z. So the first entropy is a sum over bits, and the mean probability of all codes
    is one product of two [N, 2^(bits / 2)] matrices: no N x 2^bits matrix.
    """
    a = z * sharpness
    p = torch.sigmoid(a)
    sample = (F.softplus(a) - a * p).sum(-1).mean()
    half = z.shape[-1] // 2
    high, low = _products(a[..., :half]), _products(a[..., half:])  # [codebooks, N, 2^bits of the half]
    mean = (high.transpose(1, 2) @ low / len(z)).flatten(1)
    batch = -(mean * mean.clamp(min=1e-5).log()).sum(-1).mean()
    return sample, batch


def _products(a: Tensor) -> Tensor:
    """Probabilities of all values of the bits, the first bit highest: [N, C, bits] -> [C, N, 2^bits]."""
    out = torch.ones_like(a[..., :1])
    for bit in a.unbind(-1):
        pair = torch.stack([torch.sigmoid(-bit), torch.sigmoid(bit)], -1)
        out = (out[..., :, None] * pair[..., None, :]).flatten(-2)
    return out.transpose(0, 1)
