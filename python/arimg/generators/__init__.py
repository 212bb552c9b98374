"""Models that write pictures token by token."""

from pathlib import Path

from arimg.generators.llamagen import LlamaGen
from arimg.generators.llamagen_text import Captions, TextLlamaGen
from arimg.generators.loop import ALWAYS, EachStep, Repeat, Sampler, Session, Turn, final_tokens, generate
from arimg.generators.speculative import BiasedGrouped, Draft, Grouped, Jacobi
from arimg.generators.var import VAR, Step
from arimg.nn import checkpoint
from arimg.nn.checkpoint import save
from arimg.tokenizers import VQVAE

__all__ = [
    "ALWAYS",
    "VAR",
    "BiasedGrouped",
    "Captions",
    "Draft",
    "EachStep",
    "Grouped",
    "Jacobi",
    "LlamaGen",
    "Repeat",
    "Sampler",
    "Session",
    "Step",
    "TextLlamaGen",
    "Turn",
    "final_tokens",
    "generate",
    "load",
    "save",
]


def load(path: str | Path, tokenizer: VQVAE) -> VAR:
    """Read a generator written by `save`, or a plain state dict of the released kind; in evaluation mode."""
    state, entry = checkpoint.read(path)
    if entry is None:
        return VAR.from_state_dict(state, tokenizer=tokenizer)
    if entry["kind"] != "VAR":
        raise ValueError(f"expected a generator in {str(path)!r}, got a {entry['kind']}")
    model = VAR(tokenizer, **entry["config"]).eval()
    checkpoint.load_checked(model, state, "VAR")
    return model
