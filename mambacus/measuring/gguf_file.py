"""One of our models as the GGUF file that llama.cpp reads: ``python -m mambacus.measuring.gguf_file SIZE DTYPE OUT``.

Which tensors take the type is as in ``convert_hf_to_gguf.py`` and ``llama-quantize``: vectors, ``A`` and the
convolution are float32, and the small ``x_proj`` and ``dt_proj`` stay float16 where the large matrices are quantised.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from mambacus.models import MambaLM, load

TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "Q8_0", "int4": "Q4_0"}  # dtype: GGUF's name
_NAMES = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv1d.weight": "ssm_conv1d.weight",
    "mixer.conv1d.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.dt_proj.bias": "ssm_dt.bias",
    "mixer.A_log": "ssm_a",
    "mixer.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}
_FLOAT32 = ("norm.weight", "conv1d.weight", ".bias", "A_log", ".D", "norm_f.weight")
_SMALL = ("x_proj.weight", "dt_proj.weight")


def write_gguf(model: MambaLM, dtype: str, path: Path) -> None:
    """Write ``model`` with its matrices in ``dtype``, a key of `TYPES`, and without a vocabulary."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_name(model.name_or_path or "mamba")
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.n_layer)
    writer.add_vocab_size(config.padded_vocab_size)
    writer.add_ssm_conv_kernel(config.d_conv)
    writer.add_ssm_inner_size(config.d_inner)
    writer.add_ssm_state_size(config.d_state)
    writer.add_ssm_time_step_rank(config.dt_rank)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in model.named_parameters():  # a tied head is the embedding and comes once
        kind = gguf.GGMLQuantizationType[_type_of(name, dtype)]
        data = _stored(name, tensor.detach().float())
        writer.add_tensor(gguf_name(name), gguf.quantize(data.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """Return llama.cpp's name of one of our parameters."""
    fixed = {
        "backbone.embeddings.weight": "token_embd.weight",
        "backbone.norm_f.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}"


def _type_of(name: str, dtype: str) -> str:
    if name.endswith(_FLOAT32):
        return "F32"
    if name.endswith(_SMALL) and dtype in ("int8", "int4"):
        return "F16"
    return TYPES[dtype]


def _stored(name: str, tensor: torch.Tensor) -> Any:
    """Return a parameter as llama.cpp keeps it: A itself, and the convolution as (d_inner, d_conv)."""
    if name.endswith("A_log"):
        return -tensor.exp()
    return tensor.squeeze(1) if name.endswith("conv1d.weight") else tensor


if __name__ == "__main__":
    size, dtype_name, out = sys.argv[1:]
    write_gguf(load(f"random:{size}")[0], dtype_name, Path(out))
