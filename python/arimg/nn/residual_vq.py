"""Residual vector quantization under the names and conventions of vector-quantize-pytorch."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from arimg.nn.vector_quantize import VectorQuantize, refuse
from arimg.ops.quantize_search import residual_codes

# Arguments of the package that are taken with their default alone.
_DEFAULTS: dict[str, Any] = dict(
    diveq=False,
    heads=1,
    implicit_neural_codebook=False,
    mlp_kwargs={},
    beam_size=None,
    eval_beam_size=None,
    beam_score_quantizer_weights=None,
)


class ResidualVQ(nn.Module):
    """Each quantizer codes what the ones before left over: x [B, N, dim] -> (sum of codes, indices, losses).

    indices [B, N, quantizers] (or [B, H, W, quantizers] with accept_image_fmap), losses [quantizers].
    quantize_dropout (in training): the quantizers behind a random one are left out, with index -1 and loss 0.
    Further arguments go to each `VectorQuantize`.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **others: Any,
    ) -> None:
        super().__init__()
        refuse("ResidualVQ", {k: v for k, v in others.items() if k in _DEFAULTS}, _DEFAULTS)
        vq = {k: v for k, v in others.items() if k not in _DEFAULTS}
        if num_quantizers is None and not isinstance(codebook_size, tuple):
            raise ValueError("expected num_quantizers or a tuple of codebook sizes")
        sizes = codebook_size if isinstance(codebook_size, tuple) else (codebook_size,)
        if len(sizes) == 1 and num_quantizers is not None:
            sizes *= num_quantizers
        if not sizes or (num_quantizers is not None and len(sizes) != num_quantizers):
            raise ValueError(f"expected {num_quantizers} codebook sizes, got {len(sizes)}")
        if shared_codebook and len(set(sizes)) != 1:
            raise ValueError(f"expected equal sizes of a shared codebook, got {sizes}")
        codebook_dim = dim if codebook_dim is None else codebook_dim
        self.has_projections = codebook_dim != dim
        if self.has_projections and accept_image_fmap:
            raise ValueError("expected codebook_dim equal to dim with accept_image_fmap")
        self.project_in: nn.Module = nn.Linear(dim, codebook_dim) if self.has_projections else nn.Identity()
        self.project_out: nn.Module = nn.Linear(codebook_dim, dim) if self.has_projections else nn.Identity()
        self.codebook_dim, self.codebook_sizes, self.num_quantizers = codebook_dim, sizes, len(sizes)
        self.accept_image_fmap, self.shared_codebook = accept_image_fmap, shared_codebook
        self.quantize_dropout = quantize_dropout and len(sizes) > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.quant_grad_frac = quant_grad_frac
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        if shared_codebook:
            vq["manual_ema_update"] = True  # once, after the last quantizer
        self.layers = nn.ModuleList(
            VectorQuantize(
                dim=codebook_dim,
                codebook_size=size,
                codebook_dim=codebook_dim,
                accept_image_fmap=accept_image_fmap,
                return_zeros_for_masked_padding=return_zeros_for_masked_padding,
                **vq,
            )
            for size in sizes
        )
        if shared_codebook:
            for layer in self._quantizers():
                layer._codebook = self._quantizers()[0]._codebook

    def _quantizers(self) -> list[VectorQuantize]:
        return [layer for layer in self.layers if isinstance(layer, VectorQuantize)]

    @property
    def codebook_size(self) -> int:
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """[quantizers, K, D], or a tuple where the sizes differ."""
        books = tuple(layer.codebook for layer in self._quantizers())
        return torch.stack(books) if len(set(self.codebook_sizes)) == 1 else books

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Codes of each quantizer, [quantizers, ..., D]: zeros for the index -1 and what is left out."""
        codes = []
        for q, layer in enumerate(self._quantizers()):
            index = indices[..., q] if q < indices.shape[-1] else torch.full_like(indices[..., 0], -1)
            found = layer.codebook[index.clamp(min=0)]
            codes.append(torch.where((index >= 0)[..., None], found, 0.0))
        return torch.stack(codes)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """The sum of the codes, projected out: [..., dim]."""
        return self.project_out(self.get_codes_from_indices(indices).sum(0))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: None = None,
        return_all_codes: bool = False,
        freeze_codebook: bool = False,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        if indices is not None:
            raise ValueError("ResidualVQ does not offer a cross entropy with given indices")
        given = x
        residual = self.project_in(x)
        if mask is None and not return_all_codes and self._searches_at_once(residual):
            codes, index = self._at_once(residual)
            return self.project_out(codes), index, torch.stack([layer.zero for layer in self._quantizers()])
        total = torch.zeros_like(residual)
        kept = self._quantizers_kept(rand_quantize_dropout_fixed_seed, x.device)
        all_indices: list[Tensor] = []
        losses: list[Tensor] = []
        residuals: list[Tensor] = []
        for layer in self.layers[:kept]:
            residuals.append(residual)
            codes, index, loss = layer(residual, mask=mask, freeze_codebook=freeze_codebook or None)
            fixed = codes.detach()
            if self.quant_grad_frac > 0:
                fixed = fixed + self.quant_grad_frac * (codes - fixed)
            residual = residual - fixed
            total = total + codes
            all_indices.append(index)
            losses.append(loss)
        dropped = self.num_quantizers - kept
        all_indices += [torch.full_like(all_indices[0], -1)] * dropped
        losses += [torch.zeros_like(losses[0])] * dropped
        if self.training and self.shared_codebook:
            self._update_shared(residuals, freeze_codebook)
        out = self.project_out(total)
        if mask is not None:
            out = torch.where(mask[..., None], out, 0.0 if self.return_zeros_for_masked_padding else given)
        index = torch.stack(all_indices, -1)
        result = (out, index, torch.stack(losses))
        return (*result, self.get_codes_from_indices(index)) if return_all_codes else result

    def _searches_at_once(self, x: Tensor) -> bool:
        """Whether `arimg.ops.residual_nearest_code` gives what the quantizers would one by one."""
        first = self._quantizers()[0]
        codebooks = [layer._codebook for layer in self._quantizers()]
        return (
            not self.training
            and len(set(self.codebook_sizes)) == 1
            and x.dtype == torch.float32  # others are rounded between the quantizers
            and x.dim() == (4 if self.accept_image_fmap else 3)
            and x.shape[1 if self.accept_image_fmap else -1] == self.codebook_dim
            and first.channel_first == self.accept_image_fmap
            and all(book._ready and not book.cosine for book in codebooks)
            and not (torch.is_grad_enabled() and any(book.embed.requires_grad for book in codebooks))
        )

    def _at_once(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the codes, in the layout of x, and the indices of all quantizers."""
        tokens = x.detach().movedim(1, -1) if self.accept_image_fmap else x.detach()
        books = [layer.codebook for layer in self._quantizers()]
        indices, codes = residual_codes(tokens.reshape(-1, self.codebook_dim), books)
        codes = codes.view(tokens.shape)
        if self.accept_image_fmap:
            codes = codes.movedim(-1, 1)
        return codes, indices.view(*tokens.shape[:-1], self.num_quantizers)

    def _quantizers_kept(self, seed: int | None, device: torch.device) -> int:
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers
        if seed is None:
            seed = int(torch.randint(0, 10_000, (), device=device).item())
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(-(-(last + 1) // multiple) * multiple, self.num_quantizers)

    def _update_shared(self, residuals: list[Tensor], frozen: bool) -> None:
        first = self._quantizers()[0]
        codebook = first._codebook
        if frozen or first.freeze_codebook:
            return
        if codebook.ema_update:
            codebook.update_ema()
        rows = torch.stack([r.detach() for r in residuals], -2)  # quantizer by quantizer within a token
        if self.accept_image_fmap:
            rows = torch.stack([r.detach().flatten(2).transpose(1, 2) for r in residuals], -2)
        codebook.replace_dead(rows.reshape(1, -1, self.codebook_dim))
