"""An unconditional `UNet2DModel` in latents, trained here, made class-conditional: equal at step 0, then fine-tuned and scored.

python benchmarks/transplant.py --vae runs/phantom/vae --dataset_name runs/phantom/data --work /tmp/transplant
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel
from tqdm import trange

from medsd import MedSDPipeline
from medsd.config import ClassifyConfig, FinetuneUNetConfig
from medsd.data.dataset import load_dataset, load_info
from medsd.data.transforms import sample_images
from medsd.models.autoencoders import load_vae
from medsd.models.codec import codec_of
from medsd.objectives.diffusion import denoising_error
from recipes import classify, finetune_unet

BATCH = 16
UNCONDITIONAL_STEPS = 3000
TEST_IMAGES = 200


def train_unconditional(dataset: str, vae_folder: str, folder: Path) -> None:
    """An LDMPipeline folder: a plain diffusers model, trained on latents without a condition."""
    torch.manual_seed(0)
    data, vae = load_info(dataset), load_vae(vae_folder)
    codec = codec_of(vae, data.channels)
    images = sample_images(load_dataset(dataset, "train"), data.intensity_map, 100_000)
    with torch.no_grad():
        latents = torch.cat([codec.encode(part) for part in images.split(32)])
    unet = UNet2DModel(
        sample_size=latents.shape[-1],
        in_channels=latents.shape[1],
        out_channels=latents.shape[1],
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    schedule = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=5e-4, weight_decay=0.0)
    for _ in (bar := trange(UNCONDITIONAL_STEPS, desc="unconditional")):
        chosen = latents[torch.randint(len(latents), (BATCH,))]
        times = torch.randint(0, 1000, (BATCH,))
        loss = denoising_error(lambda x, t, _: unet(x, t), schedule, chosen, torch.randn_like(chosen), times, None).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    LDMPipeline(vqvae=vae, unet=unet, scheduler=schedule).save_pretrained(folder)


@torch.no_grad()
def largest_difference(folder: Path) -> float:
    """Of the conditional model's prediction to the unconditional one's, over timesteps, relative to the largest value."""
    pipe, theirs = MedSDPipeline.from_pretrained(folder), UNet2DModel.from_pretrained(folder, subfolder="unet")
    times = torch.arange(0, 1000, 25)
    x = torch.randn(len(times), theirs.config.in_channels, *(theirs.config.sample_size,) * 2)
    expected = theirs(x, times).sample
    return (
        (pipe.unet(x, times, pipe.encode_prompts(["any prompt"] * len(times))).sample - expected).abs().max() / expected.abs().max()
    ).item()


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--vae", required=True)
    flags.add_argument("--dataset_name", required=True)
    flags.add_argument("--work", type=Path, required=True)
    flags.add_argument("--steps", type=int, default=4000, help="updates that make it conditional")
    chosen = flags.parse_args()
    start = chosen.work / "unconditional"
    if not start.is_dir():
        train_unconditional(chosen.dataset_name, chosen.vae, start)
    print(f"RESULT largest difference at step 0: {largest_difference(start):.1e} of the largest value", flush=True)
    config = FinetuneUNetConfig(
        dataset_name=chosen.dataset_name,
        output_dir=str(chosen.work / "conditional"),
        pretrained_model_name_or_path=str(start),
        learning_rate=1e-3,
        snr_gamma=5.0,
        cache_latents=True,
        max_train_steps=chosen.steps,
        validation_steps=1000,
        checkpointing_steps=0,
        report_to="none",
        overwrite=True,
    )
    finetune_unet.main(config)
    scored = ClassifyConfig(
        pipeline=config.output_dir,
        dataset_name=chosen.dataset_name,
        output_dir=str(chosen.work / "scores"),
        calibrate="none",
        max_samples=TEST_IMAGES,
        overwrite=True,
    )
    classify.main(scored)


if __name__ == "__main__":
    main()
