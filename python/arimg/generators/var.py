"""VAR: visual autoregressive modelling by next-scale prediction (arXiv 2404.02905)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from arimg import ops
from arimg.cache import KVCache
from arimg.generators.loop import Sampler, Session, Turn, generate
from arimg.guidance import BeyondConditional, Guidance, linear
from arimg.layout import Layout, Visibility
from arimg.nn import checkpoint
from arimg.nn.adaln import AdaLNBeforeHead, AdaLNBlock, Attend, Drop, HeadModulation, Modulation, run_blocks
from arimg.nn.follow import follow
from arimg.nn.labels import class_labels, drop_labels, with_unconditional
from arimg.nn.linear import Linear
from arimg.reference.kv_cache import split_qk_norm
from arimg.reference.sampling import philox_uniform, token_weights
from arimg.tokenizers.vqvae import SCALES_512, VQVAE

# Buffers of released checkpoints that hold constants: accepted and not kept
_CONSTANTS = ("lvl_1L", "attn_bias_for_masking")
_CONSTANT_SUFFIX = ".attn.zero_k_bias"


@dataclass(frozen=True, eq=False)
class Step:
    """One scale of a generation.

    scale: (h, w); indices: int64 [B, h * w]; f_hat: the running sum [B, C, H, W] after this scale;
    logits: [B or 2B, h * w, V] before guidance, conditional rows first.
    """

    index: int
    scale: tuple[int, int]
    indices: Tensor
    f_hat: Tensor
    logits: Tensor
    tokenizer: VQVAE

    @cached_property
    def image(self) -> Tensor:
        """The picture so far, [B, 3, H, W] in [0, 1], decoded at the first access."""
        return self.tokenizer.decode_features(self.f_hat)


@dataclass(frozen=True)
class _Condition:
    """What the class decides, constant over all steps."""

    first: Tensor  # [B, first, C] input of the first scale
    blocks: list[Modulation]
    head: HeadModulation


class VAR(nn.Module):
    """Class-conditional next-scale generator over the tokens of a `VQVAE`.

    Parameter names are those of the released `var_d16.pth` ... `var_d36.pth`. The tokenizer is not a
    submodule: its weights are neither saved nor moved with this module. Label -1 (or num_classes) is "no
    class". width and heads default to 64 * depth and depth, as released. drop_path and class_dropout act in
    training.
    """

    sampler = Sampler(Guidance(1.5, linear, BeyondConditional()), top_k=900, top_p=0.96)
    rule = "level-causal"  # what the tokens of all scales side by side see

    def __init__(
        self,
        tokenizer: VQVAE,
        num_classes: int = 1000,
        depth: int = 16,
        width: int | None = None,
        heads: int | None = None,
        *,
        mlp_ratio: float = 4.0,
        shared_adaln: bool = False,
        attn_l2_norm: bool = True,
        class_dropout: float = 0.1,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        width, heads = width or 64 * depth, heads or depth
        if width % heads:
            raise ValueError(f"expected a width that {heads} heads divide, got {width}")
        self._tokenizer = (tokenizer,)  # a tuple keeps it out of the submodules
        self.layout = Layout.scales(tokenizer.scales)
        self.num_classes, self.depth, self.width, self.heads = num_classes, depth, width, heads
        self.mlp_ratio, self.shared_adaln, self.attn_l2_norm = mlp_ratio, shared_adaln, attn_l2_norm
        self.class_dropout, self.drop_path = class_dropout, drop_path

        self.word_embed = Linear(tokenizer.z_channels, width)
        self.class_emb = nn.Embedding(num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, self.layout.sizes[0], width))
        self.pos_1LC = nn.Parameter(torch.empty(1, self.layout.length, width))
        self.lvl_embed = nn.Embedding(len(self.layout), width)
        shared = nn.Sequential(nn.SiLU(), Linear(width, 6 * width))
        self.shared_ada_lin: nn.Module = shared if shared_adaln else nn.Identity()
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(self._block(round(width * mlp_ratio), rate) for rate in rates)
        self.head_nm = AdaLNBeforeHead(width)
        self.head = Linear(width, tokenizer.vocab_size)
        self.register_load_state_dict_pre_hook(_drop_constants)
        self._initialise()

    def _block(self, hidden: int, drop_path: float) -> AdaLNBlock:
        return AdaLNBlock(
            self.width, self.heads, hidden, shared=self.shared_adaln, l2_norm=self.attn_l2_norm,
            drop_path=drop_path,
        )  # fmt: skip

    @property
    def tokenizer(self) -> VQVAE:
        return self._tokenizer[0]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """`.to(device)` takes the tokenizer along."""
        moved = super()._apply(fn, recurse)
        follow(self.tokenizer, self.word_embed.weight.device)
        return moved

    @property
    def _blocks(self) -> list[AdaLNBlock]:
        return cast(list[AdaLNBlock], list(self.blocks))

    @torch.no_grad()
    def _initialise(self) -> None:
        """The released recipe: normal of std sqrt(1 / 3C); branches start almost closed and the head almost
        at 0.
        """
        std = math.sqrt(1 / self.width / 3)
        for p in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(p, std=std)
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Embedding):
                nn.init.trunc_normal_(m.weight, std=std)
            if isinstance(m, nn.Linear) and m.bias is not None:
                nn.init.zeros_(m.bias)
        self.head.weight.mul_(0.02)
        self.head_nm.get_parameter("ada_lin.1.weight").mul_(0.5)
        for block in self._blocks:
            block.attn.proj.weight.div_(math.sqrt(2 * self.depth))
            block.ffn.fc2.weight.div_(math.sqrt(2 * self.depth))
            # rows of the projection: the gates, then as many scales and as many shifts
            table = block.ada_gss[0, 0] if self.shared_adaln else block.get_parameter("ada_lin.1.weight")
            vectors = table if self.shared_adaln else table.unflatten(0, (-1, self.width))
            gates = len(vectors) // 3
            vectors[:gates].mul_(1e-5)
            vectors[gates:].mul_(0.5)

    def config(self) -> dict[str, Any]:
        """Constructor arguments but for the tokenizer, as JSON values."""
        names = ("num_classes", "depth", "width", "heads", "mlp_ratio", "shared_adaln", "attn_l2_norm")
        return {name: getattr(self, name) for name in (*names, "class_dropout", "drop_path")}

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, tokenizer: VQVAE, heads: int | None = None, **options: Any
    ) -> "VAR":
        """Build the model of a state dict, in evaluation mode; sizes are read off the tensors.

        heads is needed only where the attention has no L2 norm and heads are not 64 wide. The scales are the
        tokenizer's; for the released 512-px models (2240 tokens) a tokenizer of 256 px gets their schedule.
        """
        sizes = cls._sizes(state, heads) | options
        tokenizer = cls._fitted(tokenizer, state)
        return checkpoint.built(lambda: cls(tokenizer, **sizes), state, cls.__name__)

    @classmethod
    def _sizes(cls, state: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
        """Constructor arguments that a state dict tells."""
        classes, width = checkpoint.tensor_of(state, "class_emb.weight", 2, "VAR").shape
        hidden = len(checkpoint.tensor_of(state, "blocks.0.ffn.fc1.weight", 2, "VAR"))
        per_head = state.get("blocks.0.attn.scale_mul_1H11")
        return {
            "num_classes": classes - 1,
            "depth": checkpoint.count(state, "blocks."),
            "width": width,
            "heads": heads or (width // 64 if per_head is None else per_head.shape[1]),
            "mlp_ratio": hidden / width,
            "shared_adaln": "shared_ada_lin.1.weight" in state,
            "attn_l2_norm": per_head is not None,
        }

    @classmethod
    def _fitted(cls, tokenizer: VQVAE, state: Mapping[str, Tensor]) -> VQVAE:
        """The tokenizer with the scales of a state dict."""
        length = checkpoint.tensor_of(state, "pos_1LC", 3, "VAR").shape[1]
        scales = len(checkpoint.tensor_of(state, "lvl_embed.weight", 2, "VAR"))
        return _fit_tokenizer(tokenizer, scales, length)

    def labels(self, labels: int | Sequence[int] | Tensor) -> Tensor:
        """Check class labels and put "no class" (-1) at num_classes: int64 [B] on the model's device."""
        return class_labels(labels, self.num_classes, self.pos_1LC.device)

    def _condition(
        self,
        labels: Tensor,
        blocks: Sequence[AdaLNBlock] | None = None,
        head: AdaLNBeforeHead | None = None,
    ) -> _Condition:
        """For the model's own blocks and norm before the head, or for others that stand in their place."""
        embedded = self.class_emb(labels)
        shared = self.shared_ada_lin(embedded)
        if self.shared_adaln:
            shared = shared.unflatten(-1, (1, 6, -1))
        modulations = [block.modulation(shared) for block in blocks or self._blocks]
        first = embedded[:, None] + self.pos_start
        return _Condition(first, modulations, (head or self.head_nm).modulation(embedded))

    def _positions(self) -> Tensor:
        """Position and level of each token, [1, L, C]."""
        return self.pos_1LC + self.lvl_embed(self.layout.level(self.pos_1LC.device))

    def forward(self, labels: Tensor, x: Tensor) -> Tensor:
        """Teacher forcing: labels [B], x [B, L - first, Cvae] -> logits [B, L, V], float32.

        x is `tokenizer.quantize.generator_input(indices)`. In training a label becomes "no class" with
        probability `class_dropout`.
        """
        rest, channels = self.layout.length - self.layout.sizes[0], self.word_embed.in_features
        if x.dim() != 3 or x.shape[1:] != (rest, channels):
            raise ValueError(f"expected x [B, {rest}, {channels}], got {list(x.shape)}")
        if len(labels) != len(x):
            raise ValueError(f"expected as many labels as rows of x ({len(x)}), got {len(labels)}")
        condition = self._condition(self.dropped(self.labels(labels)))
        embedded = torch.cat((condition.first, self.word_embed(x.to(self.word_embed.weight.dtype))), dim=1)
        return self._score(embedded + self._positions(), condition).float()

    def _score(
        self, x: Tensor, condition: _Condition, drop: Drop | None = None, scales: int | None = None
    ) -> Tensor:
        """Logits of the embedded tokens of all or the first scales at once: x [B, n, C] -> [B, n, V]."""
        layout = self.layout if scales is None else Layout(self.layout.shapes[:scales])
        attend = uncached(self._blocks, layout.visibility(self.rule, device=x.device))
        return self.head(run_blocks(self._blocks, x, condition.blocks, condition.head, attend, drop=drop))

    def dropped(self, labels: Tensor) -> Tensor:
        """In training, "no class" instead of a label with probability `class_dropout`."""
        return drop_labels(labels, self.num_classes, self.class_dropout) if self.training else labels

    def generate(
        self,
        labels: int | Sequence[int] | Tensor,
        *,
        cfg: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        seed: int | Tensor = 0,
        more_smooth: bool = False,
        given: Sequence[Tensor] = (),
    ) -> Tensor:
        """Pictures of the given classes: labels [B] -> [B, 3, H, W] in [0, 1].

        cfg: strength t of the guidance at the last scale, growing linearly from 0. top_k = 0 and top_p = 1
        switch the filters off. seed: an int s (row r draws with s + r) or int64 [B]. more_smooth: mix codes
        by a Gumbel softmax instead of taking the drawn one (for pretty pictures, not for measurements).
        given: indices of the first scales, kept as they are.
        """
        for step in self.stream(  # noqa: B007 (the last one is used)
            labels, cfg=cfg, top_k=top_k, top_p=top_p, seed=seed, more_smooth=more_smooth, given=given
        ):
            pass
        return step.image

    def stream(
        self,
        labels: int | Sequence[int] | Tensor,
        *,
        cfg: float = 1.5,
        top_k: int = 900,
        top_p: float = 0.96,
        seed: int | Tensor = 0,
        more_smooth: bool = False,
        given: Sequence[Tensor] = (),
    ) -> Iterator[Step]:
        """The steps of `generate`, one per scale, each with a preview (`step.image`)."""
        sampler = Sampler(
            None if cfg == 0 else Guidance(cfg, linear, BeyondConditional()), top_k=top_k, top_p=top_p
        )
        turns = generate(self, labels, sampler=sampler, seed=seed, given=given, more_smooth=more_smooth)
        for turn in turns:
            session = turn.run.session
            assert isinstance(session, VarSession)
            yield Step(turn.step, turn.shape, turn.drawn, session.f_hat, turn.logits, self.tokenizer)

    def begin(self, condition: Any, guided: bool, **options: Any) -> "VarSession":
        """Opens a generation for class labels [B]; options: more_smooth; cached=False, the plain method: all
        scales so far run again in each pass.
        """
        return VarSession(self, self.labels(condition), guided, **options)


def uncached(blocks: Sequence[AdaLNBlock], seen: Visibility) -> Attend:
    """Attention of blocks among the tokens of one call."""

    def attend(i: int, qkv: Tensor) -> Tensor:
        attn = blocks[i].attn
        q, k, v = split_qk_norm(qkv, attn.q_scale(), attn.l2_norm)
        out = ops.row_interval_attention(
            q, k, v, seen.row_start, seen.row_end, scale=attn.softmax_scale, sinks=seen.sinks,
            self_key=seen.self_key, plan=seen.plan,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(2)

    return attend


class VarSession(Session):
    """One generation: constants of the labels, keys and values of the scales so far, and their sum f_hat."""

    def __init__(
        self,
        model: VAR,
        labels: Tensor,
        guided: bool,
        more_smooth: bool = False,
        layout: Layout | None = None,
        cached: bool = True,
    ) -> None:
        """layout: another than the model's, where its positions and inputs allow it. cached=False runs all
        scales so far in every pass.
        """
        self.cached, self.before = cached, list[Tensor]()
        self.model, self.blocks, self.guided, self.more_smooth = model, model._blocks, guided, more_smooth
        self.layout = model.layout if layout is None else layout
        self.rows, self.device = len(labels), labels.device
        self.f_hat = model.tokenizer.quantize.empty(self.rows)
        self._start(labels)
        self.caches = self._new_caches()

    def _start(self, labels: Tensor) -> None:
        """Computes the constants."""
        rows = with_unconditional(labels, self.model.num_classes, self.guided)
        self.condition = self.model._condition(rows)
        self.positions = self.model._positions()
        self.q_scales = [block.attn.q_scale() for block in self.blocks]

    def _new_caches(self) -> list[KVCache]:
        """Room for the keys and values of all scales, for each block."""
        if not self.cached:
            return []
        model, p = self.model, self.model.pos_1LC
        shape = (len(self.condition.first), model.heads, self.layout.length, model.width // model.heads)
        dtype, kind = p.dtype, p.device.type  # under autocast keys and values come in its type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return [KVCache(*shape, dtype=dtype, device=p.device) for _ in self.blocks]

    def logits(self, turn: Turn) -> Tensor:
        """Logits of a scale, [B or 2B, h * w, V]."""
        return self._step(turn.step, self.f_hat)

    def _step(self, k: int, f_hat: Tensor) -> Tensor:
        """Logits of scale k, given f_hat [B, C, H, W] of the scales before."""
        c, x = self.condition, self._input(k, f_hat)
        if self.cached:
            return self.model.head(run_blocks(self.blocks, x, c.blocks, c.head, self._attend))
        self.before[k:] = [x]
        return self.model._score(torch.cat(self.before, 1), c, scales=k + 1)[:, -x.shape[1] :]

    def _input(self, k: int, f_hat: Tensor) -> Tensor:
        """What the blocks see of scale k, [B or 2B, h * w, C]."""
        start, end = self.layout.segments[k]
        if k == 0:
            x = self.condition.first
        else:
            maps = self._next_map(k, f_hat)
            x = self._both(self.model.word_embed(maps.to(self.model.word_embed.weight.dtype)))
        return x + self.positions[:, start:end]

    def _both(self, x: Tensor) -> Tensor:
        """For conditional and unconditional rows."""
        return x.repeat(2, 1, 1) if self.guided else x

    def _next_map(self, k: int, f_hat: Tensor) -> Tensor:
        """What the model sees before it predicts scale k, [B, h * w, Cvae]."""
        return self.model.tokenizer.quantize.next_map(f_hat, k)

    def feed(self, turn: Turn) -> None:
        """Adds the codes of the scale to f_hat; a step that was handed out keeps its own."""
        quantizer = self.model.tokenizer.quantize
        if self.more_smooth and turn.step >= len(turn.run.given):
            codes = _smooth_codes(turn, quantizer.embedding.weight).transpose(1, 2)
            codes = codes.reshape(self.rows, -1, *turn.shape)
        else:
            codes = quantizer.code_map(turn.drawn, turn.step)
        self.f_hat = self.f_hat.clone()
        quantizer.accumulate_(self.f_hat, codes.to(self.f_hat.dtype), turn.step)

    def _attend(self, i: int, qkv: Tensor) -> Tensor:
        attn, cache = self.blocks[i].attn, self.caches[i]
        q = cache.append(qkv, self.q_scales[i], attn.l2_norm)
        out = ops.cached_attention(q, cache.k, cache.v, cache.length, scale=attn.softmax_scale)
        return out.transpose(1, 2).flatten(2)


def _smooth_codes(turn: Turn, codebook: Tensor) -> Tensor:
    """Mixture of codes by a Gumbel softmax over the tokens that the filters keep: [B, l, C].

    The released "more_smooth": logits (1 + progress), temperature max(0.27 (1 - 0.95 progress), 0.005).
    """
    logits, guidance = turn.logits.float(), turn.guidance
    progress = turn.step / max(len(turn.run.session.layout) - 1, 1)
    settings = turn.run.sampler.settings(turn)
    if guidance is not None:
        cond, uncond = logits.chunk(2)
        logits = guidance * cond + (1 - guidance) * uncond
    tokens, vocab = logits.shape[1:]
    kept = token_weights(logits.reshape(-1, vocab), top_k=settings["top_k"], top_p=settings["top_p"]).view_as(
        logits
    )
    # a counter of its own per token and code; draw 1 keeps it apart from the token draws
    u = philox_uniform(turn.run.seeds, turn.start * vocab, tokens * vocab, draw=1).view_as(logits)
    gumbel = -(-u.log()).log()
    tau = max(0.27 * (1 - 0.95 * progress), 0.005)
    mixed = ((logits * (1 + progress) + gumbel) / tau).masked_fill(kept == 0, -torch.inf).softmax(-1)
    return mixed @ codebook.float()


def _drop_constants(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the constant buffers of released checkpoints out of a state dict that is being loaded."""
    for key in [k for k in state if k.startswith(prefix)]:
        if key[len(prefix) :] in _CONSTANTS or key.endswith(_CONSTANT_SUFFIX):
            del state[key]


def _fit_tokenizer(tokenizer: VQVAE, scales: int, length: int) -> VQVAE:
    """The tokenizer, under the 512-px schedule where only that fits the state dict."""
    if len(tokenizer.scales) != scales:
        raise ValueError(
            f"expected 'lvl_embed.weight' with {len(tokenizer.scales)} rows, one per scale of the tokenizer, "
            f"got {scales}"
        )
    if Layout.scales(tokenizer.scales).length == length:
        return tokenizer
    if scales == len(SCALES_512) and Layout.scales(SCALES_512).length == length:
        return tokenizer.with_scales(SCALES_512)
    raise ValueError(
        f"expected 'pos_1LC' with {Layout.scales(tokenizer.scales).length} tokens, the sum over "
        f"the tokenizer's scales {tokenizer.scales}, got {length}"
    )
