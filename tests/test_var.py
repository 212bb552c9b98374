"""VAR: released names and shapes, teacher forcing against cached generation, determinism, error messages."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import released
from arimg import generators, tokenizers
from arimg.generators import VAR
from arimg.generators.var import VarSession
from arimg.guidance import BeyondConditional, Guidance, linear
from arimg.tokenizers import SCALES_256, SCALES_512, VQVAE

SCALES = (1, 2, 3, 4)


def tokenizer(scales: tuple = SCALES) -> VQVAE:
    torch.manual_seed(0)
    tok = VQVAE(vocab_size=48, z_channels=8, ch=16, ch_mult=(1, 2), scales=scales, blocks=1).eval()
    torch.nn.init.normal_(tok.quantize.embedding.weight)
    return tok


def model(tok: VQVAE | None = None, *, shared: bool = False, l2: bool = True, depth: int = 2) -> VAR:
    """A small model at which every part matters: the released recipe starts with logits and gates near 0."""
    tok = tok or tokenizer()
    var = VAR(tok, num_classes=5, depth=depth, width=32, heads=4, shared_adaln=shared, attn_l2_norm=l2).eval()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in var.named_parameters():
            if "scale_mul" in name:
                p.uniform_(0, 6, generator=g)  # beyond the cap of log(100)
            elif p.dim() == 2:
                p.normal_(std=1.5 * p.shape[1] ** -0.5, generator=g)
            else:
                p.normal_(std=0.3, generator=g)
    return var


def tokens(var: VAR, batch: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(var.tokenizer.vocab_size, (batch, n), generator=g) for n in var.layout.sizes]


def constants(var: VAR) -> dict[str, Tensor]:
    """Buffers that released checkpoints hold besides."""
    level = var.layout.level()
    mask = torch.where(level[:, None] >= level, 0.0, -torch.inf)
    zeros = {f"blocks.{i}.attn.zero_k_bias": torch.zeros(var.width) for i in range(var.depth)}
    return {"lvl_1L": level[None], "attn_bias_for_masking": mask[None, None], **zeros}


@pytest.mark.parametrize(("depth", "shared", "l2"), [(16, False, True), (36, True, True), (20, False, False)])
@pytest.mark.parametrize(("scales", "length"), [(SCALES_256, 680), (SCALES_512, 2240)])
def test_names_and_shapes_are_the_released_ones(
    depth: int, shared: bool, l2: bool, scales: tuple, length: int
) -> None:
    with torch.device("meta"):
        var = VAR(VQVAE(scales=scales), depth=depth, shared_adaln=shared, attn_l2_norm=l2)
    assert released.shapes_of(var) == released.var(depth, shared, l2, length)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("l2", [False, True])
def test_from_state_dict_reads_the_sizes(shared: bool, l2: bool) -> None:
    var = model(shared=shared, l2=l2)
    state = var.state_dict() | constants(var)
    twin = VAR.from_state_dict(state, tokenizer=var.tokenizer, heads=None if l2 else 4)
    assert twin.config() == var.config() and not twin.training
    assert all(torch.equal(a, b) for a, b in zip(twin.state_dict().values(), var.state_dict().values()))
    var.load_state_dict(state, strict=True)


def test_512_px_checkpoint_gives_the_tokenizer_its_schedule() -> None:
    tok = tokenizer(SCALES_256)
    state = model(tokenizer(SCALES_512), depth=1).state_dict()
    var = VAR.from_state_dict(state, tokenizer=tok)
    assert var.layout.length == 2240 and var.tokenizer.image_size == (64, 64)
    assert var.tokenizer.decoder is tok.decoder and tok.image_size == (32, 32)


@pytest.mark.parametrize("scales", [SCALES, SCALES_256, SCALES_512, (1, (1, 2), (3, 4))])
@pytest.mark.parametrize(("shared", "l2"), [(False, True), (True, False)])
def test_masked_logits_equal_cached_logits(scales: tuple, shared: bool, l2: bool) -> None:
    var = model(tokenizer(scales), shared=shared, l2=l2)
    labels, indices = torch.tensor([2, -1]), tokens(var, 2)
    with torch.no_grad():
        masked = var(labels, var.tokenizer.quantize.generator_input(indices))
    cached = torch.cat([step.logits[:2] for step in var.stream(labels, given=indices)], dim=1)
    assert masked.std() > 0.5
    assert torch.allclose(masked, cached, atol=1e-5 * masked.abs().max().item(), rtol=0)
    # the unconditional half is the row without a class
    uncond = torch.cat([step.logits[2:] for step in var.stream(labels, given=indices)], dim=1)
    assert torch.allclose(uncond[1], cached[1], atol=1e-5 * masked.abs().max().item(), rtol=0)


def test_logits_follow_the_block_formula() -> None:
    """One block in float64, written out: AdaLN, scaled cosine attention, GELU, the norm before the head."""
    var = model(depth=1)
    x = var.tokenizer.quantize.generator_input(tokens(var, 1))
    with torch.no_grad():
        got = var(torch.tensor([4]), x)
        var, x = var.double(), x.double()
        block, c = var.blocks[0], var.class_emb.weight[4]
        h = torch.cat((c + var.pos_start[0], var.word_embed(x[0])))
        h = h + var.pos_1LC[0] + var.lvl_embed.weight[var.layout.level()]
        g1, g2, s1, s2, b1, b2 = block.ada_lin(c).view(6, -1)

        def normed(t: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
            centred = t - t.mean(-1, keepdim=True)
            return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

        a, out = block.attn, []
        qkv = normed(h, s1, b1) @ a.mat_qkv.weight.T
        q, k, v = (t.view(-1, 4, 8).transpose(0, 1) for t in qkv.chunk(3, dim=-1))
        q, v = q + a.q_bias.view(4, 1, 8), v + a.v_bias.view(4, 1, 8)
        level = var.layout.level()
        for i in range(4):
            cosine = (q[i] / q[i].norm(dim=-1, keepdim=True)) @ (k[i] / k[i].norm(dim=-1, keepdim=True)).T
            score = cosine * min(math.exp(a.scale_mul_1H11[0, i, 0, 0]), 100)
            out.append(score.masked_fill(level[:, None] < level, -torch.inf).softmax(-1) @ v[i])
        h = h + g1 * a.proj(torch.cat(out, dim=-1))
        h = h + g2 * block.ffn(normed(h, s2, b2))
        scale, shift = var.head_nm.ada_lin(c).chunk(2)
        assert torch.allclose(got[0], var.head(normed(h, scale, shift)).float(), atol=2e-5)


def test_softmax_scale_without_l2_norm() -> None:
    assert model(l2=False).blocks[0].attn.softmax_scale == 0.25 / math.sqrt(8)
    assert model(l2=True).blocks[0].attn.softmax_scale == 1.0


def test_later_levels_do_not_reach_earlier_ones() -> None:
    var = model()
    indices = tokens(var, 2)
    x = var.tokenizer.quantize.generator_input(indices)
    labels, first = torch.tensor([0, 1]), var.layout.sizes[0]
    with torch.no_grad():
        base = var(labels, x)
        for start, end in var.layout.segments[1:]:
            changed = x.clone()
            changed[:, start - first : end - first] += torch.randn(2, end - start, 8)
            got = var(labels, changed)
            assert torch.equal(got[:, :start], base[:, :start])
            assert not torch.equal(got[:, start:end], base[:, start:end])


@pytest.mark.parametrize("given", [0, 2])
def test_f_hat_of_the_indices_is_the_running_one(given: int) -> None:
    var = model()
    kept = tokens(var, 2)[:given]
    steps = list(var.stream([1, 4], seed=8, given=kept))
    assert [s.scale for s in steps] == list(var.layout.shapes)
    for k, step in enumerate(steps):
        f_hat = var.tokenizer.quantize.features([s.indices for s in steps[: k + 1]])
        assert torch.equal(step.f_hat, f_hat)
        assert k >= given or torch.equal(step.indices, kept[k])
    assert torch.equal(steps[1].image, var.tokenizer.decode([s.indices for s in steps[:2]]))
    assert torch.equal(steps[-1].image, var.generate([1, 4], seed=8, given=kept))


def drawn(var: VAR, labels: list[int], seed: int | Tensor, **options: float) -> Tensor:
    return torch.cat([s.indices for s in var.stream(labels, seed=seed, **options)], dim=1)


def test_a_row_does_not_depend_on_its_batch() -> None:
    var = model()
    together = drawn(var, [0, 3, -1], seed=20)
    pictures = var.generate([0, 3, -1], seed=20)
    for row, label in enumerate([0, 3, -1]):
        assert torch.equal(drawn(var, [label], seed=20 + row)[0], together[row])
        assert torch.allclose(var.generate(label, seed=20 + row)[0], pictures[row], atol=1e-5)
    seeds = torch.tensor([22, 20, 5])
    assert torch.equal(drawn(var, [-1, 0, 2], seed=seeds)[:2], together[[2, 0]])


def test_the_seed_decides() -> None:
    var = model()
    first = drawn(var, [1, 1], seed=4)
    assert torch.equal(drawn(var, [1, 1], seed=4), first)
    assert not torch.equal(first[0], first[1]) and not torch.equal(drawn(var, [1, 1], seed=40), first)
    image = var.generate([1, 1], seed=4, more_smooth=True)
    assert torch.equal(image, var.generate([1, 1], seed=4, more_smooth=True))
    assert image.shape == (2, 3, 8, 8) and image.min() >= 0 and image.max() <= 1
    assert not torch.allclose(image, var.generate([1, 1], seed=4), atol=1e-3)


def test_guidance_ramp_and_filters() -> None:
    ramp = Guidance(1.5, linear, BeyondConditional())
    assert [ramp.scale(k, 4) for k in range(4)] == [1.0, 1.5, 2.0, 2.5]
    assert ramp.scale(0, 1) == 1.0
    var = model()
    greedy = list(var.stream([2], cfg=3.0, top_k=1))
    for k, step in enumerate(greedy):
        cond, uncond = step.logits.chunk(2)
        t = 3.0 * k / 3
        assert torch.equal(step.indices, ((1 + t) * cond - t * uncond).argmax(-1))
    plain = list(var.stream([2], cfg=0.0, top_k=1))
    assert plain[0].logits.shape[0] == 1  # without guidance there is no second half
    assert torch.equal(plain[0].indices, greedy[0].indices)


def test_same_tokens_after_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    var = model(tokenizer((1, 2)), depth=1)
    expected = drawn(var, [1, 3], seed=4)
    step = torch.compile(VarSession.logits, dynamic=False)
    monkeypatch.setattr(VarSession, "logits", step)
    torch._dynamo.utils.counters.clear()
    assert torch.equal(drawn(var, [1, 3], seed=4), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # it was compiled, one graph per scale
    assert not torch._dynamo.utils.counters["graph_break"]


def test_training_forward_drops_classes_and_reaches_every_weight() -> None:
    var = model(shared=True).train()
    indices = tokens(var, 4)
    x = var.tokenizer.quantize.generator_input(indices)
    logits = var(torch.tensor([0, 1, 2, -1]), x)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.cat(indices, 1).flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in var.parameters())
    var.class_dropout = 1.0
    with torch.no_grad():
        dropped = var(torch.tensor([0, 1, 2, 3]), x)
        var.eval()
        assert torch.equal(dropped, var(torch.full((4,), -1), x))


def test_initialisation_is_the_released_recipe() -> None:
    torch.manual_seed(0)
    var = VAR(tokenizer(), depth=4)
    std = (1 / 256 / 3) ** 0.5
    block = var.blocks[1]
    expected = {
        var.pos_1LC: 1.0,
        var.class_emb.weight: 1.0,
        var.head.weight: 0.02,
        block.attn.mat_qkv.weight: 1.0,
        block.attn.proj.weight: 8**-0.5,
        block.ffn.fc2.weight: 8**-0.5,
        block.ada_lin[1].weight[:512]: 1e-5,
        block.ada_lin[1].weight[512:]: 0.5,
        var.head_nm.ada_lin[1].weight: 0.5,
    }
    for p, factor in expected.items():
        assert math.isclose(p.std().item(), std * factor, rel_tol=0.1)
    assert block.attn.scale_mul_1H11.exp().allclose(torch.tensor(4.0))
    assert not any(p.any() for name, p in var.named_parameters() if name.endswith("bias"))


def test_files(tmp_path: Path) -> None:
    var = model(shared=True)
    generators.save(var, tmp_path / "var.safetensors")
    twin = generators.load(tmp_path / "var.safetensors", var.tokenizer)
    assert twin.config() == var.config()
    assert torch.equal(twin.generate([1], seed=2), var.generate([1], seed=2))
    with pytest.raises(ValueError, match=r"expected a tokenizer in .*, got a VAR"):
        tokenizers.load(tmp_path / "var.safetensors")


def test_errors_name_what_is_wrong() -> None:
    var = model()
    with pytest.raises(ValueError, match=r"expected labels from 0 to 4, or -1 for no class, got 9"):
        var.generate([0, 9])
    with pytest.raises(TypeError, match=r"expected integer labels, got torch.float32"):
        var.generate(torch.tensor([0.5]))
    with pytest.raises(ValueError, match=r"expected labels \[B\] with B > 0"):
        var.generate(torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match=r"expected x \[B, 29, 8\], got \[2, 30, 8\]"):
        var(torch.tensor([0, 0]), torch.zeros(2, 30, 8))
    with pytest.raises(ValueError, match=r"expected given tokens \[1, 1\], got \[1, 4\]"):
        var.generate([0], given=[torch.zeros(1, 4).long()])
    with pytest.raises(ValueError, match=r"expected a width that 3 heads divide, got 64"):
        VAR(var.tokenizer, width=64, heads=3, depth=1)
    state, tok = var.state_dict(), var.tokenizer
    with pytest.raises(ValueError, match=r"without 'class_emb.weight'"):
        VAR.from_state_dict(tok.state_dict(), tokenizer=tok)
    with pytest.raises(ValueError, match=r"'lvl_embed.weight' with 3 rows"):
        VAR.from_state_dict(state, tokenizer=tokenizer((1, 2, 4)))
    with pytest.raises(ValueError, match=r"'pos_1LC' with 31 tokens"):
        VAR.from_state_dict(state, tokenizer=tokenizer((1, 1, 2, 5)))
    with pytest.raises(ValueError, match=r"head.weight: expected \[48, 32\], got \[47, 32\]"):
        VAR.from_state_dict(state | {"head.weight": torch.zeros(47, 32)}, tokenizer=tok)
