"""Autoencoders: built from a preset, loaded, and passed through once as training needs it.

A *pass* returns the reconstruction and two tensors that say how its latent came about: mean and log-variance of the posterior (KL),
or what the encoder said and the codebook entries that stand for it (VQ). `objectives.autoencoder` makes a penalty of these.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel

from medsd.errors import InputError
from medsd.models.codec import KLCodec, LearnedCodec, VQCodec
from medsd.models.convert import is_monai_bundle, is_single_file, load_monai_bundle, load_single_file
from medsd.models.presets import SAMPLE_SIZE, Preset
from medsd.models.trust import check_trust

KINDS: dict[str, type] = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}
FOLDERS = ("vae", "vqvae", None)
"""Where a pipeline folder keeps its autoencoder; None for a folder that is one."""
CONVOLUTIONS = r".*\.(conv1|conv2|conv_shortcut|conv|conv_in|conv_out)|conv_in|conv_out|quant_conv|post_quant_conv"
LORA_LAYERS = rf"{CONVOLUTIONS}|.*\.(to_q|to_k|to_v|to_out\.0)"


class KLPass(torch.nn.Module):
    """One pass through a `KLCodec`'s autoencoder (a module, so that it can be distributed)."""

    def __init__(self, codec: KLCodec) -> None:
        super().__init__()
        self.vae, self.codec = codec.vae, codec

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images `(B, C, H, W)` in `[-1, 1]` and unit noise of the latent's shape -> reconstruction, posterior mean, log-variance."""
        posterior = self.vae.encode(self.codec.repeated(images)).latent_dist
        decoded = self.vae.decode(posterior.mean + posterior.std * noise.to(posterior.mean.dtype)).sample
        return self.codec.averaged(decoded), posterior.mean, posterior.logvar


class VQPass(torch.nn.Module):
    """One pass through a `VQCodec`'s autoencoder; gradients go straight through the quantisation (van den Oord et al., 2017)."""

    def __init__(self, codec: VQCodec) -> None:
        super().__init__()
        self.vae, self.codec = codec.vae, codec

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images `(B, C, H, W)` in `[-1, 1]` -> reconstruction, encoded latents `(B, c, h, w)`, nearest entries; no noise is used."""
        encoded = self.vae.encode(self.codec.repeated(images)).latents.float()
        entries = nearest_entries(self.vae.quantize.embedding.weight.float(), encoded)
        straight = encoded + (entries - encoded).detach()
        return self.codec.averaged(self.vae.decode(straight, force_not_quantize=True).sample), encoded, entries


def training_pass(codec: LearnedCodec) -> KLPass | VQPass:
    """The pass through this codec's autoencoder."""
    return VQPass(codec) if isinstance(codec, VQCodec) else KLPass(codec)


def nearest_entries(codebook: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """The entry of `codebook` `(n, c)` nearest to each place of `latents` `(B, c, h, w)`, with the codebook's gradient."""
    places = latents.detach().movedim(1, -1).flatten(0, -2)
    nearest = torch.cdist(places, codebook.detach()).argmin(1)
    return codebook[nearest].unflatten(0, (len(latents), *latents.shape[2:])).movedim(-1, 1)


@torch.no_grad()
def seed_codebook(codec: VQCodec, images: torch.Tensor, generator: torch.Generator) -> None:
    """Start a codebook that knows nothing at latents of images `(B, C, H, W)`, drawn at random, so that entries lie where latents are."""
    table = codec.vae.quantize.embedding.weight
    places = torch.cat([codec.moments(part.to(table.device)) for part in images.split(16)]).movedim(1, -1).flatten(0, -2)
    drawn = torch.randint(len(places), (len(table),), generator=generator, device=generator.device)
    table.copy_(places[drawn.to(places.device)])


@torch.no_grad()
def codebook_perplexity(codec: VQCodec, images: torch.Tensor) -> float:
    """exp of the entropy with which entries are used by images `(B, C, H, W)`: as if so many were used equally often."""
    table = codec.vae.quantize.embedding.weight
    counts = torch.zeros(len(table))
    for part in images.split(16):
        places = codec.moments(part.to(table.device)).movedim(1, -1).flatten(0, -2)
        counts += torch.cdist(places, table.float()).argmin(1).bincount(minlength=len(table)).cpu()
    share = counts / counts.sum()
    return torch.special.entr(share).sum().exp().item()


def build_vae(preset: Preset, channels: int, kind: str = "kl") -> AutoencoderKL | VQModel:
    """An `AutoencoderKL` (`kl`) or `VQModel` (`vq`) with random weights for images of `channels`."""
    levels = len(preset.vae_channels)
    shape = {
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": preset.vae_channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": preset.layers_per_block,
        "latent_channels": preset.latent_channels,
        "sample_size": SAMPLE_SIZE,
    }
    if kind == "vq":
        return VQModel(**shape, num_vq_embeddings=preset.codebook, vq_embed_dim=preset.latent_channels)
    return AutoencoderKL(**shape)


def load_vae(name: str, revision: str | None = None) -> AutoencoderKL | VQModel:
    """An autoencoder in float32 from its own folder or Hub id, a pipeline folder's part, a single file or a MONAI bundle."""
    if is_single_file(name) or is_monai_bundle(name):
        vae = (load_single_file if is_single_file(name) else load_monai_bundle)(name).vae
        if vae is None:
            raise InputError(f"{name} holds no autoencoder: name a file or folder that has one")
        return vae
    if Path(name).exists():
        return _load_local(Path(name))
    for subfolder in FOLDERS:
        kind = _kind_on_hub(name, subfolder, revision)
        if kind is not None:
            return _load(kind, name, subfolder, revision)
    raise InputError(f"{name}: no AutoencoderKL or VQModel there, neither a folder here nor on the Hub (is there a network?)")


def _load_local(folder: Path) -> AutoencoderKL | VQModel:
    check_trust(folder)
    for subfolder in FOLDERS:
        config = folder / (subfolder or "") / "config.json"
        kind = _kind(config) if config.is_file() else None
        if kind in KINDS:
            return _load(kind, str(folder), subfolder, None)
    raise InputError(f"{folder}: no AutoencoderKL or VQModel there; name a folder that finetune_vae.py wrote, or a pipeline folder")


def _kind(config: Path) -> str | None:
    try:
        return json.loads(config.read_text()).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{config} is damaged: copy the folder again") from error


def _load(kind: str, name: str, subfolder: str | None, revision: str | None) -> AutoencoderKL | VQModel:
    try:
        return KINDS[kind].from_pretrained(name, subfolder=subfolder, revision=revision, use_safetensors=True, torch_dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}: its {kind} has no safetensors weights that can be read ({str(error).splitlines()[0]})") from error


def _kind_on_hub(name: str, subfolder: str | None, revision: str | None) -> str | None:
    """Class of the autoencoder in a Hub repository's folder; None where there is none."""
    try:
        config = AutoencoderKL.load_config(name, subfolder=subfolder, revision=revision)
    except OSError:
        return None
    kind = config.get("_class_name")
    return kind if kind in KINDS else None


def choose_decoder(vae: AutoencoderKL | VQModel) -> None:
    """Freeze what makes latents: encoder, its last convolution and the codebook."""
    for part in (vae.encoder, vae.quant_conv, getattr(vae, "quantize", None)):
        if part is not None:
            part.requires_grad_(False)


def add_vae_lora(vae: AutoencoderKL | VQModel, rank: int, alpha: int | None, decoder_only: bool) -> Any:
    """Freeze the autoencoder and add adapters to its convolutions and attention; returns what `merge_vae_lora` wants."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    layers = rf"(decoder|post_quant_conv).*({LORA_LAYERS})|post_quant_conv" if decoder_only else LORA_LAYERS
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, init_lora_weights=True, target_modules=layers)
    return LoraModel(vae.requires_grad_(False), {"default": config}, "default")


def merge_vae_lora(adapters: Any) -> AutoencoderKL | VQModel:
    """The autoencoder with the adapters added to its weights, a plain one again."""
    return adapters.merge_and_unload()


def recompute_activations(vae: AutoencoderKL | VQModel) -> None:
    """Gradient checkpointing; raises InputError for an autoencoder without it."""
    try:
        vae.enable_gradient_checkpointing()
    except ValueError as error:
        raise InputError(f"{type(vae).__name__} has no gradient checkpointing: leave --gradient_checkpointing away") from error


def last_layer(vae: AutoencoderKL | VQModel) -> list[torch.Tensor]:
    """The kernels of the decoder's last convolution that learn: its own, or its adapters'."""
    return [weight for weight in vae.decoder.conv_out.parameters() if weight.requires_grad and weight.ndim == 4]


def save_memory(vae: AutoencoderKL | VQModel, slicing: bool, tiling: bool) -> None:
    """Encode and decode image by image, and large images tile by tile; raises InputError for an autoencoder without these."""
    try:
        if slicing:
            vae.enable_slicing()
        if tiling:
            vae.enable_tiling()
    except NotImplementedError as error:
        raise InputError(
            f"{type(vae).__name__} can be neither sliced nor tiled: leave --enable_vae_slicing and --enable_vae_tiling away"
        ) from error
