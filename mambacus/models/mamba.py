"""Mamba, a language model of selective state spaces: the whole model, to be read from top to bottom.

Glossary (the symbols of Gu & Dao 2023, arXiv 2312.00752):
    batch, seqlen   rows and tokens of the input
    d_model         width of the residual stream
    d_inner         width of the scan, ``expand * d_model``
    d_state         numbers in the state of one channel (N)
    d_conv          taps of the causal convolution
    dt_rank         rank of the step projection
    x, z            scan input and gate, both from ``in_proj``            (batch, seqlen, d_inner)
    dt              low-rank step                                         (batch, seqlen, dt_rank)
    delta           step before softplus, ``dt_proj(dt)``                 (batch, seqlen, d_inner)
    A, D            decay rates ``-exp(A_log)`` and skip connection       (d_inner, d_state), (d_inner,)
    B, C            input and output matrix of each token                 (batch, seqlen, d_state)
    seq_idx         document of each token, negative for padding          (batch, seqlen)
    conv_state      last ``d_conv`` inputs of the convolution             (batch, d_inner, d_conv)
    ssm_state       state of the scan                                     (batch, d_inner, d_state)

Parameters are named as in transformers' ``MambaForCausalLM``. Every module is called and none reads another's weight,
so each can be wrapped by an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mambacus.models.config import MambaConfig
from mambacus.models.documents import IGNORE_INDEX, count_tokens, next_labels
from mambacus.models.state import MambaState
from mambacus.ops import (
    Linear,
    add_rms_norm,
    causal_conv1d,
    causal_conv1d_update,
    float32_output,
    halves,
    linear,
    linear_cross_entropy,
    remade,
    rms_norm,
    selective_scan,
    selective_state_update,
    twins,
)
from mambacus.ops.dispatch import tells_changes


class MambaOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        loss: mean cross entropy of the labelled tokens, float32 (), or None without labels.
        logits: float32 (batch, seqlen, padded vocabulary); (batch, k, ...) with ``logits_at``; None with ``loss_only``.
        state: the state after the last real token of each row.
    """

    loss: Tensor | None
    logits: Tensor | None
    state: MambaState


class _KeepsFloat32(nn.Module):
    """Base of modules with parameters that stay float32 when the model is cast to a lower precision."""

    float32_parameters: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        parameters = [self._parameters.get(name) for name in self.float32_parameters]
        kept = [t for p in parameters if p is not None for t in (p, p.grad)]

        def cast(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            lowered = out.dtype.itemsize < 4 and any(tensor is t for t in kept)
            return tensor.to(out.device, torch.float32) if lowered else out

        return super()._apply(cast, recurse)


def keeps_float32(name: str) -> bool:
    """Return whether the parameter ``name`` is at least float32 in a model of any dtype."""
    return name.endswith((".A_log", ".D", ".dt_proj.bias"))


class RMSNorm(nn.Module):
    """``weight * x / sqrt(mean(x^2) + eps)``, computed in float32, given in the dtype of the weight or of autocast."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Normalise ``x`` (..., d_model), or ``x + added``; return it with what was normalised."""
        if added is None:
            return rms_norm(x, self.weight, self.eps), x
        return add_rms_norm(x, added, self.weight, self.eps)


class Embedding(nn.Embedding):
    """``nn.Embedding`` that draws nothing where there is no memory to draw into."""

    def reset_parameters(self) -> None:
        """Draw normal numbers, but not on the meta device: torch would import its compiler for that, in seconds."""
        if not self.weight.is_meta:
            super().reset_parameters()


class CausalConv1d(nn.Conv1d):
    """One causal filter of ``d_conv`` taps a channel, followed by SiLU; section 3.4 of the paper."""

    def __init__(self, d_inner: int, d_conv: int, bias: bool) -> None:
        super().__init__(d_inner, d_inner, d_conv, groups=d_inner, padding=d_conv - 1, bias=bias)
        self.backend = "auto"

    def forward(  # type: ignore[override]  # (batch, seqlen, d_inner), the layout of the linear layers beside it
        self, x: Tensor, seq_idx: Tensor | None = None, conv_state: Tensor | None = None, reuse_state: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Filter ``x`` (batch, seqlen, d_inner); return it with the new conv_state."""
        taps = self.weight.squeeze(1)  # (d_inner, d_conv)
        if conv_state is not None and seq_idx is None and x.shape[1] == 1:
            y, conv_state = causal_conv1d_update(
                x.squeeze(1), conv_state, taps, self.bias, out=conv_state if reuse_state else None, backend=self.backend
            )
            return y.unsqueeze(1), conv_state
        return causal_conv1d(x, taps, self.bias, seq_idx=seq_idx, initial_state=conv_state, backend=self.backend)


class StepProjection(_KeepsFloat32, Linear):
    """``dt_proj``: lifts the low-rank step to all channels; its bias, the typical step, stays float32."""

    float32_parameters = ("bias",)

    def forward(self, dt: Tensor, later: bool = False) -> Any:
        """Map ``dt`` (..., dt_rank) to delta (..., d_inner), float32 if the bias is.

        With ``later``, return delta without the bias, in the dtype of the product, and the bias: for a scan that adds
        it in float32 itself, so that delta is neither widened nor written twice.
        """
        if later:
            return linear(dt, self.weight), self.bias
        if dt.dtype == self.weight.dtype == self.bias.dtype:
            return super().forward(dt)
        return linear(dt, self.weight) + self.bias


class MambaMixer(_KeepsFloat32):
    """The selective state space of one block: figure 3 and algorithm 2 of the paper."""

    float32_parameters = ("A_log", "D")

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        d_inner, d_state = config.d_inner, config.d_state
        self.split = (config.dt_rank, d_state, d_state)
        self.backend = "auto"
        self.in_proj = Linear(config.d_model, 2 * d_inner, bias=config.use_bias)
        self.conv1d = CausalConv1d(d_inner, config.d_conv, bias=config.use_conv_bias)
        self.x_proj = Linear(d_inner, sum(self.split), bias=False)
        self.dt_proj = StepProjection(config.dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.empty(d_inner, d_state))
        self.D = nn.Parameter(torch.empty(d_inner))
        self.out_proj = Linear(d_inner, config.d_model, bias=config.use_bias)
        self.offset: nn.Module | None = None  # an adapter: what it gives for C and z is added to the gated output
        self.recomputes = False  # filter x again for the backward pass, where only the scan would keep it
        self._decay: tuple[Tensor, tuple[int, int], Tensor] | None = None  # A_log, where and which version, A

    def forward(
        self,
        hidden: Tensor,
        seq_idx: Tensor | None,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        reuse_state: bool = False,
        at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix the tokens of ``hidden`` (batch, seqlen, d_model); return it with the new conv_state and ssm_state.

        With ``at``, int64 (batch, k), the output is that of these positions alone.
        """
        x, z = halves(self.in_proj(hidden))  # (batch, seqlen, d_inner) each
        filtering = (x, seq_idx, conv_state)
        x, conv_state = self.conv1d(*filtering, reuse_state)
        x, twin = twins(x)  # one for the scan, one for the projection
        dt, B, C = self.x_proj(twin).split(self.split, dim=-1)
        # The scan adds the bias, unless delta is float32 for its gradient or an adapter's layer gives the whole step.
        later = (dt.is_cuda or not torch.is_grad_enabled()) and isinstance(self.dt_proj, StepProjection)
        delta, bias = self.dt_proj(dt, later=True) if later else (self.dt_proj(dt), None)  # (batch, seqlen, d_inner)
        A = self.decay()  # (d_inner, d_state)
        if ssm_state is not None and seq_idx is None and x.shape[1] == 1:
            x, delta, B, C, z = (tensor.squeeze(1) for tensor in (x, delta, B, C, z))  # (batch, ...)
            out = ssm_state if reuse_state else None
            y, ssm_state = selective_state_update(
                ssm_state, x, delta, A, B, C, self.D, z, delta_bias=bias, out=out, backend=self.backend
            )
            y = y.unsqueeze(1)
        else:
            with remade(x, lambda: self.conv1d(*filtering)[0]) if self.recomputes and x.is_cuda else nullcontext():
                y, ssm_state = selective_scan(
                    x, delta, A, B, C, self.D, z, delta_bias=bias, seq_idx=seq_idx, initial_state=ssm_state,
                    backend=self.backend,
                )  # fmt: skip
        if self.offset is not None:
            y = y + self.offset(C, z).view_as(y)
        return self.out_proj(taken(y, at)), conv_state, ssm_state  # (batch, seqlen or k, d_model)

    def decay(self) -> Tensor:
        """Return A = -exp(A_log); where no gradient is wanted, it is kept until A_log changes."""
        A_log = self.A_log
        if not tells_changes(A_log):
            return -torch.exp(A_log)
        source = (A_log.data_ptr(), A_log._version)
        if self._decay is None or self._decay[0] is not A_log or self._decay[1] != source:
            self._decay = (A_log, source, -torch.exp(A_log))
        return self._decay[2]

    @torch.no_grad()
    def init_weights(self, config: MambaConfig) -> None:
        """Draw fresh parameters; the steps are spread over ``dt_min`` to ``dt_max``, section 3.6 of the paper."""
        for module in (self.in_proj, self.conv1d, self.x_proj, self.out_proj):
            module.reset_parameters()
        for projection in (self.in_proj, self.out_proj):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        if config.rescale_prenorm_residual:
            self.out_proj.weight /= math.sqrt(config.n_layer)
        self.A_log.copy_(torch.log(torch.arange(1, config.d_state + 1)).expand_as(self.A_log))  # S4D-Real
        nn.init.ones_(self.D)
        bound = config.dt_scale * config.dt_rank**-0.5
        if config.dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        log_min, log_max = math.log(config.dt_min), math.log(config.dt_max)
        step = torch.empty_like(self.D).uniform_(log_min, log_max).exp().clamp(min=config.dt_init_floor)
        self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


def taken(tensor: Tensor, at: Tensor | None = None) -> Tensor:
    """Return positions ``at``, int64 (batch, k), of a tensor (batch, seqlen, width); all of it if None."""
    return tensor if at is None else tensor.gather(1, at[..., None].expand(-1, -1, tensor.shape[-1]))


class Block(nn.Module):
    """``mixer(norm(residual + mixed))``, ``mixed`` being the output of the block before."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MambaMixer(config)

    def forward(
        self,
        residual: Tensor,
        mixed: Tensor | None,
        seq_idx: Tensor | None,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
        reuse_state: bool = False,
        *at: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Add ``mixed`` to ``residual`` (batch, seqlen, d_model) and read it; return positions ``at`` alone if given.

        Returns:
            The residual stream, what this block adds to it (the next norm does), and the new conv_state and ssm_state.
        """
        normed, residual = self.norm(residual, mixed)  # (batch, seqlen, d_model) each
        mixed, conv_state, ssm_state = self.mixer(normed, seq_idx, conv_state, ssm_state, reuse_state, *at)
        return taken(residual, *at), mixed, conv_state, ssm_state


class Backbone(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.embeddings = Embedding(config.padded_vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self,
        input_ids: Tensor,
        seq_idx: Tensor | None,
        state: MambaState | None,
        checkpointing: bool,
        reuse_state: bool = False,
        logits_at: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the normed hidden states (batch, seqlen, d_model) and the stacked conv_state and ssm_state.

        With ``logits_at``, int64 (batch, k), those of these positions; of others the last block makes only its state.
        """
        residual = self.embeddings(input_ids)  # (batch, seqlen, d_model)
        if self.residual_in_fp32:
            residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
        mixed = None
        in_place = reuse_state and seq_idx is None and input_ids.shape[1] == 1  # each block writes its own state
        conv_states, ssm_states = [], []
        for index, block in enumerate(self.layers):
            before = (None, None) if state is None else (state.conv_state[index], state.ssm_state[index])
            at = () if logits_at is None or index < len(self.layers) - 1 else (logits_at,)
            if checkpointing:
                residual, mixed, conv_state, ssm_state = checkpoint(
                    block, residual, mixed, seq_idx, *before, False, *at, use_reentrant=False
                )
            else:
                residual, mixed, conv_state, ssm_state = block(residual, mixed, seq_idx, *before, in_place, *at)
            conv_states.append(conv_state)
            ssm_states.append(ssm_state)
        hidden, _ = self.norm_f(residual, mixed)
        if not reuse_state or state is None:
            return hidden, torch.stack(conv_states), torch.stack(ssm_states)
        if not in_place:
            torch.stack(conv_states, out=state.conv_state)
            torch.stack(ssm_states, out=state.ssm_state)
        return hidden, state.conv_state, state.ssm_state


class MambaLM(nn.Module):
    """A Mamba language model: backbone and output head.

    Args:
        config: shape and initialisation.
        backend: backend of the ops: ``auto``, ``reference``, ``cpu`` or ``triton``.

    Attributes:
        config: as given.
        gradient_checkpointing: recompute each block in the backward pass, which then holds the activations of one block
            and the residual stream of all, at the cost of a second forward pass.
        fixed_shapes: compute the loss at all positions, so that no shape depends on the labels, as recording needs.
        name_or_path: where the weights came from; adapters record it as their base.
        adapter: which adapter of `mambacus.models.ssm_adapters` sits on the model, None for none.
        beginning: that adapter's learned state of a document's beginning, None for zeros.
        quantisation: what `mambacus.models.quantised` did to the weights, None for nothing.
    """

    _tied_weights_keys = {"lm_head.weight": "backbone.embeddings.weight"}  # noqa: RUF012 -- read by PEFT

    def __init__(self, config: MambaConfig, backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.fixed_shapes = False
        self.name_or_path = ""
        self.adapter: Any = None
        self.beginning: Any = None
        self.quantisation: Any = None
        self.backbone = Backbone(config)
        self.lm_head = Linear(config.d_model, config.padded_vocab_size, bias=False)
        self.tie_weights()
        self.set_backend(backend)
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    def tie_weights(self) -> None:
        """Make the output head the embedding matrix, if the config says so."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight

    def set_backend(self, backend: str) -> None:
        """Choose the backend of every op: ``auto``, ``reference``, ``cpu`` or ``triton``."""
        for module in self.modules():
            if isinstance(module, (CausalConv1d, MambaMixer)):
                module.backend = backend

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh parameters from torch's global generator, as the original code does."""
        nn.init.normal_(self.backbone.embeddings.weight, std=self.config.initializer_range)
        if not self.config.tie_embeddings:
            self.lm_head.reset_parameters()
        for module in self.modules():
            if isinstance(module, MambaMixer):
                module.init_weights(self.config)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.backbone.norm_f.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights, apart from ``A_log``, ``D`` and ``dt_proj.bias`` which are at least float32."""
        return self.backbone.norm_f.weight.dtype

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding module (the name PEFT calls)."""
        return self.backbone.embeddings

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head (the name PEFT calls)."""
        return self.lm_head

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Refuse: PEFT wants this method to exist; generation is `mambacus.inference.Engine`."""
        raise NotImplementedError("use mambacus.inference.Engine to generate")

    def forward(
        self,
        input_ids: Tensor,
        seq_idx: Tensor | None = None,
        state: MambaState | None = None,
        labels: Tensor | None = None,
        logits_at: Tensor | None = None,
        *,
        loss_only: bool = False,
        reuse_state: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **foreign: None,
    ) -> MambaOutput:
        """Read tokens, from the start of a document or from a state.

        Args:
            input_ids: int64 (batch, seqlen), seqlen >= 1.
            seq_idx: document of each token, int32 (batch, seqlen): equal consecutive ids >= 0 are one document, and
                nothing flows from one document to the next; negative ids are padding at the ends of a row, which
                influences nothing. None: each row is one document.
            state: goes on from here: the row's first real token continues the document that the state has read.
            labels: int64 (batch, seqlen), as ``input_ids``; shifted inside: position t is scored on label t + 1. Not
                scored are -100, the first token of a document, and padding.
            logits_at: int64 (batch, k), positions whose logits are wanted; all if None. Excludes ``labels``.
            loss_only: compute logits only where there is a label, and do not return them.
            reuse_state: ``state`` is needed no more: where no gradients are wanted, the new state takes its memory,
                which saves decoding a copy of all states at every token.
            num_items_in_batch: divide the summed loss by this number of tokens instead of their number here: the name
                under which transformers' Trainer passes the count over all accumulated batches.
            foreign: arguments of other models that PEFT passes as None.

        Returns:
            `MambaOutput`; ``state`` carries gradients.

        Raises:
            ValueError: a shape does not fit, or arguments exclude each other.
            TypeError: an unknown argument is not None.
        """
        unknown = [name for name, value in foreign.items() if value is not None]
        if unknown:
            raise TypeError(f"MambaLM.forward: unknown argument {', '.join(unknown)}; masks are expressed by seq_idx")
        self._check(input_ids, seq_idx, state, labels, logits_at)
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        reuse_state = reuse_state and state is not None and not torch.is_grad_enabled()
        hidden, conv_state, ssm_state = self.backbone(input_ids, seq_idx, state, checkpointing, reuse_state, logits_at)
        new_state = MambaState(conv_state, ssm_state, count_tokens(input_ids, seq_idx, state))
        if labels is None:
            return MambaOutput(None, self._logits(hidden), new_state)
        targets = next_labels(labels, seq_idx)  # (batch, seqlen)
        if loss_only:
            loss, logits = self._loss(hidden, targets), None
        else:
            logits = self._logits(hidden)
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
        count = (targets != IGNORE_INDEX).sum() if num_items_in_batch is None else num_items_in_batch
        return MambaOutput(loss / count, logits, new_state)

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the summed cross entropy of ``targets`` (batch, seqlen) given ``hidden`` (batch, seqlen, d_model)."""
        if self.fixed_shapes or (hidden.is_cuda and torch.cuda.is_current_stream_capturing()):
            rows, wanted = hidden.flatten(0, 1), targets.flatten()
        else:
            labelled = targets != IGNORE_INDEX
            rows, wanted = hidden[labelled], targets[labelled]  # (labelled, d_model), (labelled,)
        if hidden.is_cuda and type(self.lm_head) is Linear:  # an adapter's layer gives all logits
            return linear_cross_entropy(rows, self.lm_head.weight, wanted)
        return F.cross_entropy(self._logits(rows), wanted, ignore_index=IGNORE_INDEX, reduction="sum")

    def _logits(self, hidden: Tensor) -> Tensor:
        return float32_output(self.lm_head, hidden, self.config.padded_vocab_size)

    def _check(
        self,
        input_ids: Tensor,
        seq_idx: Tensor | None,
        state: MambaState | None,
        labels: Tensor | None,
        logits_at: Tensor | None,
    ) -> None:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids: expected shape (batch, seqlen >= 1), got {tuple(input_ids.shape)}")
        for name, tensor in (("seq_idx", seq_idx), ("labels", labels)):
            if tensor is not None and tensor.shape != input_ids.shape:
                raise ValueError(f"{name}: expected shape {tuple(input_ids.shape)}, got {tuple(tensor.shape)}")
        if labels is not None and logits_at is not None:
            raise ValueError("labels and logits_at exclude each other: the loss needs the logits of all labels")
        if logits_at is not None and (logits_at.dim() != 2 or len(logits_at) != len(input_ids)):
            raise ValueError(f"logits_at: expected shape ({len(input_ids)}, k), got {tuple(logits_at.shape)}")
        if state is not None:
            misfit = state.fits(self.config)
            if misfit or state.batch != len(input_ids):
                raise ValueError(f"state: {misfit or f'expected {len(input_ids)} rows, got {state.batch}'}")
