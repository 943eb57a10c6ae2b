"""Fine-tune an AutoencoderKL on medical images, or train one from a preset.

accelerate launch recipes/finetune_vae.py
accelerate launch recipes/finetune_vae.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --decoder_only
"""

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from medsd.commandline import run
from medsd.config import FinetuneVAEConfig

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from torch.nn import Module

    from medsd.data.dataset import DataInfo
    from medsd.models.codec import KLCodec
    from medsd.training.checkpoint import TrainState
    from medsd.training.record import RunRecord


def main(config: FinetuneVAEConfig) -> None:
    """Build the autoencoder, train it, and leave a folder that `AutoencoderKL.from_pretrained` loads."""
    from medsd.data.dataset import load_info
    from medsd.data.transforms import at_resolution
    from medsd.models.codec import KLCodec, build_vae, load_vae
    from medsd.models.presets import PRESETS
    from medsd.models.unet import enable_xformers
    from medsd.runtime import check_output, quiet_libraries
    from medsd.training.record import RunRecord
    from medsd.training.setup import build_accelerator, clear_output, eight_bit_adam

    quiet_libraries()
    output_dir, start = Path(config.output_dir), config.pretrained_model_name_or_path
    if not config.resume_from_checkpoint:
        check_output(output_dir, config.overwrite, [start, config.dataset_name])
    accelerator = build_accelerator(config.mixed_precision, config.gradient_accumulation_steps, config.seed)
    info = at_resolution(load_info(config.dataset_name), config.resolution)
    vae = load_vae(start) if start else build_vae(PRESETS[config.preset or "tiny"], info.channels)
    codec = KLCodec(vae, info.channels)
    codec.check_side(info.resolution)
    if config.enable_xformers_memory_efficient_attention:
        enable_xformers(vae)
    if config.use_8bit_adam:
        eight_bit_adam()
    clear_output(accelerator, output_dir, config.overwrite)
    with RunRecord(output_dir, config, accelerator.is_main_process, config.report_to == "tensorboard") as record:
        train(config, accelerator, codec, info, record)
    if config.push_to_hub and accelerator.is_main_process:
        vae.push_to_hub(config.hub_model_id, private=config.hub_private_repo)
    vae, data, unet = (shlex.quote(str(path)) for path in (output_dir, config.dataset_name, output_dir.with_name("unet")))
    accelerator.print(f"next: accelerate launch recipes/finetune_unet.py --vae {vae} --dataset_name {data} --output_dir {unet}")


def start_training(config: FinetuneVAEConfig, accelerator: "Accelerator", codec: "KLCodec") -> "tuple[TrainState, dict[str, Module], int]":
    """Choose what learns, and restore a checkpoint; see `medsd.training.setup.start`."""
    from medsd.models.codec import Autoencoding
    from medsd.training.checkpoint import find_checkpoint
    from medsd.training.setup import start

    vae = codec.vae.to(accelerator.device)
    if config.decoder_only:
        vae.encoder.requires_grad_(False)
        if vae.quant_conv is not None:
            vae.quant_conv.requires_grad_(False)
    if config.gradient_checkpointing:
        vae.enable_gradient_checkpointing()
    return start(
        accelerator,
        {"autoencoder": Autoencoding(codec)},
        config.learning_rate or (1e-5 if config.pretrained_model_name_or_path else 1e-3),
        config.use_8bit_adam,
        config.lr_scheduler,
        config.lr_warmup_steps,
        config.max_train_steps,
        config.use_ema,
        find_checkpoint(Path(config.output_dir), config.resume_from_checkpoint),
    )


def train(config: FinetuneVAEConfig, accelerator: "Accelerator", codec: "KLCodec", info: "DataInfo", record: "RunRecord") -> None:
    """Train the codec's autoencoder in place and save it."""
    from medsd.data.dataset import load_dataset
    from medsd.data.intensity import label_channels
    from medsd.data.transforms import Augmentation, sample_images, sample_rows, to_unit
    from medsd.objectives.autoencoder import kl_divergence, reconstruction_error
    from medsd.training.loop import Cadence, updates
    from medsd.training.setup import batches

    state, networks, done = start_training(config, accelerator, codec)
    autoencoder, intensity = networks["autoencoder"], info.intensity_map
    augment = Augmentation(**config.augmentation(), label_channels=label_channels(intensity, info.image_channels))
    rows = sample_rows(load_dataset(config.dataset_name, "train"), config.max_train_samples, config.seed)
    stream = batches(accelerator, rows, config.train_batch_size, "natural", config.seed, done, config.dataloader_num_workers)
    cadence = Cadence(**config.cadence())
    record.environment(device=str(accelerator.device), trained_parameters=state.size)

    for _ in updates(accelerator, state, record, done, cadence, partial(look, config.dataset_name, codec, info, record)):
        # The training step.
        for _ in range(config.gradient_accumulation_steps):
            batch, generator = next(stream)
            with accelerator.accumulate(autoencoder):
                images = augment(to_unit(batch["images"], intensity, batch.get("ranges"), info.resolution), generator)
                reconstruction, mean, log_variance = autoencoder(images, generator)
                error = reconstruction_error(reconstruction, images, config.loss_type)
                loss = (error + config.kl_weight * kl_divergence(mean, log_variance)).mean()
                state.learn(accelerator, loss, config.max_grad_norm)

    accelerator.wait_for_everyone()
    state.adopt_average()
    if accelerator.is_main_process:
        save(codec, info, None if config.decoder_only else sample_images(rows, intensity, 256, info.resolution), record.folder)
    accelerator.print(
        f"autoencoder in {record.folder}" + (f", pictures in {record.folder / 'preview.png'}" if config.validation_steps else "")
    )


def save(codec: "KLCodec", info: "DataInfo", images: "Tensor | None", folder: Path) -> None:
    """Write the autoencoder, with the scaling factor measured anew on `images` in `[-1, 1]`, if given."""
    from medsd.inference.folder import PipelineInfo, publish, write_info
    from medsd.models.codec import measure_scaling_factor
    from medsd.runtime import partial_folder

    if images is not None:
        codec.vae.register_to_config(scaling_factor=measure_scaling_factor(codec, images))
    made = partial_folder(folder)
    codec.vae.save_pretrained(made)
    write_info(made, PipelineInfo(data=info, codec=codec.to_dict()))
    publish(made, folder)


def look(dataset_name: str, codec: "KLCodec", info: "DataInfo", record: "RunRecord", step: int, write: Callable[[str], None]) -> None:
    """Held-out error, and images above their reconstructions."""
    import torch

    from medsd.data.dataset import available_splits, load_dataset
    from medsd.data.transforms import sample_images
    from medsd.inference.pictures import grid
    from medsd.models.codec import reconstruct
    from medsd.objectives.autoencoder import reconstruction_error

    split = "validation" if "validation" in available_splits(dataset_name) else "train"
    images = sample_images(load_dataset(dataset_name, split), info.intensity_map, 32, info.resolution)
    again = reconstruct(codec, images)
    error = reconstruction_error(again, images).mean().item()
    record.log(step, **{f"{split}_l1": error})
    record.picture(step, "preview", grid(torch.stack([images[:8], again[:8]])))
    write(f"step {step}: {split} L1 {error:.4f} of a range of 2")


if __name__ == "__main__":
    run(main, FinetuneVAEConfig)
