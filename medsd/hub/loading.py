"""How a pushed model is loaded, as the lines to type: in medsd, and in plain diffusers."""

import json

from medsd.hub.contents import EMBEDS
from medsd.hub.facts import Facts

LOADING = {
    "StableDiffusionPipeline": """from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{name}"{at})
pipe({prompt}).images
""",
    "MedSDPipeline": """from diffusers import DiffusionPipeline  # runs pipeline.py of this repository: read it first

pipe = DiffusionPipeline.from_pretrained("{name}", custom_pipeline="{name}", trust_remote_code=True{at}{code})
pipe({first}).images
""",
    "autoencoder": """from diffusers import {class_name}

vae = {class_name}.from_pretrained("{name}"{at})
""",
}
"""In plain diffusers, by what `Facts.class_name` says; adapters apart."""


def loading(facts: Facts) -> str:
    """The card's section."""
    at = f', revision="{facts.revision}"' if facts.revision else ""
    first = _first_class(facts)
    ours = (
        f'from medsd import MedSDPipeline, read_image\n\npipe = MedSDPipeline.from_pretrained("{facts.name}"{at})\npipe({first}).images\n'
    )
    if len(facts.classes) > 1:
        ours += 'pipe.classify([read_image("slice.dcm")]).probabilities\n'
    plain = _plain_loading(facts, at)
    if facts.kind == "autoencoder":
        return f"```python\n{plain}```\n\nWith medsd:\n\n```bash\naccelerate launch recipes/finetune_unet.py --vae {facts.name}\n```"
    without = f"\n\nWith diffusers and transformers, without medsd:\n\n```python\n{plain}```" if plain else ""
    return f"With medsd:\n\n```python\n{ours}```{without}"


def _plain_loading(facts: Facts, at: str) -> str:
    """In plain diffusers; empty where it cannot."""
    if facts.kind != "lora":
        code = at.replace("revision", "custom_revision") if at else ""
        return LOADING.get(facts.class_name, LOADING["autoencoder"]).format(
            name=facts.name, class_name=facts.class_name, at=at, code=code, first=_first_class(facts), prompt=_first_prompt(facts)
        )
    if facts.base is None:
        return ""
    base, revision = facts.base
    own = facts.info.get("own_vae")
    lines = ["from diffusers import " + ("AutoencoderKL, " if own else "") + "StableDiffusionPipeline", ""]
    lines += [f'vae = AutoencoderKL.from_pretrained("{facts.name}", subfolder="vae"{at})'] if own else []
    options = (f', revision="{revision}"' if revision else "") + (", vae=vae" if own else "")
    lines.append(f'pipe = StableDiffusionPipeline.from_pretrained("{base}"{options})')
    lines.append(f'pipe.load_lora_weights("{facts.name}", weight_name="pytorch_lora_weights.safetensors"{at})')
    lines += [
        f'pipe.load_textual_inversion("{facts.name}", weight_name="{_embedding(token)}"{at})' for token in facts.of_data["class_tokens"]
    ]
    side = facts.of_data["resolution"]
    lines.append(f"pipe({_first_prompt(facts)}, height={side}, width={side}).images")
    return "\n".join([*lines, ""])


def _first_class(facts: Facts) -> str:
    """What asks for an image of the first class; empty where there is none."""
    return f"class_name={json.dumps(facts.classes[0], ensure_ascii=False)}" if facts.classes else ""


def _first_prompt(facts: Facts) -> str:
    return json.dumps(next(iter(facts.of_data.get("prompts", ())), ""), ensure_ascii=False)


def _embedding(token: str) -> str:
    return f"{EMBEDS}/{token.strip('<>')}.safetensors"
