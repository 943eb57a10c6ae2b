"""A manual check: a Stable Diffusion 1.5-shaped folder with random weights loads, takes a LoRA step and classifies, on a CPU.

    python benchmarks/sd15_shape.py --folder /tmp/sd15

Writes 4 GB of random weights to the folder once, prepares 64 phantom slices at 256 px in three windows, then types the
recipes' commands and prints the seconds and the peak memory of each.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SD15_VOCABULARY = 49408


CLASSIFY = """
import sys
from medsd import MedSDPipeline, load_dataset
pipe = MedSDPipeline.from_pretrained(sys.argv[1])
image = load_dataset(sys.argv[2], "test")[0]["image"]
output = pipe.classify([image], prompts=pipe.data.prompts[:2], mode="full", max_pairs=2, batch_size=2)
print("log-likelihoods", output.log_likelihoods, "rows", output.rows)
"""


def write_folder(folder: Path) -> None:
    """Random weights in the shapes of Stable Diffusion 1.5: UNet 860 M, CLIP ViT-L/14 text encoder 123 M, VAE 84 M parameters."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from medsd.models.conditioning import build_tokenizer
    from medsd.models.presets import PRESETS
    from medsd.models.unet import build_unet

    torch.manual_seed(0)
    tokenizer = build_tokenizer(["a photo of"], max_tokens=77)
    text = CLIPTextConfig(
        vocab_size=SD15_VOCABULARY,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1, "skip_prk_steps": True}
    unet = build_unet(PRESETS["sd15"], 4, 64)
    print(f"UNet of {sum(parameter.numel() for parameter in unet.parameters()) / 1e6:.0f} M parameters", flush=True)
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(**schedule),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def write_data(folder: Path) -> None:
    from medsd.data.intensity import parse_windows
    from medsd.data.phantom import write_phantom
    from medsd.data.prepare import PrepareOptions, prepare_phantom

    write_phantom(folder / "phantom_dicom_0", patients=12, slices=6, size=256)
    windows = parse_windows(("brain", "subdural", "bone"))
    prepare_phantom(folder / "data", PrepareOptions(resolution=256, intensity=windows))


def timed(title: str, *words: str) -> None:
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words], cwd=REPOSITORY)
    _, status, usage = os.wait4(process.pid, 0)
    seconds, peak = time.perf_counter() - started, usage.ru_maxrss / 2**20
    print(f"{title}: exit {os.waitstatus_to_exitcode(status)}, {seconds:.0f} s, {peak:.1f} GiB at most", flush=True)
    if status:
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder.resolve()
    if not (folder / "base" / "model_index.json").is_file():
        write_folder(folder / "base")
    if not (folder / "data").is_dir():
        write_data(folder)
    quick = ["--max_train_steps", "1", "--train_batch_size", "1", "--validation_steps", "0", "--no_use_ema", "--overwrite"]
    base = ["--pretrained_model_name_or_path", f"{folder}/base", "--dataset_name", f"{folder}/data"]
    timed("one LoRA step", "recipes/finetune_unet.py", *base, "--rank", "16", "--output_dir", f"{folder}/lora", *quick)
    timed("classify one image with two classes", "-c", CLASSIFY, f"{folder}/lora", f"{folder}/data")


if __name__ == "__main__":
    main()
