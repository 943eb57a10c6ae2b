"""Fine-tune a class-conditional diffusion UNet, or train one from a preset.

    accelerate launch recipes/finetune_unet.py
    accelerate launch recipes/finetune_unet.py --config recipes/configs/pneumoniamnist.yaml
    accelerate launch recipes/finetune_unet.py --pretrained_model_name_or_path runs/phantom/unet --rank 4 --output_dir runs/phantom/lora

The loop is in `train`. What varies (full or LoRA, latent or pixels, with or without classes) is decided before it.
"""

import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsd.commandline import run
from medsd.config import FinetuneUNetConfig
from medsd.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.nn import Module

    from medsd.data.dataset import DataInfo
    from medsd.inference.pipeline import MedSDPipeline
    from medsd.training.checkpoint import TrainState
    from medsd.training.preview import HeldOut
    from medsd.training.record import RunRecord


def main(config: FinetuneUNetConfig) -> None:
    """Build the pipeline, train it, and leave a pipeline folder."""
    from medsd.data.intensity import label_channels
    from medsd.runtime import check_output, quiet_libraries
    from medsd.training.checkpoint import find_checkpoint
    from medsd.training.record import RunRecord
    from medsd.training.setup import build_accelerator, clear_output, eight_bit_adam

    quiet_libraries()
    output_dir = Path(config.output_dir)
    if not config.resume_from_checkpoint:
        check_output(output_dir, config.overwrite, [config.pretrained_model_name_or_path, config.vae, config.dataset_name])
    find_checkpoint(output_dir, config.resume_from_checkpoint)
    accelerator = build_accelerator(config.mixed_precision, config.gradient_accumulation_steps, config.seed)
    with accelerator.main_process_first():
        info = data_info(config)
    pipe = build_pipeline(config, info)
    if config.use_8bit_adam:
        eight_bit_adam()
    clear_output(accelerator, output_dir, config.overwrite)
    with RunRecord(output_dir, config, accelerator.is_main_process, config.report_to == "tensorboard") as record:
        train(config, accelerator, pipe, record)
    if config.push_to_hub and accelerator.is_main_process:
        print("pushed to", pipe.push_to_hub(config.hub_model_id, private=config.hub_private_repo))
    folder, data = shlex.quote(str(output_dir)), shlex.quote(config.dataset_name)
    scores, images = (shlex.quote(str(output_dir.with_name(name))) for name in ("scores", "images"))
    commands = [f"python recipes/generate.py --pipeline {folder} --output_dir {images}"]
    if len(info.class_names) > 1 and not info.multi_label and not label_channels(info.intensity_map, info.image_channels):
        commands.insert(0, f"python recipes/classify.py --pipeline {folder} --dataset_name {data} --output_dir {scores}")
    accelerator.print("next: " + "\n      ".join(commands))


def data_info(config: FinetuneUNetConfig) -> "DataInfo":
    """`medsd.json` of the data as it is trained on; the default data set, the phantom, is made where it is not there yet."""
    from medsd.data.dataset import load_info
    from medsd.data.prepare import PHANTOM_RESOLUTION, PrepareOptions, prepare_phantom
    from medsd.data.transforms import at_resolution

    default = FinetuneUNetConfig().dataset_name
    if config.dataset_name == default and not Path(default).exists():
        print(f"making the phantom, a procedural head CT, in {default}")
        prepare_phantom(Path(default), PrepareOptions(PHANTOM_RESOLUTION))
    info = at_resolution(load_info(config.dataset_name), config.resolution)
    if config.unconditional:
        return info.without_classes()
    return info.with_words() if config.class_tokens == "words" else info


def build_pipeline(config: FinetuneUNetConfig, info: "DataInfo") -> "MedSDPipeline":
    """The model to start from, on the CPU, with the data's classes, prompts and intensity map, and the resolution to train at."""
    from medsd.data.dataset import available_splits, load_dataset
    from medsd.data.transforms import pixel_statistics
    from medsd.inference.pipeline import MedSDPipeline
    from medsd.models.codec import load_vae
    from medsd.models.conditioning import tokenize
    from medsd.models.unet import enable_xformers
    from medsd.training.prompts import row_prompts

    vae = load_vae(config.vae) if config.vae else None
    seen = {"train", *available_splits(config.dataset_name)} - {"test"}
    rows = {split: load_dataset(config.dataset_name, split) for split in seen}
    prompts = sorted({prompt for split in seen for prompt in row_prompts(rows[split], info).prompts})
    if config.pretrained_model_name_or_path is not None:
        pipe = load_base(config)
        if vae is not None:
            pipe.replace_vae(vae)
    elif vae is not None:
        pipe = MedSDPipeline.from_preset(config.preset or "tiny", info, vae, prompts=prompts)
    else:
        mean, std = pixel_statistics(rows["train"], info.intensity_map, resolution=info.resolution)
        pipe = MedSDPipeline.from_preset(config.preset or "tiny", info, None, config.pixel_factor or 4, mean, std, prompts)
    if config.enable_xformers_memory_efficient_attention:
        enable_xformers(pipe.unet)
    pipe.set_progress_bar_config(disable=True)
    pipe.change_schedule(prediction_type=config.prediction_type, beta_schedule=config.beta_schedule)
    pipe.adopt(info)
    tokenize(pipe.tokenizer, prompts)
    if config.codec and config.codec != pipe.codec.kind:
        raise InputError(f"--codec {config.codec}: this model's codec is {pipe.codec.kind}; start from another one or leave the flag away")
    return pipe


def load_base(config: FinetuneUNetConfig) -> "MedSDPipeline":
    """The pretrained pipeline; adapters of a LoRA run are merged into it."""
    from medsd.inference.pipeline import MedSDPipeline

    pipe = MedSDPipeline.from_pretrained(config.pretrained_model_name_or_path, revision=config.revision)
    if pipe.info.base is not None and config.rank:
        raise InputError(f"{config.pretrained_model_name_or_path} is a LoRA run: start from {pipe.info.base.name} or leave --rank away")
    if pipe.info.base is not None:
        pipe.merge_lora()
    return pipe


def choose_trained(config: FinetuneUNetConfig, pipe: "MedSDPipeline") -> dict[str, Any]:
    """Freeze what does not learn; returns the modules that hold something that does."""
    from medsd.models.conditioning import train_only_tokens
    from medsd.models.lora import FROZEN_DTYPES, add_lora

    if pipe.vae is not None:
        pipe.vae.requires_grad_(False)
    if config.rank:
        add_lora(pipe.unet, config.rank, config.lora_alpha, FROZEN_DTYPES[config.mixed_precision])
        pipe.record_base(config.pretrained_model_name_or_path, config.revision)
    if config.pretrained_model_name_or_path is None or config.train_text_encoder:
        return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    learns = train_only_tokens(pipe.text_encoder, pipe.tokenizer, pipe.data.class_tokens)
    return {"unet": pipe.unet, "text_encoder": pipe.text_encoder} if learns else {"unet": pipe.unet}


def default_snr_gamma(config: FinetuneUNetConfig) -> float | None:
    """20 from random weights, none for a pretrained model, and none for 0."""
    wanted = config.snr_gamma if config.snr_gamma is not None else 20.0 * (config.pretrained_model_name_or_path is None)
    return wanted or None


def default_learning_rate(config: FinetuneUNetConfig) -> float:
    """1e-3 from random weights, 1e-4 for adapters, 1e-5 for a pretrained model in full."""
    if config.pretrained_model_name_or_path is None:
        return 1e-3
    return 1e-4 if config.rank else 1e-5


def start_training(
    config: FinetuneUNetConfig, accelerator: "Accelerator", pipe: "MedSDPipeline"
) -> "tuple[TrainState, dict[str, Module], int]":
    """Choose what learns, and restore a checkpoint; see `medsd.training.setup.start`."""
    from medsd.training.checkpoint import find_checkpoint
    from medsd.training.setup import start

    modules = choose_trained(config, pipe)
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    pipe.to(accelerator.device)
    return start(
        accelerator,
        modules,
        config.learning_rate or default_learning_rate(config),
        config.use_8bit_adam,
        config.lr_scheduler,
        config.lr_warmup_steps,
        config.max_train_steps,
        config.use_ema,
        find_checkpoint(Path(config.output_dir), config.resume_from_checkpoint),
    )


def train(config: FinetuneUNetConfig, accelerator: "Accelerator", pipe: "MedSDPipeline", record: "RunRecord") -> None:
    """Train `pipe` in place and save it to the run's folder."""
    import torch

    from medsd.data.dataset import load_dataset
    from medsd.data.intensity import label_channels
    from medsd.data.transforms import Augmentation, sample_rows, to_unit
    from medsd.models.conditioning import drop_prompts, encode_chosen, tokenize
    from medsd.models.unet import attention_kernel
    from medsd.objectives.diffusion import denoising_error, min_snr_weight, sample_timesteps
    from medsd.training.loop import Cadence, updates
    from medsd.training.preview import HeldOut
    from medsd.training.prompts import row_prompts
    from medsd.training.setup import batches

    state, networks, done = start_training(config, accelerator, pipe)
    unet, text_encoder = networks["unet"], networks.get("text_encoder", pipe.text_encoder)
    data, codec, schedule, snr_gamma = pipe.data, pipe.codec, pipe.noise_schedule, default_snr_gamma(config)
    intensity, size = data.intensity_map, config.train_batch_size
    augment = Augmentation(**config.augmentation(), label_channels=label_channels(intensity, data.image_channels))
    rows = sample_rows(load_dataset(config.dataset_name, "train"), config.max_train_samples, config.seed)
    table = row_prompts(rows, data)
    prompt_ids = tokenize(pipe.tokenizer, table.prompts).to(accelerator.device)
    workers = config.dataloader_num_workers
    stream = batches(accelerator, rows, size, config.class_sampling, config.seed, done, workers, table.numbers)
    cadence = Cadence(**config.cadence())
    held_out = HeldOut(pipe, config.dataset_name)
    record.environment(device=str(accelerator.device), attention=attention_kernel(pipe.unet), trained_parameters=state.size)

    for _ in updates(accelerator, state, record, done, cadence, partial(look, held_out, record)):
        # The training step.
        for _ in range(config.gradient_accumulation_steps):
            batch, generator = next(stream)
            with accelerator.accumulate(*networks.values()):
                images = augment(to_unit(batch["images"], intensity, batch.get("ranges"), data.resolution), generator)
                latents = codec.encode(images, generator)
                noise = torch.randn(latents.shape, generator=generator, device=latents.device)
                timesteps = sample_timesteps(len(latents), schedule, generator)
                prompts = drop_prompts(batch["prompts"], len(prompt_ids) - 1, config.proportion_empty_prompts, generator)
                condition = encode_chosen(text_encoder, prompt_ids, prompts)
                error = denoising_error(unet, schedule, latents, noise, timesteps, condition, config.loss_type)
                loss = (min_snr_weight(schedule, timesteps, snr_gamma) * error).mean()
                state.learn(accelerator, loss, config.max_grad_norm)

    accelerator.wait_for_everyone()
    state.adopt_average()
    if accelerator.is_main_process:
        pipe.save_pretrained(record.folder)
    accelerator.print(
        f"pipeline in {record.folder}" + (f", pictures in {record.folder / 'preview.png'}" if config.validation_steps else "")
    )


def look(held_out: "HeldOut", record: "RunRecord", step: int, write: Callable[[str], None]) -> None:
    """Held-out loss, quick AUROC and a preview."""
    from medsd.training.preview import preview

    numbers = held_out.numbers()
    record.log(step, **numbers)
    record.picture(step, "preview", preview(held_out.pipe))
    said = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in numbers.items()]
    write(f"step {step}: {', '.join(said) or 'a preview; there is no validation split to look at'}")


if __name__ == "__main__":
    run(main, FinetuneUNetConfig)
