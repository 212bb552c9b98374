"""The released VAR code (arXiv 2404.02905): the generator and its multi-scale quantizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from arimg import ops
from arimg.accelerate.graphs import Graphed
from arimg.accelerate.report import Report
from arimg.accelerate.swap import Mixin, has_hooks
from arimg.accelerate.var_graphs import Sessions
from arimg.accelerate.view import misfit, parameters_of, view_of
from arimg.generators.var import VAR, VarSession
from arimg.layout import Layout
from arimg.nn.scale_quantizer import ScaleQuantizer
from arimg.ops._common import FLOATING
from arimg.tokenizers.vqvae import VQVAE

_GENERATOR = {"word_embed", "class_emb", "lvl_embed", "blocks", "head_nm", "head"}


def _quantizer_view(module: Any) -> ScaleQuantizer:
    """Ours for a VectorQuantizer2, without its weights."""
    phi = module.quant_resi
    convolutions = phi if isinstance(phi, nn.ModuleList) else getattr(phi, "qresi_ls", [None])
    return ScaleQuantizer(
        module.vocab_size,
        module.Cvae,
        Layout.scales(module.v_patch_nums).shapes,
        shared_phi=0 if convolutions is phi else len(convolutions),
        ratio=abs(module.quant_resi_ratio),
        cosine=module.using_znorm,
    )


class _Tokenizer(VQVAE):
    """What our generator asks of a tokenizer, over their quantizer and decoder."""

    def __init__(self, vae: Any) -> None:
        nn.Module.__init__(self)
        self.vae = (vae,)
        self.quantize = view_of(vae.quantize, _quantizer_view)

    def decode_features(self, f_hat: Tensor) -> Tensor:
        image: Tensor = self.vae[0].fhat_to_img(f_hat)
        return image.add(1).mul(0.5)


class _View(VAR):
    """Ours over their weights, whose generations may run on graphs."""

    sessions: Sessions | None = None

    def begin(self, condition: Any, guided: bool, **options: Any) -> VarSession:
        if self.sessions is None:
            return super().begin(condition, guided, **options)
        return self.sessions.begin(self, self.labels(condition), guided, **options)


def _generator(module: Any) -> _View:
    view_of(module.vae_proxy[0].quantize, _quantizer_view)  # shared anew where it was replaced
    dtype = module.weights_storage
    return view_of(module, _generator_view, dtype if module.pos_1LC.dtype == torch.float32 else None)


def _generator_view(module: Any) -> _View:
    """Ours for a VAR, without its weights."""
    block = module.blocks[0]
    view = _View(
        _Tokenizer(module.vae_proxy[0]),
        module.num_classes,
        len(module.blocks),
        module.C,
        module.num_heads,
        mlp_ratio=block.ffn.fc1.out_features / module.C,
        shared_adaln=block.shared_aln,
        attn_l2_norm=block.attn.attn_l2_norm,
        class_dropout=0.0,
    )
    return view


class _Generator(Graphed):
    """Sampling: caches allocated once, fused norms and sampling, constants computed once. Scoring and
    training: no mask.
    """

    weights_storage: torch.dtype | None

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self,
        B: int,
        label_B: int | Tensor | None,
        g_seed: int | None = None,
        cfg: float = 1.5,
        top_k: int = 0,
        top_p: float = 0.0,
        more_smooth: bool = False,
    ) -> Tensor:
        module: Any = self
        if _is_unknown(module):
            return super().autoregressive_infer_cfg(  # type: ignore[misc, no-any-return]
                B, label_B, g_seed, cfg, top_k, top_p, more_smooth
            )
        view = _generator(module)
        rng = None
        if g_seed is not None:
            rng = module.rng.manual_seed(g_seed)
        device = module.pos_1LC.device
        if label_B is None:
            label_B = torch.multinomial(module.uniform_prob, B, replacement=True, generator=rng).reshape(B)
        elif isinstance(label_B, int):
            label_B = torch.full((B,), label_B, device=device)
        if g_seed is None:  # as the original, from torch's global generator
            g_seed = int(torch.randint(2**62, (1,)))
        view.sessions = None if module.graphs is None else Sessions(module, module.graphs)
        try:
            image = view.generate(
                label_B,
                cfg=cfg,
                top_k=top_k,
                top_p=top_p if top_p > 0 else 1.0,
                seed=g_seed,
                more_smooth=more_smooth,
            )
            if view.sessions is not None:
                view.sessions.end()
            return image
        finally:
            view.sessions = None

    def forward(self, label_B: Tensor, x_BLCv_wo_first_l: Tensor) -> Tensor:
        module: Any = self
        view = None if _needs_the_original(module) else _scorer(module, x_BLCv_wo_first_l)
        if view is None:
            return super().forward(label_B, x_BLCv_wo_first_l)  # type: ignore[misc, no-any-return]
        return _teacher_forcing(module, view, label_B, x_BLCv_wo_first_l)


def _needs_the_original(module: Any) -> bool:
    """Whether the forward has what our composition lacks: dropout of attention weights, hooks of parts."""
    dropout = any(getattr(b.attn, "attn_drop", 0) and b.attn.training for b in module.blocks)
    return dropout or _is_unknown(module)


def _is_unknown(module: Any) -> bool:
    return has_hooks(module) or module.pos_1LC.dtype not in FLOATING


def _scorer(module: Any, x: Tensor) -> VAR | None:
    """The view that scores: the shared parameters themselves where a gradient may be wanted."""
    wanted = x.requires_grad or any(p.requires_grad for p in parameters_of(module).values())
    if not (module.training or (wanted and torch.is_grad_enabled())):
        return _generator(module)
    return None if misfit(module, _generator_view) else view_of(module, _generator_view)


def _teacher_forcing(module: Any, view: VAR, label_B: Tensor, x: Tensor) -> Tensor:
    """The original's forward, with its dropouts in its order, over key intervals instead of a mask.

    Progressive training (prog_si >= 0) scores the first scales alone.
    """
    device, last = module.pos_1LC.device, module.prog_si
    scales = last + 1 if last >= 0 else len(view.layout)
    length = view.layout.segments[scales - 1][1]
    # The original drops labels in evaluation too, from the global generator.
    dropped = torch.rand(len(x), device=label_B.device) < module.cond_drop_rate
    condition = view._condition(view.labels(torch.where(dropped, module.num_classes, label_B)))
    with torch.autocast(device.type, enabled=False):
        parts = [condition.first]
        if last != 0:
            parts.append(view.word_embed(x.to(view.word_embed.weight.dtype)))
        embedded = torch.cat(parts, dim=1) + view._positions()[:, :length]
    if torch.is_autocast_enabled(device.type):
        embedded = embedded.to(torch.get_autocast_dtype(device.type))

    def drop(i: int, branch: str, y: Tensor) -> Tensor:
        block = module.blocks[i]
        own = getattr(block.attn, "proj_drop", None) if branch == "attn" else getattr(block.ffn, "drop", None)
        y = y if own is None else own(y)
        path = getattr(block, "drop_path", None)
        return y if path is None else path(y)

    logits = view._score(embedded, condition, drop, scales).float()
    if last == 0:  # no token is embedded, yet data-parallel training wants a gradient for every parameter
        logits = logits + sum(p.sum() for p in view.word_embed.parameters()) * 0
    return logits


class _Quantizer(Mixin):
    """Nearest codes without a distance matrix, the whole residual encode in one call, fused accumulation."""

    def f_to_idxBl_or_fhat(
        self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Sequence[int | tuple[int, int]] | None = None
    ) -> list[Tensor]:
        module: Any = self
        view = view_of(module, _quantizer_view)
        other = v_patch_nums is not None and Layout.scales(v_patch_nums).shapes != view.scales
        if other or module.using_znorm or self._is_unknown():
            return super().f_to_idxBl_or_fhat(f_BChw, to_fhat, v_patch_nums)  # type: ignore[misc, no-any-return]
        f = f_BChw.detach().float()
        if (f.shape[-2], f.shape[-1]) != view.scales[-1]:
            raise ValueError(f"expected features [B, C, {view.scales[-1][0]}, {view.scales[-1][1]}], "
                             f"got {list(f.shape)}")  # fmt: skip
        indices = view.encode(f)
        return self._running(view, indices) if to_fhat else indices

    def _is_unknown(self) -> bool:
        """Whether training is progressive, or codes have a type without kernels."""
        module: Any = self
        return module.prog_si >= 0 or module.embedding.weight.dtype not in FLOATING

    @staticmethod
    def _running(view: ScaleQuantizer, indices: Sequence[Tensor]) -> list[Tensor]:
        f_hat, out = view.empty(len(indices[0])), []
        with torch.no_grad():
            for k, index in enumerate(indices):
                view.accumulate_(f_hat, view.code_map(index, k), k)
                out.append(f_hat.clone())
        return out

    def idxBl_to_var_input(self, gt_ms_idx_Bl: Sequence[Tensor]) -> Tensor | None:
        module: Any = self
        if self._is_unknown():
            return super().idxBl_to_var_input(gt_ms_idx_Bl)  # type: ignore[misc, no-any-return]
        maps = view_of(module, _quantizer_view).generator_input(gt_ms_idx_Bl)
        return maps if maps.shape[1] else None

    def get_next_autoregressive_input(
        self, si: int, SN: int, f_hat: Tensor, h_BChw: Tensor
    ) -> tuple[Tensor, Tensor]:
        module: Any = self
        view = view_of(module, _quantizer_view)
        gradient = torch.is_grad_enabled() and (f_hat.requires_grad or h_BChw.requires_grad)
        if gradient or len(view.scales) != SN or f_hat.dtype != torch.float32:
            return super().get_next_autoregressive_input(si, SN, f_hat, h_BChw)  # type: ignore[misc, no-any-return]
        with torch.no_grad():
            view.accumulate_(f_hat, h_BChw.float(), si)
            return f_hat, f_hat if si == SN - 1 else ops.area_down(f_hat, view.scales[si + 1])


def recognise_var(report: Report, path: str, module: nn.Module) -> bool:
    children = {name for name, _ in module.named_children()}
    if not (children >= _GENERATOR and hasattr(module, "vae_proxy") and hasattr(module, "pos_1LC")):
        return False
    reason = misfit(module, _generator_view)
    if reason:
        report.keep(module, path, reason)
    else:
        note = "sampling on caches allocated once, fused norms, sampler and pyramid; training without a mask"
        report.swap_generator(module, _Generator, path, note)
    return True


def recognise_var_quantizer(report: Report, path: str, module: nn.Module) -> bool:
    if not all(hasattr(module, name) for name in ("embedding", "quant_resi", "v_patch_nums", "Cvae")):
        return False
    reason = misfit(module, _quantizer_view)
    if reason:
        report.keep(module, path, reason)
    else:
        note = "residual encode in one call, fused accumulation"
        report.swap(module, _Quantizer, path, note)
    return True
