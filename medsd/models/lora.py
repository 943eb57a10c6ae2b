"""LoRA adapters on a UNet, through PEFT."""

from typing import Any

from diffusers import UNet2DConditionModel

ATTENTION_LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


def add_lora(unet: UNet2DConditionModel, rank: int, alpha: int | None) -> None:
    """Freeze the UNet and add trainable adapters of scale alpha/rank to its attention layers (Hu et al., 2021)."""
    from peft import LoraConfig

    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights="gaussian", target_modules=ATTENTION_LAYERS))


def lora_layers(unet: UNet2DConditionModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """The adapters' weights, and their metadata, without which a scale other than 1 would be lost at a reload."""
    from peft.utils import get_peft_model_state_dict

    return get_peft_model_state_dict(unet), unet.peft_config["default"].to_dict()
