"""One flat dataclass per recipe; its flags and its YAML section are two spellings of the same fields.

`{name}` in a default folder stands for the YAML's stem, or `phantom` without one: this is how recipes find each
other's folders. `commandline` fills the fields.
"""

from medsd.config.base import PHANTOM, RULES_WAIT, RecipeConfig
from medsd.config.data import PrepareDataConfig
from medsd.config.evaluate import EvaluateConfig
from medsd.config.push import PushConfig
from medsd.config.sweep import SweepConfig
from medsd.config.unet import FinetuneUNetConfig
from medsd.config.use import AppConfig, ClassifyConfig, GenerateConfig
from medsd.config.vae import FinetuneVAEConfig

RECIPES: tuple[type[RecipeConfig], ...] = (
    PrepareDataConfig,
    FinetuneVAEConfig,
    FinetuneUNetConfig,
    GenerateConfig,
    ClassifyConfig,
    EvaluateConfig,
    PushConfig,
    SweepConfig,
    AppConfig,
)
__all__ = [
    "PHANTOM",
    "RECIPES",
    "RULES_WAIT",
    "AppConfig",
    "ClassifyConfig",
    "EvaluateConfig",
    "FinetuneUNetConfig",
    "FinetuneVAEConfig",
    "GenerateConfig",
    "PrepareDataConfig",
    "PushConfig",
    "RecipeConfig",
    "SweepConfig",
]
