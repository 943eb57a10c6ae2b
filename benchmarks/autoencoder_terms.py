"""What the perceptual and the adversarial term are worth: an autoencoder fine-tuned without and with each, from the same start.

python benchmarks/autoencoder_terms.py --vae runs/phantom/vae --dataset_name runs/phantom/data --work /tmp/terms

Prints PSNR, SSIM, perceptual distance (in filters that no training saw) and sharpness (1 is that of the images) of the test split.
"""

import argparse
from pathlib import Path

from medsd.config import FinetuneVAEConfig
from medsd.data.dataset import load_dataset, load_info
from medsd.data.transforms import sample_images
from medsd.models.autoencoders import load_vae
from medsd.models.codec import codec_of
from medsd.training.reconstruction import HeldOutImages, full_numbers
from recipes import finetune_vae

VARIANTS = {"L1 alone": {"perceptual_weight": 0.0}, "with perceptual": {}, "with GAN": {"perceptual_weight": 0.0, "gan_start": 0}}
"""The terms at their default weights."""


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--vae", required=True)
    flags.add_argument("--dataset_name", required=True)
    flags.add_argument("--work", type=Path, required=True)
    flags.add_argument("--steps", type=int, default=300)
    chosen = flags.parse_args()
    data = load_info(chosen.dataset_name)
    held_out = HeldOutImages.load(chosen.dataset_name, data, 600, "test")
    train = sample_images(load_dataset(chosen.dataset_name, "train"), data.intensity_map, 512)
    for name, variant in VARIANTS.items():
        folder = chosen.work / name.replace(" ", "_")
        config = FinetuneVAEConfig(
            dataset_name=chosen.dataset_name,
            output_dir=str(folder),
            pretrained_model_name_or_path=chosen.vae,
            max_train_steps=chosen.steps,
            learning_rate=3e-4,
            mixed_precision="bf16",
            validation_steps=0,
            checkpointing_steps=0,
            report_to="none",
            overwrite=True,
            **variant,
        )
        finetune_vae.main(config)
        codec = codec_of(load_vae(str(folder)), data.channels)
        numbers = full_numbers(held_out, held_out.reconstructed(codec), codec, train)
        shown = ", ".join(f"{key} {numbers[key]:.4f}" for key in ("psnr", "ssim", "ms_ssim", "perceptual", "sharpness"))
        print(f"RESULT {name}: {shown}", flush=True)


if __name__ == "__main__":
    main()
