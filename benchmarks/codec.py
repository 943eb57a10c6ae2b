"""An autoencoder on held-out images, beside the best linear codec of the same size: PSNR, SSIM, latents, HU by tissue, lesions by size.

python benchmarks/codec.py --vae runs/brain_mri_ldm/vae --dataset_name runs/brain_mri_ldm/data --split test
"""

import argparse
from pathlib import Path

from medsd.data.dataset import load_dataset, load_info
from medsd.data.transforms import at_resolution, sample_images
from medsd.models.autoencoders import load_vae
from medsd.models.codec import codec_of
from medsd.training.reconstruction import HeldOutImages, described, full_numbers, sheet

TRAIN_IMAGES = 512


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--vae", required=True)
    flags.add_argument("--dataset_name", required=True)
    flags.add_argument("--split", default="test")
    flags.add_argument("--resolution", type=int)
    flags.add_argument("--max_samples", type=int, default=100_000)
    flags.add_argument("--picture", type=Path)
    chosen = flags.parse_args()
    data = at_resolution(load_info(chosen.dataset_name), chosen.resolution)
    codec = codec_of(load_vae(chosen.vae), data.channels)
    held_out = HeldOutImages.load(chosen.dataset_name, data, chosen.max_samples, chosen.split)
    train = sample_images(load_dataset(chosen.dataset_name, "train"), data.intensity_map, TRAIN_IMAGES, data.resolution)
    again = held_out.reconstructed(codec)
    numbers = full_numbers(held_out, again, codec, train)
    print(*described(numbers), f"perceptual distance {numbers['perceptual']:.4f}", sep="\n")
    if chosen.picture:
        sheet(held_out, again, numbers).save(chosen.picture)


if __name__ == "__main__":
    main()
