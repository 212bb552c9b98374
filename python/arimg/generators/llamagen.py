"""LlamaGen: class-conditional pictures token by token, in raster order (arXiv 2406.06525)."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arimg import ops
from arimg.cache import KVCache
from arimg.generators.loop import Sampler, Session, Turn, final_tokens, generate
from arimg.guidance import Guidance
from arimg.layout import Layout
from arimg.nn import checkpoint
from arimg.nn.labels import class_labels, drop_labels, with_unconditional
from arimg.nn.linear import narrow_linear, narrow_swiglu
from arimg.nn.packed_linear import CODES, PackedLinear, pack_linears
from arimg.nn.rope import rope_2d
from arimg.ops._common import FLOATING, kernels
from arimg.ops.block_linear import MAX_ROWS
from arimg.reference.block_linear import ACTIVATIONS, QuantizedWeight
from arimg.reference.kv_cache import Rope, rotate

_Given = tuple[Tensor, Tensor | None, int]  # weight or codes, scales, inputs under one scale
_SILU = list(ACTIVATIONS).index("silu")
# (layer, qkv [B, L, Hq + 2 Hkv, D]) -> attention output [B, Hq, L, D]
Attend = Callable[[int, Tensor], Tensor]


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.wqkv = nn.Linear(width, (heads + 2 * kv_heads) * (width // heads), bias=False)
        self.wo = nn.Linear(width, width, bias=False)


class _FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = _Attention(width, heads, kv_heads)
        self.feed_forward = _FeedForward(width, hidden)
        self.attention_norm = nn.RMSNorm(width)
        self.ffn_norm = nn.RMSNorm(width)


class _LabelEmbedding(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)


class LlamaGen(nn.Module):
    """Class-conditional next-token generator over a square grid of tokens: a Llama with 2-D RoPE.

    Parameter names are those of the released `c2i_*.pt`. The class is one token in front of the picture;
    label -1 (or num_classes) is "no class". Queries and keys of the class token are zero, as released: only
    its value counts. kv_heads defaults to heads, hidden to the released multiple of 256 above 8/3 width.
    dropout (of embeddings and of both branches) and class_dropout act in training.
    """

    sampler = Sampler(Guidance(4.0))

    def __init__(
        self,
        vocab_size: int = 16384,
        num_classes: int = 1000,
        depth: int = 12,
        width: int = 768,
        heads: int = 12,
        *,
        kv_heads: int | None = None,
        hidden: int | None = None,
        grid: int = 16,
        rope_base: float = 10000.0,
        eps: float = 1e-5,
        dropout: float = 0.1,
        class_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        kv_heads = kv_heads or heads
        if width % heads or (width // heads) % 4:
            raise ValueError(f"expected a width that {heads} heads divide into multiples of 4, got {width}")
        if heads % kv_heads:
            raise ValueError(f"expected kv_heads that divide {heads}, got {kv_heads}")
        self.vocab_size, self.num_classes, self.depth, self.width = vocab_size, num_classes, depth, width
        self.heads, self.kv_heads, self.grid, self.rope_base, self.eps = heads, kv_heads, grid, rope_base, eps
        self.hidden = hidden or -(-(8 * width // 3) // 256) * 256
        self.dropout, self.class_dropout = dropout, class_dropout

        self.cls_embedding = _LabelEmbedding(num_classes + 1, width)
        self.tok_embeddings = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Layer(width, heads, kv_heads, self.hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(width)
        self.output: nn.Linear | PackedLinear = nn.Linear(width, vocab_size, bias=False)
        self._initialise()

    @property
    def length(self) -> int:
        """Tokens of a picture."""
        return self.layout.length

    @property
    def layout(self) -> Layout:
        """The steps of a picture; a subclass may take several tokens in one."""
        return Layout.raster(self.grid, self.grid)

    @torch.no_grad()
    def _initialise(self) -> None:
        """The released recipe: normal of std 0.02, the head at zero."""
        for m in self.modules():
            if isinstance(m, nn.Linear | nn.Embedding):
                nn.init.normal_(m.weight, std=0.02)
        cast(nn.Linear, self.output).weight.zero_()

    def config(self) -> dict[str, Any]:
        """Constructor arguments, as JSON values."""
        names = ("vocab_size", "num_classes", "depth", "width", "heads", "kv_heads", "hidden", "grid")
        return {n: getattr(self, n) for n in (*names, "rope_base", "eps", "dropout", "class_dropout")}

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Tensor], *, heads: int | None = None, **options: Any
    ) -> "LlamaGen":
        """Build the model of a state dict, in evaluation mode and the weights' type; sizes are read off them.

        heads is needed where they are not 64 wide. grid is not in the weights: 16 (256 px) unless given; 24
        for the released models of 384 px.
        """
        sizes = cls._sizes(state, heads) | cls._condition_sizes(state) | options
        dtype = state["layers.0.attention.wqkv.weight"].dtype
        return checkpoint.built(lambda: cls(**sizes), state, cls.__name__, dtype)

    @staticmethod
    def _sizes(state: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
        vocab, width = checkpoint.tensor_of(state, "tok_embeddings.weight", 2, "LlamaGen").shape
        rows = len(checkpoint.tensor_of(state, "layers.0.attention.wqkv.weight", 2, "LlamaGen"))
        hidden = len(checkpoint.tensor_of(state, "layers.0.feed_forward.w1.weight", 2, "LlamaGen"))
        heads = heads or width // 64
        kv_heads = (rows * heads // width - heads) // 2
        depth = checkpoint.count(state, "layers.")
        sizes = dict(vocab_size=vocab, depth=depth, width=width, heads=heads)
        return sizes | dict(kv_heads=kv_heads, hidden=hidden)

    @staticmethod
    def _condition_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
        table = checkpoint.tensor_of(state, "cls_embedding.embedding_table.weight", 2, "LlamaGen")
        return {"num_classes": len(table) - 1}

    def pack(self, storage: str = "int8", group: int | None = None) -> "LlamaGen":
        """Store the weights of the layers and of the head as int8 or int4, in place, for generation.

        group: inputs under one scale (see `ops.quantize_weight`). Embeddings and norms keep their type. The
        model generates as before; its state dict is no longer that of the released code.
        """
        if storage not in CODES:
            raise ValueError(f"expected a storage of {list(CODES)}, got {storage!r}")
        pack_linears(self.layers, storage, group)
        self.output = PackedLinear.from_linear(cast(nn.Linear, self.output), storage, group=group)
        return self

    def rope(self) -> Rope:
        """Rotations of the class token (to zero) and of the grid."""
        head_dim, device = self.width // self.heads, self.norm.weight.device
        return rope_2d(self.grid, self.grid, head_dim, self.rope_base, prefix=1, device=device)

    def labels(self, labels: int | Sequence[int] | Tensor) -> Tensor:
        """Check class labels and put "no class" (-1) at num_classes: int64 [B] on the model's device."""
        return class_labels(labels, self.num_classes, self.norm.weight.device)

    def forward(self, labels: Tensor, indices: Tensor) -> Tensor:
        """Teacher forcing: labels [B], the first n tokens [B, n] -> logits of tokens 0..n, [B, n + 1, V].

        n < length. In training a label becomes "no class" with probability `class_dropout`.
        """
        labels = self.dropped(self.labels(labels))
        before = self.prefix(labels)
        if indices.dim() != 2 or len(indices) != len(before) or indices.shape[1] >= self.length:
            raise ValueError(
                f"expected indices [{len(before)}, n < {self.length}], got {list(indices.shape)}"
            )
        h = torch.cat((before, self.embed(indices)), dim=1)
        return self.teach(h, self.padding(labels))[:, before.shape[1] - 1 :]

    # What subclasses change: what stands before a picture, the inputs, which of them see which, the layers.

    def prefix(self, labels: Tensor) -> Tensor:
        """What stands before a picture of these classes (checked, [B]): [B, P, C]."""
        embedded: Tensor = self.cls_embedding.embedding_table(labels)
        return embedded[:, None]

    def padding(self, labels: Tensor) -> Tensor | None:
        """How many inputs at the beginning of each row no other one sees, int32 [B]."""
        return None

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens [B, n] as inputs of the layers, [B, n, C]."""
        embedded: Tensor = self.tok_embeddings(tokens)
        return embedded

    def intervals(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Which inputs see which: (row_start, row_end) of a sequence with its prefix."""
        return ops.causal_intervals(length, device=device)

    def decoder(self) -> "Decoder":
        """The layers and the head."""
        return Decoder(self)

    def dropped(self, labels: Tensor) -> Tensor:
        """In training some of the checked labels become "no class"."""
        return drop_labels(labels, self.num_classes, self.class_dropout) if self.training else labels

    def teach(self, h: Tensor, padding: Tensor | None = None) -> Tensor:
        """All inputs of a sequence at once, [B, L, C]: the logits of each, differentiable."""
        rope, at = self.rope(), torch.arange(h.shape[1], device=h.device)[None]
        start, end = self.intervals(h.shape[1], h.device)
        if padding is not None:
            start = torch.maximum(start, torch.minimum(padding[:, None], end - 1))
            end = end.expand_as(start)

        def attend(i: int, qkv: Tensor) -> Tensor:
            parts = qkv.transpose(1, 2).split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            q, k = (rotate(t, rope, at).to(qkv.dtype) for t in parts[:2])
            out: Tensor = ops.row_interval_attention(q, k, parts[2], start, end)
            return out

        return self.decoder().run(h, attend, self.dropout if self.training else 0.0)

    @torch.no_grad()
    def generate(
        self,
        labels: int | Sequence[int] | Tensor,
        *,
        cfg: float = 4.0,
        cfg_interval: int = -1,
        top_k: int = 0,
        top_p: float = 1.0,
        temperature: float = 1.0,
        seed: int | Tensor = 0,
        tokens: int | None = None,
    ) -> Tensor:
        """Tokens of pictures of the given classes: labels [B] -> int64 [B, T], in raster order.

        cfg: strength s of the guidance u + s (c - u), of every token, or with cfg_interval n >= 0 of the
        first n + 2 alone; 1 or less is none. top_k = 0 and top_p = 1 switch the filters off. seed: an int s
        (row r draws with s + r) or int64 [B]. tokens: only the first T of them.
        """
        guidance = None
        if cfg > 1:
            guidance = Guidance(cfg, until=cfg_interval + 2 if cfg_interval >= 0 else None)
        sampler = Sampler(guidance, temperature, top_k, top_p)
        return torch.cat(final_tokens(generate(self, labels, sampler=sampler, seed=seed, tokens=tokens)), 1)

    def begin(self, condition: Any, guided: bool, **options: Any) -> "LlamaSession":
        """Opens a generation for class labels [B]; options: tokens, only the first so many of a picture;
        window, the most drafts that a pass may look at; cached=False, the plain method: all tokens so far
        run again for each.
        """
        kind = LlamaSession if options.pop("cached", True) else UncachedSession
        labels = self.labels(condition)
        rows = self.with_unconditional(labels, guided)
        prefix, padding = self.prefix(rows), self.padding(rows)
        return kind(self, prefix, len(prefix) // (1 + guided), padding=padding, **options)

    def with_unconditional(self, labels: Tensor, guided: bool) -> Tensor:
        """Labels of all rows of a generation: where guidance is on, "no class" for each behind them."""
        return with_unconditional(labels, self.num_classes, guided)


class LlamaSession(Session):
    """One generation: keys and values of the tokens so far, and the inputs that are not among them yet.

    prefix: embeddings [B or 2B, P, C] of the condition, which stand before the picture; padding: how many of
    them are none, int32 [B or 2B]. The last token of a row is always pending: its keys and values are written
    by the pass that predicts what follows it.
    """

    def __init__(
        self, model: LlamaGen, prefix: Tensor, rows: int, tokens: int | None = None, window: int = 0,
        padding: Tensor | None = None,
    ) -> None:  # fmt: skip
        steps = model.layout.shapes
        tokens = len(steps) if tokens is None else tokens
        if not 0 < tokens <= len(steps):
            raise ValueError(f"expected tokens from 1 to {len(steps)}, got {tokens}")
        self.model, self.rows, self.device, self.padding = model, rows, prefix.device, padding
        self.layout, self.vocabulary = Layout(steps[:tokens]), model.vocab_size
        self.decoder, self.rope = model.decoder(), _extended(model.rope(), window)
        self.pending, self.last = prefix, torch.zeros(rows, dtype=torch.int64, device=prefix.device)
        capacity = prefix.shape[1] + self.inputs()
        if window:  # drafts of rows that are complete, too
            capacity += 1 + window
        shape = (len(prefix), model.kv_heads, capacity, model.width // model.heads)
        self.caches = [KVCache(*shape, prefix.dtype, prefix.device) for _ in model.layers]

    def inputs(self) -> int:
        """How many inputs the tokens of all steps but the last are, whose keys and values are kept."""
        return self.layout.length - self.layout.sizes[-1]

    def logits(self, turn: Turn) -> Tensor:
        """Logits of the tokens behind the last one and behind each draft, [B or 2B, 1 + drafts, V]."""
        return self.run(turn)[:, self.pending.shape[1] - 1 :]

    def run(self, turn: Turn) -> Tensor:
        """Logits of the pending inputs and of the drafts behind them."""
        if turn.guidance is None and len(self.pending) > self.rows:
            self._drop_unconditional()
        x, drafts = self.pending, turn.drafts
        if drafts is not None:
            x = torch.cat((x, self._embed(drafts)), 1)

        def attend(i: int, qkv: Tensor) -> Tensor:
            cache = self.caches[i]
            q = (cache.append if drafts is None else cache.peek)(qkv, rope=self.rope)
            return self.attend(cache, q)

        return self.decoder.run(x, attend)

    def attend(self, cache: KVCache, q: Tensor) -> Tensor:
        """Attention of the newest queries over what they see."""
        return cache.attend_causal(q, padding=self.padding)

    def feed(self, turn: Turn) -> None:
        """Of drafts each row keeps its own number; behind it the caches forget."""
        self.last = turn.newest(self.last)
        if turn.length is None:
            self.pending = self._embed(turn.drawn)
        else:
            kept = turn.length.tolist()
            wanted = [self.pending.shape[1] - 1 + n for n in kept] * (len(self.pending) // self.rows)
            for cache in self.caches:
                cache.commit(wanted)
            self.pending = self._embed(self.last[:, None])

    def rewind(self, counts: Sequence[int], last: Tensor) -> None:
        """Each row forgets so many of the inputs that were written last and goes on behind `last`, int64
        [B].
        """
        for cache in self.caches:
            cache.rewind([*counts] * (len(self.pending) // self.rows))
        self.last = last
        self.pending = self._embed(last[:, None])

    def _embed(self, tokens: Tensor) -> Tensor:
        h = self.model.embed(tokens)
        return h.repeat(len(self.pending) // self.rows, 1, 1)

    def _drop_unconditional(self) -> None:
        self.pending = self.pending[: self.rows]
        self.padding = None if self.padding is None else self.padding[: self.rows]
        self.caches = [cache.fork(range(self.rows)) for cache in self.caches]


class UncachedSession(LlamaSession):
    """Runs the whole sequence for every token."""

    whole: Tensor | None = None

    def logits(self, turn: Turn) -> Tensor:
        if self.whole is not None:
            self.pending = torch.cat((self.whole[: len(self.pending)], self.pending), 1)
        self.whole = self.pending
        for cache in self.caches:
            cache.truncate(0)
        return super().logits(turn)


def _extended(rope: Rope, window: int) -> Rope:
    """Rows for drafts behind the end of the picture, whose results nobody reads."""
    if not window:
        return rope
    cos, sin = (F.pad(t, (0, 0, 0, window)) for t in (rope.cos, rope.sin))
    return Rope(cos, sin, rope.interleaved)


class _Weights(NamedTuple):
    """What one layer multiplies by; norms as 1 + scale."""

    norm1: Tensor
    wqkv: Tensor | QuantizedWeight
    wo: Tensor | QuantizedWeight
    norm2: Tensor
    w1: Tensor | QuantizedWeight
    w3: Tensor | QuantizedWeight
    w2: Tensor | QuantizedWeight


class Decoder:
    """The layers of a model as a chain of operations, with its weights as they are now.

    Activations between the products are float32 whatever the weights' type; queries, keys and values have
    the input's.
    """

    def __init__(self, model: LlamaGen) -> None:
        self.head_dim, self.eps = model.width // model.heads, model.eps
        self.layers = [_weights(cast(Layer, layer)) for layer in model.layers]
        self.norm, self.output = norm_scale(model.norm), _matrix(model.output)
        self.shift = torch.zeros_like(self.norm)
        kind = type(self)
        plain = kind.hidden is Decoder.hidden and kind.head is Decoder.head
        self.direct = _Direct.of(self) if plain else None

    def run(self, x: Tensor, attend: Attend, dropout: float = 0.0) -> Tensor:
        """x [B, L, C] -> logits [B, L, V], float32."""
        if self.direct is not None and not dropout and self.direct.suits(x):
            return self.direct.run(x, attend)
        return self.head(self.hidden(drop(x.float(), dropout), x.dtype, attend, dropout))

    def hidden(
        self, h: Tensor, dtype: torch.dtype, attend: Attend, dropout: float = 0.0, start: int = 0,
        end: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Layers start .. end - 1 of h [B, L, C], float32. dtype: of queries, keys and values."""
        for i, w in enumerate(self.layers[start:end], start):
            n = ops.norm_modulate(h, w.norm1, self.shift, eps=self.eps, norm="rms")
            qkv = narrow_linear(n, w.wqkv).unflatten(-1, (-1, self.head_dim)).to(dtype)
            a = attend(i, qkv).transpose(1, 2).flatten(2).float()
            h = _add(h, a, w.wo, dropout)
            n = ops.norm_modulate(h, w.norm2, self.shift, eps=self.eps, norm="rms")
            h = _add(h, narrow_swiglu(n, w.w1, w.w3), w.w2, dropout)
        return h

    def head(self, h: Tensor) -> Tensor:
        """Norm and classifier."""
        return narrow_linear(self.normed(h, self.norm), self.output)

    def normed(self, h: Tensor, scale: Tensor) -> Tensor:
        return ops.norm_modulate(h, scale, self.shift, eps=self.eps, norm="rms")


class _Direct:
    """`Decoder.run` for a few tokens on the operators themselves.

    The checks of `arimg.ops` take longer than the norms of a step. Here those of the weights are made once;
    activations are of this class's own making.
    """

    def __init__(self, decoder: Decoder) -> None:
        def given(w: Tensor | QuantizedWeight) -> _Given:
            return (w.codes, w.scales, w.group) if isinstance(w, QuantizedWeight) else (w, None, w.shape[1])

        self.head_dim, self.eps, self.shift = decoder.head_dim, decoder.eps, decoder.shift
        self.layers = [
            (w.norm1, given(w.wqkv), given(w.wo), w.norm2, given(w.w1), given(w.w3), given(w.w2))
            for w in decoder.layers
        ]
        self.norm, self.output = decoder.norm, given(decoder.output)
        self.weights = [
            t for layer in (*self.layers, (self.norm, self.output)) for part in layer
            for t in (part if isinstance(part, tuple) else (part,)) if isinstance(t, Tensor)
        ]  # fmt: skip

    @classmethod
    def of(cls, decoder: Decoder) -> "_Direct | None":
        """None where weights are not as the operators read them."""
        direct = cls(decoder)
        plain = all(t.device == decoder.norm.device and t.stride(-1) == 1 for t in direct.weights)
        stored = {t.dtype for t in direct.weights} <= {*FLOATING, torch.int8, torch.uint8}
        return direct if plain and stored else None

    def suits(self, x: Tensor) -> bool:
        if x.numel() > MAX_ROWS * x.shape[-1] or x.device != self.norm.device or x.dtype not in FLOATING:
            return False
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return False
        return kernels(x, *(self.weights if torch.is_grad_enabled() else ())) is not None

    def run(self, x: Tensor, attend: Attend) -> Tensor:
        ops = kernels(x)
        assert ops is not None
        batch, tokens, width = x.shape
        rows = batch * tokens

        def norm(h: Tensor, scale: Tensor) -> Tensor:
            out: Tensor = ops.norm_modulate(h.view(1, rows, width), scale, self.shift, self.eps, True)
            return out.view(rows, width)

        def product(x: Tensor, w: _Given, h: Tensor | None = None) -> Tensor:
            out: Tensor = ops.linear_rows(x, w[0], w[1], None, None, None, None, h, 0, w[2])
            return out

        h = x.float().reshape(rows, width)
        for i, (norm1, wqkv, wo, norm2, w1, w3, w2) in enumerate(self.layers):
            qkv = product(norm(h, norm1), wqkv).view(batch, tokens, -1, self.head_dim).to(x.dtype)
            h = product(attend(i, qkv).transpose(1, 2).reshape(rows, -1).float(), wo, h)
            n = norm(h, norm2)
            gated = ops.linear_rows(n, w1[0], w1[1], None, w3[0], w3[1], None, None, _SILU, w1[2])
            h = product(gated, w2, h)
        return product(norm(h, self.norm), self.output).view(batch, tokens, -1)


def _weights(layer: Layer) -> _Weights:
    attention, ffn = layer.attention, layer.feed_forward
    return _Weights(
        norm_scale(layer.attention_norm), _matrix(attention.wqkv), _matrix(attention.wo),
        norm_scale(layer.ffn_norm), _matrix(ffn.w1), _matrix(ffn.w3), _matrix(ffn.w2),
    )  # fmt: skip


def _matrix(linear: nn.Module) -> Tensor | QuantizedWeight:
    """What a layer multiplies by; several heads, one below the other."""
    if isinstance(linear, nn.ModuleList):
        return torch.cat([cast(nn.Linear, head).weight for head in linear])
    return linear.packed if isinstance(linear, PackedLinear) else cast(nn.Linear, linear).weight


def norm_scale(norm: nn.RMSNorm) -> Tensor:
    """Its weight as the scale of `ops.norm_modulate`."""
    return (norm.weight.float() - 1)[None, None]


def drop(x: Tensor, rate: float) -> Tensor:
    return F.dropout(x, rate) if rate else x


def _add(h: Tensor, x: Tensor, weight: Tensor | QuantizedWeight, dropout: float) -> Tensor:
    """h + x weight^T, the end of a branch."""
    if not dropout:
        return narrow_linear(x, weight, h)
    return h + drop(narrow_linear(x, weight), dropout)
