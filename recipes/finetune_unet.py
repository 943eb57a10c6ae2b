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

    from medsd.data.dataset import DataInfo
    from medsd.inference.pipeline import MedSDPipeline
    from medsd.models.unet import PromptedUNet
    from medsd.objectives.discriminative import Contrast
    from medsd.training.guard import Guard
    from medsd.training.latents import LatentSource
    from medsd.training.loop import Loop
    from medsd.training.preview import HeldOut
    from medsd.training.prompts import PromptTable
    from medsd.training.record import RunRecord


def main(config: FinetuneUNetConfig) -> None:
    """Train a pipeline, and leave a pipeline folder; again with smaller micro-batches where memory does not suffice."""
    from medsd.training.guard import guarded

    guarded(fine_tune, config)


def fine_tune(config: FinetuneUNetConfig, guard: "Guard") -> None:
    """Build the pipeline, train it, and leave a pipeline folder."""
    from medsd.data.dataset import load_dataset
    from medsd.data.intensity import label_channels
    from medsd.data.transforms import training_rows
    from medsd.output import check_output
    from medsd.runtime import quiet_libraries
    from medsd.training.pushing import Destination, check_destination, hand_over
    from medsd.training.record import RunRecord
    from medsd.training.setup import build_accelerator, check_launch, choose_checkpoint, eight_bit_adam

    quiet_libraries()
    output_dir = Path(config.output_dir)
    if not config.resume_from_checkpoint:
        inputs = [config.pretrained_model_name_or_path, config.vae, config.dataset_name]
        check_output(output_dir, config.overwrite, inputs, "finetune_unet.py")
    accelerator = build_accelerator(config.mixed_precision, config.gradient_accumulation_steps, config.seed, config.allow_tf32)
    checkpoint = choose_checkpoint(accelerator, output_dir, config.resume_from_checkpoint)
    check_launch(accelerator, config.auto_batch_size, may_shard=True)
    with accelerator.main_process_first():
        info = data_info(config)
    destination = Destination(**config.destination()) if config.push_to_hub else None
    if destination is not None and accelerator.is_main_process:
        check_destination(destination, info, config.dataset_name)
    pipe = build_pipeline(config, info)
    if destination is not None and pipe.info.base is not None and pipe.info.base.sha256 is not None:
        raise InputError(
            "--push_to_hub: LoRA adapters of a local model are of no use to others; train without it, then push.py --merge_lora"
        )
    if config.use_8bit_adam:
        eight_bit_adam()
    rows = training_rows(load_dataset(config.dataset_name, "train"), *config.subset)
    source = build_source(config, accelerator, pipe, rows)
    record = RunRecord(output_dir, config, accelerator.is_main_process, config.report_to == "tensorboard")
    with record, guard.watching_memory():
        loop = train(config, accelerator, pipe, rows, source, record, guard, checkpoint)
    pictures = f", pictures in {output_dir / 'preview.png'}" if config.validation_steps else ""
    accelerator.print(f"pipeline in {output_dir}{pictures}")
    hand_over(accelerator, loop, config.dataset_name, destination)
    folder, data = shlex.quote(str(output_dir)), shlex.quote(config.dataset_name)
    scores, images = (shlex.quote(str(output_dir.with_name(name))) for name in ("scores", "images"))
    commands = [f"python recipes/generate.py --pipeline {folder} --output_dir {images}"]
    if len(info.class_names) > 1 and not label_channels(info.intensity_map, info.image_channels):
        commands.insert(0, f"python recipes/classify.py --pipeline {folder} --dataset_name {data} --output_dir {scores}")
    accelerator.print("next: " + "\n      ".join(commands))


def data_info(config: FinetuneUNetConfig) -> "DataInfo":
    """`medsd.json` of the data as it is trained on; the default data set, the phantom, is made where it is not there yet."""
    from medsd.data.dataset import load_info
    from medsd.data.prepare import prepare_default
    from medsd.data.transforms import at_resolution

    prepare_default(config.dataset_name, FinetuneUNetConfig().dataset_name)
    info = at_resolution(load_info(config.dataset_name), config.resolution)
    if config.unconditional:
        return info.without_classes()
    return info.with_words() if config.class_tokens == "words" else info


def build_pipeline(config: FinetuneUNetConfig, info: "DataInfo") -> "MedSDPipeline":
    """The model to start from, on the CPU, with the data's classes, prompts and intensity map, and the resolution to train at."""
    from medsd.data.dataset import available_splits, load_dataset
    from medsd.data.hypotheses import count_hypotheses
    from medsd.data.intensity import label_channels
    from medsd.data.transforms import row_labels
    from medsd.models.autoencoders import save_memory
    from medsd.models.conditioning import tokenize
    from medsd.models.unet import enable_xformers
    from medsd.training.fitting import adopt, change_schedule
    from medsd.training.prompts import rival_prompts, row_prompts

    seen = {"train", *available_splits(config.dataset_name)} - {"test"}
    rows = {split: load_dataset(config.dataset_name, split) for split in seen}
    hypotheses = count_hypotheses(row_labels(rows["train"]), len(info.class_names)) if info.class_names else None
    tables = [row_prompts(rows[split], info) for split in seen]
    if config.discriminative_weight:
        if hypotheses is None or len(hypotheses.sets) < 2:
            known = "one" if hypotheses else "none"
            raise InputError(f"--discriminative_weight compares classes, and this data has {known}: leave it away")
        tables.append(rival_prompts(rows["train"], row_prompts(rows["train"], info), info, hypotheses)[0])
    prompts = sorted({prompt for table in tables for prompt in table.prompts})
    if config.pretrained_model_name_or_path is not None:
        pipe = start_from_pretrained(config, info, prompts)
    else:
        pipe = start_from_preset(config, info, prompts, rows["train"])
    if config.enable_xformers_memory_efficient_attention:
        enable_xformers(pipe.unet)
    if pipe.vae is not None:
        save_memory(pipe.vae, config.enable_vae_slicing, config.enable_vae_tiling)
    pipe.set_progress_bar_config(disable=True)
    change_schedule(
        pipe,
        prediction_type=config.prediction_type,
        beta_schedule=config.beta_schedule,
        rescale_betas_zero_snr=config.rescale_betas_zero_snr or None,
    )
    adopt(pipe, info, hypotheses)
    tokenize(pipe.tokenizer, prompts)
    masked = "mask" in rows["train"].column_names or label_channels(info.intensity_map, info.image_channels)
    if config.snr_gamma and pipe.learns_variance:
        raise InputError(f"--snr_gamma {config.snr_gamma}: this model learns a variance, whose bound has weights of its own; leave it away")
    if config.lesion_weight != 1 and not masked:
        raise InputError(f"--lesion_weight {config.lesion_weight}: {config.dataset_name} has no masks; prepare it with --mask_column")
    if config.cache_latents and pipe.codec.kind == "pixels":
        raise InputError("--cache_latents spares the encoder, and pixels have none: leave it away")
    if config.codec and config.codec != pipe.codec.kind:
        raise InputError(f"--codec {config.codec}: this model's codec is {pipe.codec.kind}; start from another one or leave the flag away")
    return pipe


def start_from_preset(config: FinetuneUNetConfig, info: "DataInfo", prompts: list[str], rows: Any) -> "MedSDPipeline":
    """Random weights, in latents of `--vae` or in pixels."""
    from medsd.data.transforms import pixel_statistics, training_rows
    from medsd.inference.pipeline import MedSDPipeline
    from medsd.models.autoencoders import load_vae

    preset = config.preset or "tiny"
    if config.vae is not None:
        return MedSDPipeline.from_preset(preset, info, load_vae(config.vae), prompts=prompts)
    mean, std = pixel_statistics(training_rows(rows, *config.subset), info.intensity_map, resolution=info.resolution)
    return MedSDPipeline.from_preset(preset, info, None, config.pixel_factor or 4, mean, std, prompts, config.learned_variance)


def start_from_pretrained(config: FinetuneUNetConfig, info: "DataInfo", prompts: list[str]) -> "MedSDPipeline":
    """The pretrained pipeline, with another autoencoder, other channels and new words where these are wanted."""
    from accelerate import PartialState

    from medsd.models.autoencoders import load_vae
    from medsd.models.codec import same_latents
    from medsd.training.fitting import adapt_channels, learn_words, record_base, replace_vae

    pipe = load_base(config)
    if config.vae is not None:
        before, vae = pipe.vae, load_vae(config.vae)
        replace_vae(pipe, vae)
        if before is None or not same_latents(before, vae):
            remedy = ": leave --rank away, or train the VAE with --decoder_only" if config.rank else ", as it is now"
            PartialState().print(
                f"warning: {config.vae} makes other latents than those this UNet was trained on, so it must be trained in full{remedy}"
            )
    if config.adapt_channels:
        adapt_channels(pipe, info)
    if not pipe.reads_prompts and info.class_names:
        learn_words(pipe, info, prompts)
    if config.rank and not pipe.info.reads_prompts:
        raise InputError(f"{config.pretrained_model_name_or_path} is unconditional and can only be trained in full: leave --rank away")
    if config.rank:
        record_base(pipe, config.pretrained_model_name_or_path, config.revision)
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


def choose_trained(config: FinetuneUNetConfig, pipe: "MedSDPipeline") -> None:
    """Freeze what does not learn."""
    from medsd.models.conditioning import train_only_tokens
    from medsd.models.lora import FROZEN_DTYPES, add_lora

    if pipe.vae is not None:
        pipe.vae.requires_grad_(False)
    if config.rank:
        add_lora(pipe.unet, config.rank, config.lora_alpha, FROZEN_DTYPES[config.mixed_precision])
    whole_text_encoder = config.pretrained_model_name_or_path is None or config.train_text_encoder or not pipe.info.reads_prompts
    if not whole_text_encoder:
        train_only_tokens(pipe.text_encoder, pipe.tokenizer, pipe.data.class_tokens)


def build_network(config: FinetuneUNetConfig, accelerator: "Accelerator", pipe: "MedSDPipeline", prompts: list[str]) -> "PromptedUNet":
    """What learns, on the device: UNet and text encoder, which are told their prompts by number."""
    from medsd.models.conditioning import tokenize
    from medsd.models.unet import PromptedUNet

    choose_trained(config, pipe)
    if config.gradient_checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    pipe.to(accelerator.device)
    return PromptedUNet(pipe.unet, pipe.text_encoder, tokenize(pipe.tokenizer, prompts).to(accelerator.device))


def build_contrast(
    config: FinetuneUNetConfig, accelerator: "Accelerator", pipe: "MedSDPipeline", rows: Any
) -> "tuple[PromptTable, Contrast]":
    """The prompts that the rows are trained on, and what stands against them."""
    import torch

    from medsd.objectives.discriminative import NoContrast, PairedContrast
    from medsd.training.prompts import rival_prompts, row_prompts

    table = row_prompts(rows, pipe.data)
    if not config.discriminative_weight:
        return table, NoContrast()
    table, rivals = rival_prompts(rows, table, pipe.data, pipe.hypotheses)
    steps = pipe.scheduler.config.num_train_timesteps
    return table, PairedContrast(config.discriminative_weight, torch.from_numpy(rivals), steps, accelerator.device, accelerator.gather)


def choices(config: FinetuneUNetConfig, pipe: "MedSDPipeline") -> dict[str, Any]:
    """What flags that may be left away come to."""
    return {
        "learning_rate": learning_rate(config, pipe),
        "snr_gamma": snr_gamma(config, pipe),
        "prediction_type": pipe.scheduler.config.prediction_type,
        "beta_schedule": pipe.scheduler.config.beta_schedule,
        "scheduler": type(pipe.scheduler).__name__,
        "betas": [round(pipe.scheduler.betas[place].item(), 6) for place in (0, -1)],
        "codec": pipe.codec.kind,
        "pixel_factor": pipe.codec.factor,
    }


def snr_gamma(config: FinetuneUNetConfig, pipe: "MedSDPipeline") -> float | None:
    """The flag's (0: none); else 20 from random weights, and none for a pretrained model, a learned variance, and zero terminal SNR, whose
    weight is 0."""
    vanishes = pipe.scheduler.config.get("rescale_betas_zero_snr")
    plain = config.pretrained_model_name_or_path is not None or pipe.learns_variance or vanishes
    wanted = config.snr_gamma if config.snr_gamma is not None else 20.0 * (not plain)
    return wanted or None


def learning_rate(config: FinetuneUNetConfig, pipe: "MedSDPipeline") -> float:
    """The flag's; else 1e-3 from random weights, 1e-4 for adapters and for a model that has to learn its words, 1e-5 for another
    pretrained one in full."""
    if config.learning_rate is not None:
        return config.learning_rate
    if config.pretrained_model_name_or_path is None:
        return 1e-3
    return 1e-4 if config.rank or not pipe.info.reads_prompts else 1e-5


def build_source(config: FinetuneUNetConfig, accelerator: "Accelerator", pipe: "MedSDPipeline", rows: Any) -> "LatentSource":
    """Where latents come from: the codec at every step, or its moments on disk, which are computed now if they are not there yet."""
    from medsd.data.intensity import label_channels
    from medsd.data.transforms import Augmentation
    from medsd.runtime import cache_folder
    from medsd.training.latents import CachedLatents, EncodedLatents, Images, cache_moments

    data, codec, device = pipe.data, pipe.codec, accelerator.device
    labels = label_channels(data.intensity_map, data.image_channels)
    images = Images(data, Augmentation(**config.augmentation(), label_channels=labels))
    if not config.cache_latents:
        return EncodedLatents(images, codec, config.lesion_weight)
    pipe.vae.to(device)
    with accelerator.local_main_process_first():
        weighted, variants = config.lesion_weight != 1, config.cached_augmentations or 1
        folder = cache_moments(cache_folder("moments"), rows, images, codec, device, variants, config.seed, weighted)
    accelerator.print(f"moments of {len(rows)} images in {folder}")
    return CachedLatents(folder, codec, device, config.lesion_weight)


def train(
    config: FinetuneUNetConfig,
    accelerator: "Accelerator",
    pipe: "MedSDPipeline",
    rows: Any,
    source: "LatentSource",
    record: "RunRecord",
    guard: "Guard",
    checkpoint: Path | None,
) -> "Loop":
    """Train `pipe` in place on `rows` of the data set, whose latents `source` gives, and save it to the run's folder."""
    from medsd.data.transforms import TrainingRows, row_classes
    from medsd.models.conditioning import drop_prompts
    from medsd.objectives.diffusion import denoising_error, draw_noise, draw_perturbation, elementwise_loss, hybrid_error, min_snr_weights
    from medsd.objectives.timesteps import timestep_sampler
    from medsd.output import writing
    from medsd.training.best import Best
    from medsd.training.loop import Cadence, Loop
    from medsd.training.preview import HeldOut
    from medsd.training.record import AGAIN
    from medsd.training.setup import Optimisation, batches, frozen_hash, resume, start

    table, contrast = build_contrast(config, accelerator, pipe, rows)
    network = build_network(config, accelerator, pipe, table.prompts)
    chosen = choices(config, pipe)
    settings = config.settings(accelerator.num_processes) | chosen | pipe.data.settings()
    settings["frozen"] = frozen_hash([pipe.unet, pipe.text_encoder, pipe.vae])
    state, unet = start(accelerator, network, Optimisation(**config.optimisation(chosen["learning_rate"])))
    schedule, empty = pipe.noise_schedule, len(table.prompts) - 1
    weights = min_snr_weights(schedule, chosen["snr_gamma"]).to(accelerator.device)
    sampler = timestep_sampler(config.timestep_sampling, len(weights), accelerator.device, accelerator.gather)
    held_out = HeldOut(pipe, config.dataset_name)
    best = Best(f"validation_{config.best_metric}", config.best_metric == "auroc", config.early_stopping)
    best.check(held_out.names)
    state.memory |= {"timesteps": sampler.state, "best": best.state} | contrast.memory
    done, owes_look = resume(accelerator, state, checkpoint, settings, config.allow_config_change)
    with_masks = config.lesion_weight != 1 and not config.cache_latents
    reader = TrainingRows(rows, table.numbers, with_masks, with_images=not config.cache_latents)
    order = (row_classes(rows), config.train_batch_size, config.class_sampling, config.seed, done, config.dataloader_num_workers)
    stream = batches(accelerator, state.watch, reader, *order)
    measure = hybrid_error if pipe.learns_variance else denoising_error
    element_loss = elementwise_loss(config.loss_type, schedule, config.huber_schedule, config.huber_c)
    looks = (best, partial(look, held_out, record), pipe.save_pretrained)
    loop = Loop(accelerator, unet, state, record, guard, Cadence(**config.cadence()), *looks, settings)

    for _ in loop.updates(done, owes_look):
        # The training step.
        for _ in range(config.gradient_accumulation_steps):
            batch, draws = next(stream)
            with accelerator.accumulate(unet):
                latents, emphasis = source(batch, draws)
                noise = draw_noise(latents, draws, config.noise_offset)
                perturbation = draw_perturbation(latents, draws, config.input_perturbation)
                timesteps, factors = sampler.sample(len(latents), draws)
                prompts = drop_prompts(batch["prompts"], empty, config.proportion_empty_prompts, draws)
                fixed = {"loss": element_loss, "emphasis": emphasis, "perturbation": perturbation}
                error_of = partial(measure, unet, schedule, latents, noise, timesteps, **fixed)
                own = error_of(condition=prompts)
                error = weights[timesteps] * own + contrast(error_of, own, prompts, timesteps, draws)
                sampler.learn(timesteps, error.detach())
                state.learn(accelerator, (factors * error).mean(), config.max_grad_norm)

    accelerator.wait_for_everyone()
    state.adopt_average()
    if accelerator.is_main_process and not loop.idle:
        with writing(record.folder, AGAIN):
            pipe.save_pretrained(record.folder)
    loop.finish()
    return loop


def look(held_out: "HeldOut", record: "RunRecord", step: int, write: Callable[[str], None]) -> dict[str, float]:
    """Held-out loss, quick AUROC and a preview."""
    from medsd.training.preview import preview

    numbers = held_out.numbers()
    record.log(step, **numbers)
    record.picture(step, "preview", preview(held_out.pipe))
    said = [f"{name.replace('_', ' ')} {value:.4f}" for name, value in numbers.items()]
    write(f"step {step}: {', '.join(said) or 'a preview; there is no validation split to look at'}")
    return numbers


if __name__ == "__main__":
    run(main, FinetuneUNetConfig)
