"""The weight-space methods of ``peft`` by name, each with its own configuration keys; PEFT's pages name the papers.

Left out, though PEFT has them for linear layers: AdaLoRA (its loss term and its rank schedule need PEFT's own output
type and loop), GLoRA (takes no subclass of ``nn.Linear``), Poly and X-LoRA (need a task or a router), Lily and BEFT (no
merge), OSF (projects gradients by hooks on tensors, which sharding replaces), FRoD (decomposes all layers' weights
together; not tried at size) and PVeRA (draws in every pass; its loss was noise in the test that each method passes).
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mambacus.models.mamba import CausalConv1d, MambaLM
from mambacus.runtime.errors import UserError, suggest
from mambacus.tuning.targets import resolve_targets

INIT_TENSORS = "mambacus_initial_lora"
_MATRIX = re.compile(r"\.lora_[AB]\.weight$")
_STARTS = ("gaussian", "orthogonal", "mica")  # besides true and false; the base weights stay as they are
_MOVING = {"pissa": "pissa[_niter_N]", "olora": "olora"}
_PREPARED = ("eva", "corda", "lora_ga", "loftq")


@dataclasses.dataclass(frozen=True)
class PeftMethod:
    """One method of ``peft``.

    Attributes:
        peft_type: PEFT's name of it, as in ``adapter_config.json``.
        keys: what it sets in PEFT's configuration.
        kinds: modules it can go on.
        quiet_first: parts of tensor names whose gradient is zero at the first step by construction.
        moves_base: it starts by taking a part out of the base weights (PiSSA); saved as the difference.
    """

    peft_type: str
    keys: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kinds: tuple[type[nn.Module], ...] = (nn.Linear,)
    quiet_first: tuple[str, ...] = ()
    moves_base: bool = False


_EVERYWHERE = (nn.Linear, nn.Embedding, CausalConv1d)
_A = (".lora_A.", ".lora_embedding_B.")

PEFT_METHODS: dict[str, PeftMethod] = {
    "lora": PeftMethod("LORA", {}, _EVERYWHERE, _A),
    "lora+": PeftMethod("LORA", {}, _EVERYWHERE, _A),
    "rslora": PeftMethod("LORA", {"use_rslora": True}, _EVERYWHERE, _A),
    "dora": PeftMethod("LORA", {"use_dora": True}, (nn.Linear, nn.Embedding), _A),
    "pissa": PeftMethod("LORA", {"init_lora_weights": "pissa"}, moves_base=True),
    "olora": PeftMethod("LORA", {"init_lora_weights": "olora"}, moves_base=True),
    "loha": PeftMethod("LOHA", quiet_first=(".hada_w1_", ".hada_w2_a")),
    "lokr": PeftMethod("LOKR", quiet_first=(".lokr_w2",)),
    "oft": PeftMethod("OFT"),
    "boft": PeftMethod("BOFT"),
    "ia3": PeftMethod("IA3", {"feedforward_modules": []}),
    "vera": PeftMethod("VERA", quiet_first=(".vera_lambda_d",)),
    "fourierft": PeftMethod("FOURIERFT"),
    "hra": PeftMethod("HRA"),
    "shira": PeftMethod("SHIRA"),
    "c3a": PeftMethod("C3A"),
    "road": PeftMethod("ROAD"),
    "waveft": PeftMethod("WAVEFT"),
    "randlora": PeftMethod("RANDLORA", quiet_first=(".randlora_gamma",)),
    "miss": PeftMethod("MISS"),
    "delora": PeftMethod("DELORA", quiet_first=(".delora_lambda", ".delora_A")),
    "gralora": PeftMethod("GRALORA", quiet_first=(".gralora_A",)),
    "hira": PeftMethod("HIRA", quiet_first=(".hira_A",)),
    "psoft": PeftMethod("PSOFT"),
    "vblora": PeftMethod("VBLORA"),
    "peanut": PeftMethod("PEANUT", quiet_first=(".peanut_A",)),
    "adamss": PeftMethod("ADAMSS", quiet_first=(".adamss_A",)),
    "deft": PeftMethod("DEFT"),
    "tinylora": PeftMethod("TINYLORA"),
    "unilora": PeftMethod("UNILORA"),
    "supertuning": PeftMethod("SUPERTUNING"),
}


def attach_peft(model: MambaLM, method: PeftMethod, targets: tuple[str, ...], keys: Mapping[str, Any]) -> nn.Module:
    """Wrap ``model`` with one of PEFT's methods on the target modules; everything else is frozen.

    Args:
        model: a plain model.
        method: a value of `PEFT_METHODS`.
        targets: as `resolve_targets` takes them.
        keys: keys of PEFT's configuration; they win over the method's own.

    Raises:
        UserError: a target or key that does not exist, or a value PEFT refuses for a module's shape.
    """
    from peft import LoraConfig, get_peft_model

    from mambacus.models.conv_lora import CausalConvLora
    from mambacus.tuning.lora import TrainedLoraLinear
    from mambacus.tuning.merge import untie

    config_class, given = configuration(method, keys)
    modules = resolve_targets(model, targets, method.kinds)
    if method.moves_base and "lm_head" in modules and model.config.tie_embeddings:
        untie(model)  # or the embedding would lose the part that is taken out of the head
    try:
        config = config_class(target_modules=modules, task_type="CAUSAL_LM", **given)
        if isinstance(config, LoraConfig):
            config._register_custom_module({CausalConv1d: CausalConvLora, nn.Linear: TrainedLoraLinear})
        with silent_about_ties():
            attached = get_peft_model(model, config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"{method.peft_type.lower()}: {' '.join(str(error).split())} (--options KEY=VALUE sets it)"
        ) from None
    if method.moves_base:
        initial = _Initial(attached)
        _check_difference(attached, initial.tensors)
        attached.register_module(INIT_TENSORS, initial)
    return attached


def configuration(method: PeftMethod, keys: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return PEFT's configuration class for a method and the keys to make one with, ``keys`` over the method's own.

    Raises:
        UserError: a key that does not exist, or a start that the method does not have.
    """
    from peft import LoraConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType

    config_class: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.peft_type)]
    given = {**method.keys, **checked_keys(config_class, keys)}
    if config_class is LoraConfig:
        check_initialisation(method, given.get("init_lora_weights", True))
    return config_class, given


def checked_keys(config_class: type, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``keys`` if the configuration has them all.

    Raises:
        UserError: naming those it does not have.
    """
    taken = {"target_modules", "task_type", "peft_type", "base_model_name_or_path", "revision", "inference_mode"}
    known = sorted({field.name for field in dataclasses.fields(config_class)} - taken)
    wrong = [f"{key!r}{suggest(key, known)}" for key in keys if key not in known]
    if wrong:
        raise UserError(f"--options: {config_class.__name__} has no key {', '.join(wrong)}; it has {', '.join(known)}")
    return dict(keys)


def check_initialisation(method: PeftMethod, wanted: Any) -> None:
    """Check how a method of the LoRA family is to start.

    A start that takes a part out of the base weights is a method of its own: PEFT takes it out once more when it loads
    the adapter, which with random numbers (``pissa_niter_N``) is another part, and out of a tied embedding along with
    the head. EVA and LoRA-GA without their preparation are plain LoRA in PEFT, without a word.

    Raises:
        UserError: another start than the method has.
    """
    own = method.keys.get("init_lora_weights")
    moving = next((name for name in _MOVING if str(wanted).lower().startswith(name)), "")
    if own is None:
        expected, fits = f"true, false, {', '.join(_STARTS)}", isinstance(wanted, bool) or wanted in _STARTS
    else:
        expected = _MOVING[own]
        fits = re.fullmatch(expected.replace("[_niter_N]", r"(_niter_\d+)?"), str(wanted)) is not None
    if fits:
        return
    hint = f"; --method {moving} starts so and saves the difference from the base" if moving and own is None else ""
    if wanted in _PREPARED:
        hint = "; that start needs what PEFT prepares from data or quantises"
    raise UserError(f"--options init_lora_weights: expected {expected}, got {wanted!r}{hint}")


def _check_difference(attached: nn.Module, initial: Mapping[str, torch.Tensor]) -> None:
    """Check that `difference_as_lora` can say what the method will have learned.

    Raises:
        UserError: it trains other tensors than LoRA's two matrices, or modules differ in rank or scale.
    """
    from peft.tuners.lora import LoraLayer

    said = "it is saved as a difference of two LoRAs"
    others = [name.removeprefix("base_model.model.") for name in initial if not _MATRIX.search(name)]
    if others:
        raise UserError(f"--options: {said}, and {others[0]} has no place in it")
    layers = [module for module in attached.modules() if isinstance(module, LoraLayer)]
    if len({(layer.r["default"], layer.scaling["default"]) for layer in layers}) > 1:
        raise UserError(f"--options: {said} with one rank and one alpha for all modules; leave out the patterns")


class _Initial(nn.Module):
    """The matrices that a method which moves the base started from, by name, not trained."""

    def __init__(self, attached: Any) -> None:
        super().__init__()
        from peft import get_peft_model_state_dict

        self.tensors = {
            name: tensor.detach().clone()
            for name, tensor in get_peft_model_state_dict(attached, save_embedding_layers=False).items()
        }


def difference_as_lora(attached: Any, config: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the update of a method that moved the base, as LoRA matrices for the base as it was.

    ``s (B A - B0 A0) = s [B, -B0] [A; A0]``, of twice the rank; ``config`` is changed to say so.
    """
    initial: dict[str, torch.Tensor] = getattr(attached, INIT_TENSORS).tensors
    doubled = {}
    for name, tensor in tensors.items():
        first = initial[name].to(tensor.device)
        is_a = ".lora_A." in name
        both = torch.cat([tensor, first], dim=0) if is_a else torch.cat([tensor, -first], dim=1)
        missing = 2 * config.r - both.shape[0 if is_a else 1]  # of a matrix of a lower rank there are fewer
        doubled[name] = F.pad(both, (0, 0, 0, missing) if is_a else (0, missing))
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    config.r, config.lora_alpha = 2 * config.r, scale * 2 * config.r
    config.use_rslora, config.init_lora_weights = False, True
    return doubled


@contextlib.contextmanager
def silent_about_ties() -> Iterator[None]:
    """Silence PEFT's warning that merging an adapter on a tied matrix goes wrong: ``mambacus merge`` unties it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Model (has|with) `tie_word_embeddings=True`")
        yield


def base_of(attached: Any) -> MambaLM:
    """Return the `MambaLM` inside a ``PeftModel``, or the model itself."""
    base: MambaLM = attached.get_base_model() if hasattr(attached, "get_base_model") else attached
    return base
