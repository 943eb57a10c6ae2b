"""Fine-tune a class-conditional diffusion UNet, or train one from a preset.

    accelerate launch recipes/finetune_unet.py
    accelerate launch recipes/finetune_unet.py --config recipes/configs/pneumoniamnist.yaml
    accelerate launch recipes/finetune_unet.py --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --rank 16

The loop is in `train`; everything that varies (full or LoRA, latent or pixels, with or without classes) is decided before it.
"""

import os
from pathlib import Path

from medsd.config import FinetuneUNetConfig, run


def main(config: FinetuneUNetConfig) -> None:
    """Build the pipeline, train it, and leave a pipeline folder."""
    from medsd.training.setup import accelerator_for, check_output, quiet_libraries
    from medsd.training.record import RunRecord

    quiet_libraries()
    output_dir = Path(config.output_dir)
    check_output(output_dir, config.overwrite, config.resume_from_checkpoint)
    accelerator = accelerator_for(config.mixed_precision, config.gradient_accumulation_steps)
    with accelerator.main_process_first():
        info = data_info(config)
    pipe = build_pipeline(config, info)
    with RunRecord(output_dir, config, accelerator.is_main_process, config.report_to == "tensorboard") as record:
        train(config, accelerator, pipe, record)
