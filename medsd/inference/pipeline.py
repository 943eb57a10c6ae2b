"""`MedSDPipeline`: the pipeline with its folders, and with what fits, explains and bounds its scores."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from safetensors import SafetensorError
from transformers import CLIPTokenizer

from medsd.data.dataset import DataInfo, looks_like_hub_id
from medsd.data.prompts import class_words
from medsd.errors import InputError, first_line
from medsd.hub.gate import Outgoing
from medsd.hub.model import push_model
from medsd.hub.upload import Target
from medsd.inference import folder as folders
from medsd.inference.bound import BoundMixin
from medsd.inference.calibrating import CalibratingMixin
from medsd.inference.core import DiffusionClassifierPipeline
from medsd.inference.explaining import ExplainingMixin
from medsd.inference.foreign import ForeignModel, check_local, is_foreign, load_foreign
from medsd.inference.info import PipelineInfo
from medsd.models.autoencoders import load_vae
from medsd.models.codec import PixelCodec, build_codec, codec_of, is_sd_shaped
from medsd.models.conditioning import (
    add_class_tokens,
    build_text_encoder,
    build_tokenizer,
    longest,
    plain_words,
    replace_tokens,
    set_embeddings,
)
from medsd.models.lora import lora_layers
from medsd.models.presets import LEARNED_VARIANCE, PRESETS, SD_SCHEDULE
from medsd.models.trust import check_trust
from medsd.models.unet import build_unet
from medsd.output import partial_folder

UNLOADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError, SafetensorError)
"""What diffusers, transformers and safetensors raise for a folder that is damaged or none of theirs; RecursionError among them."""


class MedSDPipeline(CalibratingMixin, ExplainingMixin, BoundMixin, DiffusionClassifierPipeline):
    """A `DiffusionClassifierPipeline` in a folder, on the Hub, or built from a preset."""

    folder: Path | None = None
    """Where it was loaded from, or saved to last."""

    @classmethod
    def from_preset(
        cls,
        name: str,
        data: DataInfo,
        vae: Any = None,
        pixel_factor: int = 4,
        pixel_mean: float = 0.0,
        pixel_std: float = 1.0,
        prompts: Sequence[str] = (),
        learned_variance: bool = False,
    ) -> "MedSDPipeline":
        """A model with random weights for `data`, in the latents of `vae` or in pixels.

        `pixel_mean` and `pixel_std` are those of the images in `[-1, 1]`. The tokenizer knows the words of the class prompts and
        of `prompts`, and the text encoder reads the longest of them.
        """
        preset = PRESETS[name]
        codec = PixelCodec(data.channels, pixel_factor, pixel_mean, pixel_std) if vae is None else codec_of(vae, data.channels)
        codec.check_side(data.resolution)
        tokenizer = preset_tokenizer(data, [prompt for prompt in prompts if prompt not in data.prompts], preset.text_tokens)
        pipe = cls(
            vae=vae,
            text_encoder=build_text_encoder(preset, tokenizer),
            tokenizer=tokenizer,
            unet=build_unet(preset, codec.latent_channels, data.resolution // codec.factor, learned_variance),
            scheduler=DDPMScheduler.from_config(SD_SCHEDULE | LEARNED_VARIANCE) if learned_variance else DDIMScheduler(**SD_SCHEDULE),
        )
        pipe.info = PipelineInfo(codec=codec.to_dict())
        return pipe

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "MedSDPipeline":
        """A pipeline folder of medsd (LoRA included), a Hub id, or any Stable Diffusion 1.x / 2.x folder or single file; safetensors only.

        Single files, MONAI bundles and unconditional folders (DDPM, DDIM, LDM) are converted: see `medsd.inference.foreign`.
        Raises InputError where the folder or one of its parts is missing.
        """
        name = str(pretrained_model_name_or_path)
        check_local(name)
        try:
            return cls._loaded(name, options)
        except InputError:
            raise
        except UNLOADABLE as error:
            remedy = "copy the folder again, or take another model" if Path(name).exists() else "look at its name and the way to the Hub"
            raise InputError(f"{name} cannot be loaded ({first_line(error)}): {remedy}") from error

    @classmethod
    def _loaded(cls, name: str, options: dict[str, Any]) -> "MedSDPipeline":
        local = Path(name).exists() or not looks_like_hub_id(name)
        record = Path(name) if local else folders.download_record(name, options.get("revision"))
        check_trust(record)
        if is_foreign(str(record)):
            return cls._from_foreign(load_foreign(name, options.get("revision")))
        info = folders.read_info(record)
        if info.base is not None:
            return cls._from_lora(record, info, options, local)
        if local:
            folders.check_folder(record)
            options = {"variant": folders.weights_variant(record)} | options
        else:
            record, options = cls._downloaded(name, options)
            check_trust(record)
        pipe = super().from_pretrained(record, use_safetensors=True, record=None, **options)
        if options.keys().isdisjoint({"dtype", "torch_dtype"}):
            pipe.text_encoder.float()  # transformers keeps the precision of the files, where diffusers loads float32.
        if info.codec is not None:
            pipe.info = info
        pipe.folder = record if local else None
        return pipe

    @classmethod
    def _downloaded(cls, name: str, options: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """A Hub repository's parts in the Hub's cache, without code and pickles, and the options that are left."""
        about = {"revision", "variant", "token", "cache_dir", "force_download", "local_files_only", "proxies"}
        asked = {key: value for key, value in options.items() if key in about}
        folder = cls.download(name, use_safetensors=True, **asked)
        return Path(folder), {key: value for key, value in options.items() if key not in about - {"variant"}}

    @classmethod
    def _from_foreign(cls, model: ForeignModel) -> "MedSDPipeline":
        pipe = cls(**model.parts)
        pipe.info = PipelineInfo(codec=model.codec, reads_prompts=model.reads_prompts)
        return pipe

    @classmethod
    def _from_lora(cls, run: Path, info: PipelineInfo, options: dict[str, Any], local: bool) -> "MedSDPipeline":
        options = {key: value for key, value in options.items() if key != "revision"}
        folders.check_base(info.base, run, local)
        info = replace(info, base=folders.locate_base(info.base, run))
        embeddings = folders.read_embeddings(run)
        missing = [token for token in info.data.class_tokens if token not in embeddings]
        if missing or not (run / folders.LORA_FILE).is_file():
            raise InputError(f"{run} misses {missing[0] if missing else folders.LORA_FILE}: copy the LoRA folder again")
        pipe = cls.from_pretrained(info.base.name, revision=info.base.revision, **options)
        if pipe.info.base is not None:
            raise InputError(f"{run} holds LoRA adapters of {info.base.name}, which is itself a LoRA run: merge that first")
        add_class_tokens(pipe.tokenizer, pipe.text_encoder, {token: class_words(token) for token in embeddings})
        set_embeddings(pipe.tokenizer, pipe.text_encoder, embeddings)
        if (run / "vae").is_dir():
            pipe.register_modules(vae=load_vae(str(run)))
        pipe.load_lora_weights(run, weight_name=folders.LORA_FILE, use_safetensors=True)
        pipe.unet.register_to_config(sample_size=info.data.resolution // build_codec(info.codec, pipe.vae).factor)
        pipe.info, pipe.folder = info, run
        return pipe

    @property
    def is_sd_shaped(self) -> bool:
        """Whether plain diffusers' StableDiffusionPipeline loads what `save_pretrained` writes."""
        schedule = self.scheduler.config
        plain = schedule.get("steps_offset", 1) == 1 and not schedule.get("clip_sample", False)
        return is_sd_shaped(self.vae) and plain and not self.learns_variance

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the pipeline folder; it has an index only once all its parts are there."""
        target = Path(save_directory)
        made = partial_folder(target)
        if self.info.base is not None:
            self._save_lora(made)
        elif self.is_sd_shaped:
            parts = {name: getattr(self, name) for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
            plain = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
            plain.save_pretrained(made, **options)
        else:
            super().save_pretrained(made, **options)
        base = self.info.base and folders.relative_base(self.info.base, target)
        folders.write_info(made, replace(self.info, base=base, reads_prompts=self.reads_prompts))
        folders.publish(made, target)
        self.folder = target

    def _save_lora(self, made: Path) -> None:
        if self.info.own_vae:
            self.vae.save_pretrained(made / "vae")
        weights, metadata = lora_layers(self.unet)
        self.save_lora_weights(made, unet_lora_layers=weights, unet_lora_adapter_metadata=metadata)
        folders.order_metadata(made / folders.LORA_FILE)
        table = self.text_encoder.get_input_embeddings().weight
        ids = self.tokenizer.convert_tokens_to_ids(self.data.class_tokens)
        folders.write_embeddings(made, {token: table[index] for token, index in zip(self.data.class_tokens, ids, strict=True)})

    def merge_lora(self) -> None:
        """Add the adapters to the UNet's weights, which are whole and trainable then."""
        self.fuse_lora()
        self.unload_lora_weights()
        self.unet.requires_grad_(True)
        self.info = replace(self.info, base=None)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool = True,
        revision: str | None = None,
        dataset_name: str | Path | None = None,
        report: str | Path | None = None,
        licence: str | None = None,
        skip_audit: bool = False,
        confirm_public_data: bool = False,
    ) -> str:
        """Push to a model repository `user/name`, through the gate that `medsd.hub.model` is; returns the repository's address.

        `audit.json` and the records of the training are those of the folder that this was loaded from, or saved to last.

        Args:
            dataset_name: prepared data that it was trained on; by default what the training's record names.
            report: folder of evaluate.py, for the card.
            licence: of the weights, such as `cc-by-nc-4.0`.
            confirm_public_data: say that the training images may be public: for a public repository of a model that nobody audited.

        Raises InputError for weights that are not audited or failed it, for adapters of a local base, for what names a patient, and where
        the Hub refuses.
        """
        if self.folder is None and not skip_audit:
            raise InputError("this pipeline lies in no folder yet: save_pretrained(FOLDER), and audit that with recipes/evaluate.py")
        with TemporaryDirectory() as work:
            made = Path(work) / repo_id.split("/")[-1]
            folder, self.folder = self.folder, None
            try:
                self.save_pretrained(made)
            finally:
                self.folder = folder
            if folder is not None:
                folders.copy_records(folder, made, ("config.yaml", "environment.json", "audit.json"))
            data = folders.data_of(folder or made, self.info, dataset_name)
            about = {"skip_audit": skip_audit, "confirmed": confirm_public_data, "named": folder}
            outgoing = Outgoing(made, data, report and Path(report), licence, **about)
            return push_model(outgoing, Target(repo_id, "repo_id", private=private, revision=revision))


def preset_tokenizer(data: DataInfo, others: Sequence[str], max_tokens: int) -> CLIPTokenizer:
    """A tokenizer for the class prompts and `others`, of `max_tokens` or as many as the longest of them needs."""
    words = dict(zip(data.class_tokens, data.class_names, strict=True)) if data.class_tokens else {}
    known = plain_words([replace_tokens(prompt, words) for prompt in others])
    tokenizer = build_tokenizer([*data.with_words().prompts, *known], max_tokens)
    tokenizer.model_max_length = max(max_tokens, longest(tokenizer, [*data.prompts, *others], data.class_tokens))
    return tokenizer
