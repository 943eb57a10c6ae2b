"""Fine-tune an autoencoder (AutoencoderKL or VQModel) on medical images, or train one from a preset.

    accelerate launch recipes/finetune_vae.py
    accelerate launch recipes/finetune_vae.py --codec vq --output_dir runs/phantom/vqvae
    accelerate launch recipes/finetune_vae.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --decoder_only

The loop is in `train`. What varies (KL or VQ, full or LoRA, with or without a discriminator) is decided before it.
"""

import json
import shlex
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsd.commandline import run
from medsd.config import FinetuneVAEConfig
from medsd.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from medsd.data.dataset import DataInfo
    from medsd.models.codec import LearnedCodec
    from medsd.objectives.autoencoder import Penalty, WeightedSum
    from medsd.training.adversary import Adversary, NoAdversary
    from medsd.training.guard import Guard
    from medsd.training.loop import Loop
    from medsd.training.reconstruction import HeldOutImages
    from medsd.training.record import RunRecord
    from medsd.training.stopwatch import Stopwatch

STATISTICS_IMAGES = 512
"""Training images that the latents' statistics, and the linear codec to compare with, are measured on."""
HELD_OUT_IMAGES = 512
LOOK_IMAGES = 32


def main(config: FinetuneVAEConfig) -> None:
    """Train an autoencoder, and leave its folder; again with smaller micro-batches where memory does not suffice."""
    from medsd.training.guard import guarded

    guarded(fine_tune, config)


def fine_tune(config: FinetuneVAEConfig, guard: "Guard") -> None:
    """Build the autoencoder, train it, and leave a folder that `AutoencoderKL.from_pretrained` (or VQModel) loads."""
    from medsd.data.dataset import load_info
    from medsd.data.prepare import prepare_default
    from medsd.data.transforms import at_resolution
    from medsd.models.autoencoders import recompute_activations, save_memory
    from medsd.models.codec import codec_of
    from medsd.models.unet import enable_xformers
    from medsd.output import check_output
    from medsd.runtime import quiet_libraries
    from medsd.training.pushing import Destination, check_destination, hand_over
    from medsd.training.record import RunRecord
    from medsd.training.setup import build_accelerator, check_launch, choose_checkpoint, eight_bit_adam

    quiet_libraries()
    output_dir = Path(config.output_dir)
    if not config.resume_from_checkpoint:
        check_output(output_dir, config.overwrite, [config.pretrained_model_name_or_path, config.dataset_name], "finetune_vae.py")
    accelerator = build_accelerator(config.mixed_precision, config.gradient_accumulation_steps, config.seed, config.allow_tf32)
    checkpoint = choose_checkpoint(accelerator, output_dir, config.resume_from_checkpoint)
    check_launch(accelerator, config.auto_batch_size, may_shard=False)
    with accelerator.main_process_first():
        prepare_default(config.dataset_name, FinetuneVAEConfig().dataset_name)
    info = at_resolution(load_info(config.dataset_name), config.resolution)
    destination = Destination(**config.destination()) if config.push_to_hub else None
    if destination is not None and accelerator.is_main_process:
        check_destination(destination, info, config.dataset_name)
    vae = build_autoencoder(config, info)
    codec = codec_of(vae, info.channels)
    codec.check_side(info.resolution)
    save_memory(vae, config.enable_vae_slicing, config.enable_vae_tiling)
    if config.gradient_checkpointing:
        recompute_activations(vae)
    if config.enable_xformers_memory_efficient_attention:
        enable_xformers(vae)
    if config.use_8bit_adam:
        eight_bit_adam()
    distance = build_distance(config)
    record = RunRecord(output_dir, config, accelerator.is_main_process, config.report_to == "tensorboard")
    with record, guard.watching_memory():
        loop = train(config, accelerator, codec, info, distance, record, guard, checkpoint)
    hand_over(accelerator, loop, config.dataset_name, destination)
    folder, data, unet = (shlex.quote(str(path)) for path in (output_dir, config.dataset_name, output_dir.with_name("unet")))
    accelerator.print(f"next: accelerate launch recipes/finetune_unet.py --vae {folder} --dataset_name {data} --output_dir {unet}")


def build_autoencoder(config: FinetuneVAEConfig, info: "DataInfo") -> Any:
    """The autoencoder to start from, in float32 on the CPU, with channels that fit where `--adapt_channels` says so."""
    from medsd.data.intensity import label_channels
    from medsd.models.autoencoders import build_vae, load_vae
    from medsd.models.channels import adapt_vae
    from medsd.models.presets import PRESETS

    if config.pretrained_model_name_or_path is None:
        return build_vae(PRESETS[config.preset or "tiny"], info.channels, config.codec or "kl")
    vae = load_vae(config.pretrained_model_name_or_path, config.revision)
    kind = "vq" if type(vae).__name__ == "VQModel" else "kl"
    if config.codec not in {None, kind}:
        raise InputError(f"--codec {config.codec}: {config.pretrained_model_name_or_path} is of codec {kind}; leave the flag away")
    if config.adapt_channels and vae.config.in_channels != info.channels:
        if config.decoder_only and info.channels != 1:
            raise InputError("--decoder_only keeps an encoder that never saw these channels: leave it away, and train the UNet in full")
        adapt_vae(vae, info.channels, label_channels(info.intensity_map, info.image_channels))
    return vae


def build_distance(config: FinetuneVAEConfig) -> "WeightedSum":
    """Element-wise error, plus the distance of features."""
    from medsd.models.trust import trusted_folder
    from medsd.objectives.autoencoder import WeightedSum, reconstruction_error
    from medsd.objectives.perceptual import perceptual_distance

    parts = [(1.0, partial(reconstruction_error, loss_type=config.loss_type))]
    if config.perceptual_weight:
        model = None if config.perceptual_model is None else str(trusted_folder(config.perceptual_model))
        parts.append((config.perceptual_weight, perceptual_distance(model)))
    return WeightedSum(parts)


def build_penalty(config: FinetuneVAEConfig, codec: "LearnedCodec") -> "Penalty":
    """KL divergence of the posterior, or codebook and commitment."""
    from medsd.objectives.autoencoder import codebook_loss, kl_divergence

    if codec.kind == "vq":
        return partial(codebook_loss, commitment=config.commitment_weight)
    return lambda mean, log_variance: config.kl_weight * kl_divergence(mean, log_variance)


def choose_trained(config: FinetuneVAEConfig, codec: "LearnedCodec") -> Any:
    """Freeze what does not learn; returns the adapters, if there are any."""
    from medsd.models.autoencoders import add_vae_lora, choose_decoder

    adapters = add_vae_lora(codec.vae, config.rank, config.lora_alpha, config.decoder_only) if config.rank else None
    if config.decoder_only:
        choose_decoder(codec.vae)
    return adapters


def build_adversary(
    config: FinetuneVAEConfig, accelerator: "Accelerator", codec: "LearnedCodec", watch: "Stopwatch"
) -> "Adversary | NoAdversary":
    """The discriminator that `--gan_weight` and `--gan_start` ask for."""
    from medsd.models.autoencoders import last_layer
    from medsd.training.adversary import Adversary, NoAdversary
    from medsd.training.setup import Optimisation

    if config.discriminator is None:
        return NoAdversary()
    optimisation = Optimisation(**config.optimisation(learning_rate(config)) | {"use_ema": False, "lr_scheduler": "constant"})
    return Adversary(accelerator, codec.image_channels, *config.discriminator, last_layer(codec.vae), optimisation, watch)


def learning_rate(config: FinetuneVAEConfig) -> float:
    """The flag's; else 1e-3 from random weights, 1e-4 for adapters, 1e-5 for a pretrained autoencoder in full."""
    if config.learning_rate is not None:
        return config.learning_rate
    if config.pretrained_model_name_or_path is None:
        return 1e-3
    return 1e-4 if config.rank else 1e-5


def train(
    config: FinetuneVAEConfig,
    accelerator: "Accelerator",
    codec: "LearnedCodec",
    info: "DataInfo",
    distance: "WeightedSum",
    record: "RunRecord",
    guard: "Guard",
    checkpoint: Path | None,
) -> "Loop":
    """Train the codec's autoencoder in place and save it."""
    from medsd.data.dataset import load_dataset
    from medsd.data.intensity import label_channels
    from medsd.data.transforms import Augmentation, TrainingRows, row_classes, sample_images, to_unit, training_rows
    from medsd.models.autoencoders import training_pass
    from medsd.training.best import Best
    from medsd.training.loop import Cadence, Loop
    from medsd.training.reconstruction import HeldOutImages
    from medsd.training.setup import Optimisation, batches, frozen_hash, latent_noise, resume, start

    rows = training_rows(load_dataset(config.dataset_name, "train"), *config.subset)
    some = sample_images(rows, info.intensity_map, STATISTICS_IMAGES, info.resolution)
    codec.vae.to(accelerator.device)
    prepare_codebook(config, codec, some)
    adapters = choose_trained(config, codec)
    settings = config.settings(accelerator.num_processes) | info.settings()
    settings |= {"learning_rate": learning_rate(config), "codec": codec.kind, "frozen": frozen_hash([codec.vae])}
    if config.discriminator is not None:
        # The adaptive weight is that of a micro-batch.
        settings["micro_batch_size"] = config.train_batch_size
    optimisation = Optimisation(**config.optimisation(learning_rate(config)))
    state, autoencoder = start(accelerator, training_pass(codec), optimisation)
    adversary = build_adversary(config, accelerator, codec, state.watch)
    state.partners.update(adversary.partners)
    held_out = HeldOutImages.load(config.dataset_name, info, LOOK_IMAGES)
    best = Best(f"{held_out.split}_l1", higher=False, patience=config.early_stopping)
    state.memory["best"] = best.state
    done, owes_look = resume(accelerator, state, checkpoint, settings, config.allow_config_change)
    penalty, intensity, distance = build_penalty(config, codec), info.intensity_map, distance.to(accelerator.device)
    augment = Augmentation(**config.augmentation(), label_channels=label_channels(intensity, info.image_channels))
    order = (row_classes(rows), config.train_batch_size, "natural", config.seed, done, config.dataloader_num_workers)
    stream = batches(accelerator, state.watch, TrainingRows(rows), *order)
    looks = (best, partial(look, held_out, codec, record), partial(keep, config, codec, adapters, info, some))
    loop = Loop(accelerator, autoencoder, state, record, guard, Cadence(**config.cadence()), *looks, settings)

    for step in loop.updates(done, owes_look):
        # The training step.
        for _ in range(config.gradient_accumulation_steps):
            batch, draws = next(stream)
            with accelerator.accumulate(autoencoder, *adversary.networks):
                images = augment(to_unit(batch["images"], intensity, batch.get("ranges"), info.resolution), draws)
                reconstruction, *code = autoencoder(images, latent_noise(codec, images, draws))
                error = (distance(reconstruction, images) + penalty(*code)).mean()
                # The autoencoder's optimizer.
                state.learn(accelerator, error + adversary.deception(step, error, reconstruction), config.max_grad_norm)
                # The discriminator's optimizer.
                adversary.learn(step, images, reconstruction, config.max_grad_norm)

    accelerator.wait_for_everyone()
    state.adopt_average()
    if accelerator.is_main_process and not loop.idle:
        save(config, codec, adapters, info, some, record.folder)
    loop.finish()
    if accelerator.is_main_process:
        report(config, codec, info, some, record.folder)
    return loop


def prepare_codebook(config: FinetuneVAEConfig, codec: "LearnedCodec", images: "Tensor") -> None:
    """Where a codebook starts from random weights, begin it at latents of images `(N, C, H, W)`."""
    import torch

    from medsd.models.autoencoders import seed_codebook

    if codec.kind == "vq" and config.pretrained_model_name_or_path is None:
        seed_codebook(codec, images, torch.Generator().manual_seed(config.seed))


def keep(config: FinetuneVAEConfig, codec: "LearnedCodec", adapters: Any, info: "DataInfo", images: "Tensor", folder: Path) -> None:
    """Write the autoencoder as it is now to an empty folder: adapters merged, its latents' statistics measured on images `(N, C, H, W)`.

    A decoder alone keeps the statistics of its pretrained latent space. The codec itself is left as it is.
    """
    from medsd.inference.folder import write_info
    from medsd.inference.info import PipelineInfo
    from medsd.models.autoencoders import merge_vae_lora
    from medsd.models.codec import codec_of, latent_statistics, record_statistics

    copied = deepcopy(adapters if adapters is not None else codec.vae)
    made = codec_of(copied if adapters is None else merge_vae_lora(copied), codec.image_channels)
    if not config.decoder_only:
        record_statistics(made, *latent_statistics(made, images))
    made.vae.save_pretrained(folder)
    write_info(folder, PipelineInfo(data=info, codec=made.to_dict()))


def save(config: FinetuneVAEConfig, codec: "LearnedCodec", adapters: Any, info: "DataInfo", images: "Tensor", folder: Path) -> None:
    """Put the autoencoder into the run's folder."""
    from medsd.inference.folder import publish
    from medsd.output import partial_folder, writing
    from medsd.training.record import AGAIN

    with writing(folder, AGAIN):
        made = partial_folder(folder)
        keep(config, codec, adapters, info, images, made)
        publish(made, folder)


def report(config: FinetuneVAEConfig, codec: "LearnedCodec", info: "DataInfo", images: "Tensor", folder: Path) -> None:
    """What the autoencoder in `folder` makes of held-out images; the linear codec to compare with is fitted on images `(N, C, H, W)`."""
    from medsd.hub.contents import weights_sha256
    from medsd.models.autoencoders import load_vae
    from medsd.models.codec import codec_of
    from medsd.output import write_text
    from medsd.training.reconstruction import HeldOutImages, described, full_numbers, sheet

    final = codec_of(load_vae(str(folder)).to(codec.vae.device), codec.image_channels)
    held_out = HeldOutImages.load(config.dataset_name, info, HELD_OUT_IMAGES)
    again = held_out.reconstructed(final)
    numbers = full_numbers(held_out, again, final, images) | {"weights_sha256": weights_sha256(folder)}
    write_text(folder / "metrics.json", json.dumps(numbers, indent=2) + "\n")
    sheet(held_out, again, numbers).save(folder / "reconstructions.png")
    print(f"autoencoder in {folder}, pictures in {folder / 'reconstructions.png'}", *described(numbers), sep="\n  ")


def look(
    held_out: "HeldOutImages", codec: "LearnedCodec", record: "RunRecord", step: int, write: Callable[[str], None]
) -> dict[str, float]:
    """Held-out error, and images above their reconstructions."""
    from medsd.training.reconstruction import decibel, quick_numbers, sheet

    again = held_out.reconstructed(codec)
    numbers = quick_numbers(held_out, again)
    named = {f"{held_out.split}_{name}": value for name, value in numbers.items() if value is not None}
    record.log(step, **named)
    record.picture(step, "preview", sheet(held_out, again))
    said = f"L1 {numbers['l1']:.4f} of a range of 2, PSNR {decibel(numbers['psnr'])}, SSIM {numbers['ssim']:.4f}"
    write(f"step {step}: {held_out.split} {said}")
    return named


if __name__ == "__main__":
    run(main, FinetuneVAEConfig)
