"""medsd: fine-tune diffusion models on medical images, and use the same model as a calibrated classifier."""

import importlib
import logging
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "MedSDPipeline": "medsd.inference.pipeline",
    "load_dataset": "medsd.data.dataset",
    "load_info": "medsd.data.dataset",
    "read_image": "medsd.data.files",
    "InputError": "medsd.errors",
}
__all__ = ["MedSDPipeline", "load_dataset", "load_info", "read_image", "InputError", "__version__"]


for _library in ("bitsandbytes", "xformers", "transformers.utils.import_utils"):
    # They warn of what is left out on purpose: torchvision, and kernels for another device.
    logging.getLogger(_library).setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import medsd` and `--help` stay fast."""
    if name not in _HOMES:
        raise AttributeError(f"module medsd has no attribute {name}")
    return getattr(importlib.import_module(_HOMES[name]), name)
