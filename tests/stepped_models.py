"""Models whose rows a decoder steps, and the rule that its kernels are held to."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from mambacus.inference.decoder import Decoder
from mambacus.models import MambaConfig, MambaLM

CONFIG = MambaConfig(d_model=64, n_layer=3, vocab_size=257, dt_rank=8, d_state=16, tie_embeddings=False)


def wandering_model(config: MambaConfig = CONFIG, dtype: torch.dtype = torch.bfloat16, seed: int = 3) -> MambaLM:
    """A model whose greedy text wanders and that does not magnify rounding errors.

    Its matrices are of the deviation that keeps the size of what passes through. With larger ones a row now and then is
    wrong by its own size after a few steps, whichever way it is rounded, and its luck decides a comparison.
    """
    torch.manual_seed(seed)
    model = MambaLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" in name or "dt_proj.bias" in name:
                continue
            deviation = 0.1 if parameter.ndim == 1 else 1.0 if "embeddings" in name else parameter[0].numel() ** -0.5
            parameter += deviation * torch.randn_like(parameter)
    return model.eval().to(dtype)


@torch.inference_mode()
def errors(model: MambaLM, decoder: Decoder, rows: int, count: int = 5) -> tuple[Tensor, Tensor]:
    """Step decoder, model and model in float64 together over the float64 model's greedy text.

    Returns:
        The relative errors of the logits of the first two, float64 (count, rows) each.
    """
    exact_model = copy.deepcopy(model).double()
    exact_model.set_backend("reference")
    tokens = torch.arange(1, rows + 1, device=model.lm_head.weight.device)
    ids = torch.stack([tokens, tokens + 7], 1)
    state, exact = model(ids).state, exact_model(ids).state
    for row in range(rows):
        decoder.put(state.select([row]), row, 1)
    found = []
    for _ in range(count):
        got = decoder.step(tokens).clone()
        out, true = model(tokens[:, None], state=state), exact_model(tokens[:, None], state=exact)
        want = true.logits[:, 0]
        found.append([(y.double() - want).norm(dim=-1) / want.norm(dim=-1) for y in (got, out.logits[:, 0])])
        state, exact, tokens = out.state, true.state, want.argmax(-1)
    assert decoder.state(rows - 1).tokens.item() == 2 + count
    stepped, modules = (torch.stack(steps) for steps in zip(*found, strict=True))
    return stepped, modules


def hold_errors(stepped: Tensor, modules: Tensor, factor: float = 1.5) -> None:
    """Hold the errors of a decoder's step to those of the modules: over all rows and steps, and of the worst row."""
    rms, bound = (errors.square().mean().sqrt().item() for errors in (stepped, modules))
    assert rms <= factor * bound, (rms, bound)
    worst, at = stepped.max().item(), divmod(int(stepped.argmax()), stepped.shape[1])
    assert worst <= factor * modules.max().item(), (worst, modules.max().item(), at)
