"""LoRA adapters on a UNet, through PEFT."""

from typing import Any

import torch
from diffusers import UNet2DConditionModel

FROZEN_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Mixed precision -> what frozen weights are kept in while adapters train."""
ATTENTION_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def add_lora(unet: UNet2DConditionModel, rank: int, alpha: int | None, frozen_dtype: torch.dtype) -> None:
    """Freeze the UNet, in `frozen_dtype`, and add float32 adapters of scale alpha/rank to its attention layers (Hu et al., 2021)."""
    from peft import LoraConfig

    unet.requires_grad_(False).to(frozen_dtype)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=ATTENTION_LAYERS))
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lora_layers(unet: UNet2DConditionModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """The adapters' weights, and their metadata, without which a scale other than 1 would be lost at a reload."""
    from peft.utils import get_peft_model_state_dict

    (adapter,) = unet.peft_config
    metadata = unet.peft_config[adapter].to_dict()
    # Sets have another order in every process, and the same adapters should be the same file.
    ordered = {name: sorted(value) if isinstance(value, set) else value for name, value in metadata.items()}
    return get_peft_model_state_dict(unet, adapter_name=adapter), ordered
