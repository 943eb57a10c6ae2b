"""What every recipe's config shares."""

from contextvars import ContextVar
from dataclasses import dataclass, fields
from typing import ClassVar

from medsd.errors import InputError

PHANTOM = "phantom"
MAY_BE_ZERO = frozenset(
    {
        "seed",
        "num_workers",
        "dataloader_num_workers",
        "lr_warmup_steps",
        "gan_start",
        "random_shift",
        "validation_steps",
        "checkpointing_steps",
    }
)
"""Numbers that are 1 or more elsewhere."""
RULES_WAIT: ContextVar[bool] = ContextVar("RULES_WAIT", default=False)
"""While the parser builds a config, whose `check` is called after it."""


@dataclass
class RecipeConfig:
    """What every recipe config shares: its section's name and the run name in its folders."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default and isinstance(value, str):
                setattr(self, field.name, value.replace("{name}", PHANTOM))
        if not RULES_WAIT.get():
            self.check()

    def check(self) -> None:
        """Raise InputError for a number out of range and for fields that contradict each other."""
        for field in fields(self):
            value = getattr(self, field.name)
            smallest = 0 if field.name in MAY_BE_ZERO else 1
            if isinstance(value, int) and not isinstance(value, bool) and value < smallest:
                raise InputError(f"--{field.name} {value}: {smallest} or more is expected")
