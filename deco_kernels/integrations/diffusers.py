"""A diffusers pipeline of the DeCo models: `pip install 'deco_kernels[hub]'`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

try:
    from diffusers import DiffusionPipeline, ImagePipelineOutput
    from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError(
        f"deco_kernels.integrations.diffusers needs diffusers: pip install 'deco_kernels[hub]' ({error})"
    ) from error

from deco_kernels import flow
from deco_kernels.model import DeCo, DeCoTextToImage, DiT, Qwen3TextEncoder, load_model
from deco_kernels.model.hub import folder_of, upload_folder

INDEX, MODEL, TEXT_ENCODER = "model_index.json", "model", "text_encoder"
_CLASSES = {cls.__name__: cls for cls in (DeCo, DeCoTextToImage, DiT)}
_FILES = ("*.json", "*.safetensors", "*.txt")  # read from a repository: config, tensors, tokenizer
_OUTPUTS = ("pil", "np", "pt")
_LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_PUSH_OPTIONS = {"repo_id", "private", "token", "commit_message"}

Callback = Callable[[DiffusionPipeline, int, torch.Tensor, dict[str, Any]], dict[str, Any] | None]


class DeCoPipeline(DiffusionPipeline):
    """Samples images from a class-to-image or text-to-image model.

    Args:
        model: DeCo, DiT or DeCoTextToImage.
        text_encoder: the `Qwen3TextEncoder` of a DeCoTextToImage, with its text_length and text_width.
        solver, shift: as in `flow.sample`; by default the paper's for the kind of model.

    A folder or repository of the pipeline holds model_index.json, and the folders `model` and `text_encoder`.

    Raises TypeError or ValueError for components that do not fit each other, or settings that `flow.sample` refuses.
    """

    model_cpu_offload_seq = "text_encoder->model"
    _optional_components = ["text_encoder"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        model: DeCo | DeCoTextToImage | DiT,
        text_encoder: Qwen3TextEncoder | None = None,
        solver: str | None = None,
        shift: float | None = None,
    ):
        super().__init__()
        _check_components(model, text_encoder)
        self.defaults = flow.sampling_settings(model)
        given = {"solver": solver, "shift": shift}
        settings = {name: self.defaults[name] if value is None else value for name, value in given.items()}
        flow.Sampler(model, **{**self.defaults, **settings})  # validates them
        self.register_modules(model=model, text_encoder=text_encoder)
        self.register_to_config(**settings)
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        *,
        text_encoder: Qwen3TextEncoder | str | os.PathLike[str] | None = None,
        weights: str | None = None,
        allow_globals: Sequence[str] = (),
        **settings: Any,
    ) -> DeCoPipeline:
        """The pipeline of a published checkpoint, or of any other file that `model.load_model` reads.

        Args:
            path, weights, allow_globals: as in `model.load_model`.
            text_encoder: encoder of a text-to-image model, or the folder or id of its Qwen3 model.
            settings: solver and shift of the pipeline.

        Raises the errors of `model.load_model`, `Qwen3TextEncoder` and the pipeline.
        """
        model = load_model(path, weights=weights, allow_globals=allow_globals).eval()
        if isinstance(text_encoder, (str, os.PathLike)):
            text_encoder = _read_text_encoder(text_encoder, model)
        return cls(model, text_encoder, **settings)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], safe_serialization: bool = True, **options: Any
    ) -> None:
        """Write the pipeline into a folder, which is created: safetensors, and JSON of the configuration.

        Args:
            save_directory: the folder.
            safe_serialization: must be True.
            options: push_to_hub=True also uploads the folder; repo_id, private, token and commit_message then apply.

        Raises:
            ValueError: safe_serialization is False.
            TypeError: options that do not apply.
            OSError: the folder cannot be written, or the hub cannot be reached.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization: expected True, got False; pipelines are written as safetensors")
        folder, push = Path(save_directory), options.pop("push_to_hub", False)
        unknown = set(options) - (_PUSH_OPTIONS if push else set())
        if unknown:
            raise TypeError(
                f"save_pretrained: expected options among {', '.join(sorted(_PUSH_OPTIONS))}, with push_to_hub=True, "
                f"got {', '.join(sorted(unknown))}; leave them out"
            )
        self.model.save_pretrained(folder / MODEL)
        if self.text_encoder is not None:
            self.text_encoder.save_pretrained(folder / TEXT_ENCODER)
        self.save_config(folder)
        if push:
            upload_folder(options.pop("repo_id", folder.resolve().name), folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> None:
        """Upload the pipeline to a repository "user/name" of the hub; options and errors as in `save_pretrained`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, push_to_hub=True, repo_id=repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        text_encoder: Qwen3TextEncoder | None = None,
        torch_dtype: torch.dtype | None = None,
        **options: Any,
    ) -> DeCoPipeline:
        """Load a pipeline that `save_pretrained` has written, on the CPU. No code from the folder runs.

        Args:
            pretrained_model_name_or_path: the folder, or the id "user/name" of a repository on the hub.
            text_encoder: an encoder to use in place of the saved one, which is then not read.
            torch_dtype: dtype to convert the weights to; by default the stored ones.
            options: revision, token, cache_dir, local_files_only and force_download of huggingface_hub.

        Raises:
            OSError: no folder of this name, and no connection to the hub or no such repository; or files are missing.
            ValueError: files of another pipeline, or that do not fit each other.
            TypeError: an unknown option, or a torch_dtype that is not a torch.dtype.
        """
        if not isinstance(torch_dtype, (torch.dtype, type(None))):
            raise TypeError(
                f"torch_dtype: expected a torch.dtype such as torch.bfloat16, got {torch_dtype!r}; pass one"
            )
        folder = folder_of(pretrained_model_name_or_path, _FILES, **options)
        index = _read_index(folder)
        model = _CLASSES[_class_in(index, MODEL)].from_pretrained(_part(folder, MODEL))
        if text_encoder is None and _class_in(index, TEXT_ENCODER) is not None:
            text_encoder = _read_text_encoder(_part(folder, TEXT_ENCODER), model)
        pipeline = cls(model, text_encoder, index.get("solver"), index.get("shift"))
        return pipeline if torch_dtype is None else pipeline.to(torch_dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: int | list[int] | torch.Tensor | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int = 256,
        width: int = 256,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images_per_prompt: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            prompt: prompts of a text-to-image model.
            class_labels: classes of a class-to-image model.
            negative_prompt: prompts in place of the null condition, one for all or one per prompt.
            height, width: size in pixels, multiples of the model's patch size.
            num_inference_steps, guidance_scale, guidance_interval: as steps, guidance and guidance_interval of
                `flow.sample`; by default the paper's for the kind of model.
            generator: of the noise, one for all images or a list with one per image.
            num_images_per_prompt: images per prompt or class, one after the other.
            output_type: "pil"; "np", float32 [B, H, W, C] in [0, 1]; or "pt", [B, C, H, W] in [0, 1].
            return_dict: return an `ImagePipelineOutput`, whose `images` hold the result, otherwise a tuple of it.
            callback_on_step_end: called as callback(pipeline, step, time, {"latents": x}) after every step, with the
                state x float32 [B, C, H, W]. "latents" in the dictionary that it may return replaces x.
            callback_on_step_end_tensor_inputs: "latents" or nothing.

        Raises:
            TypeError, ValueError: the condition of another kind of model, no text encoder, or an invalid argument.
        """
        settings = {**self.defaults, "solver": self.config.solver, "shift": self.config.shift}
        given = {"steps": num_inference_steps, "guidance": guidance_scale, "guidance_interval": guidance_interval}
        settings |= {name: value for name, value in given.items() if value is not None}
        if output_type not in _OUTPUTS:
            raise ValueError(f"output_type: expected one of {list(_OUTPUTS)}, got {output_type!r}; choose one of them")
        if not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise ValueError(
                f"num_images_per_prompt: expected an int of at least 1, got {num_images_per_prompt!r}; pass 1 or more"
            )
        cond, uncond = self._conditions(prompt, class_labels, negative_prompt)
        cond, uncond = (each.repeat_interleave(num_images_per_prompt, dim=0) for each in (cond, uncond))
        noise = self._noise(len(cond), height, width, generator)
        sampler = flow.Sampler(self.model, cuda_graph=False, **settings)
        times = flow.timesteps(settings["steps"], settings["shift"])
        call_back = _callback(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        with self.progress_bar(total=settings["steps"]) as bar:

            def on_step(step: int, x: torch.Tensor) -> None:
                call_back(step, times[step], x)
                bar.update()

            images = sampler(noise, cond, uncond, on_step=on_step)
        self.maybe_free_model_hooks()
        found = self.image_processor.postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images=found) if return_dict else (found,)

    def _conditions(
        self, prompt: str | list[str] | None, labels: Any, negative: str | list[str] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Conditions and null conditions [B, ...] on the device of the model."""
        device = self._execution_device
        if not isinstance(self.model, DeCoTextToImage):
            if prompt is not None or negative is not None or labels is None:
                raise ValueError(
                    "class_labels: the model is conditioned on classes, expected class_labels, no prompt; "
                    "pass class_labels alone"
                )
            null = self.model.null_label
            try:
                y = torch.as_tensor(labels).reshape(-1)
            except (TypeError, ValueError, RuntimeError):  # no numbers
                y = torch.empty(0)
            if y.dtype not in _LABEL_DTYPES or not len(y) or y.min() < 0 or y.max() >= null:
                raise ValueError(
                    f"class_labels: expected classes from 0 to {null - 1}, got {labels!r}; choose among these"
                )
            y = y.to(device, torch.int64)
            return y, torch.full_like(y, null)
        if labels is not None or prompt is None:
            raise ValueError(
                "prompt: the model is conditioned on text, expected prompt, no class_labels; pass prompt alone"
            )
        encoder = self.text_encoder
        if encoder is None:
            raise ValueError(
                "prompt: the pipeline has no text encoder; give one, DeCoPipeline(model, "
                "Qwen3TextEncoder('Qwen/Qwen3-1.7B')) or from_pretrained(..., text_encoder=...)"
            )
        cond = encoder(prompt).to(device)
        if not negative:
            return cond, encoder.empty_prompt.to(device).expand_as(cond)
        uncond = encoder(negative).to(device)
        if len(uncond) not in (1, len(cond)):
            raise ValueError(f"negative_prompt: expected 1 or {len(cond)} like prompt, got {len(uncond)}; pass as many")
        return cond, uncond.expand_as(cond)

    def _noise(self, count: int, height: int, width: int, generator: Any) -> torch.Tensor:
        p = self.model.trunk.patch_size
        if any(not isinstance(side, int) or side < 1 or side % p for side in (height, width)):
            raise ValueError(
                f"height and width: expected multiples of {p}, the patch size, got {height} and {width}; "
                "choose such sizes"
            )
        generators = generator if isinstance(generator, list) else [generator]
        if any(not isinstance(each, (torch.Generator, type(None))) for each in generators):
            raise TypeError(
                f"generator: expected a torch.Generator or a list of them, got {generator!r}; pass one of them"
            )
        if isinstance(generator, list) and len(generator) not in (1, count):
            raise ValueError(
                f"generator: expected one, or one for each of {count} images, got {len(generator)}; pass as many"
            )
        shape = (count, self.model.trunk.channels, height, width)
        noise: torch.Tensor = randn_tensor(shape, generator, self._execution_device, self.model.dtype)
        return noise


def _check_components(model: Any, encoder: Any) -> None:
    if not isinstance(model, tuple(_CLASSES.values())):
        raise TypeError(
            f"model: expected one of {', '.join(_CLASSES)}, got {type(model).__name__}; pass a model of one of them"
        )
    if encoder is None:
        return
    if not isinstance(encoder, Qwen3TextEncoder) or not isinstance(model, DeCoTextToImage):
        raise TypeError(
            f"text_encoder: expected a Qwen3TextEncoder for a DeCoTextToImage, got a {type(encoder).__name__} for a "
            f"{type(model).__name__}; leave the encoder out, or pass a DeCoTextToImage and its encoder"
        )
    sizes, expected = (encoder.max_length, encoder.width), (model.trunk.text_length, model.trunk.text_width)
    if sizes != expected:
        raise ValueError(
            f"text_encoder: expected max_length and width {expected}, the text_length and text_width of the model, got "
            f"{sizes}; pass both to Qwen3TextEncoder"
        )


def _callback(
    pipeline: DeCoPipeline, callback: Callback | None, tensors: Sequence[str]
) -> Callable[[int, torch.Tensor, torch.Tensor], None]:
    """(step, time, x) → calls the callback and copies the latents that it returns into x."""
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        tensors = callback.tensor_inputs
    unknown = sorted(set(tensors) - set(pipeline._callback_tensor_inputs))
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs: expected 'latents' or nothing, got {unknown}; leave the others out"
        )

    def call(step: int, time: torch.Tensor, x: torch.Tensor) -> None:
        if callback is not None:
            returned = callback(pipeline, step, time, {"latents": x} if tensors else {})
            if not isinstance(returned, (dict, type(None))):
                raise TypeError(
                    f"callback_on_step_end: expected it to return a dictionary or None, got {returned!r}; "
                    "return one of them"
                )
            replaced = (returned or {}).get("latents", x)
            if replaced is not x:
                if replaced.shape != x.shape:
                    raise ValueError(
                        f"callback_on_step_end: expected it to return latents of shape {list(x.shape)}, got "
                        f"{list(replaced.shape)}; keep the shape"
                    )
                x.copy_(replaced)

    return call


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: expected the file that DeCoPipeline.save_pretrained writes, found none; check the path"
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        names = {name: _class_in(index, name) for name in (MODEL, TEXT_ENCODER)}
    except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: expected the index of a DeCoPipeline, got {type(error).__name__}: {error}") from None
    if names[MODEL] not in list(_CLASSES):
        raise ValueError(
            f"{path}: expected a model of class {', '.join(_CLASSES)}, got {names[MODEL]!r}; "
            "give the folder of a DeCoPipeline"
        )
    for name, kinds in (("solver", (str, type(None))), ("shift", (int, float, type(None)))):
        if not isinstance(index.get(name), kinds):
            raise ValueError(
                f"{path}: {name}: expected {'a name' if name == 'solver' else 'a number'}, got {index[name]!r}; "
                "correct the file"
            )
    found: dict[str, Any] = index
    return found


def _class_in(index: dict[str, Any], name: str) -> Any:
    """Class of a component, which the index holds after its module; None without the component."""
    return (index.get(name) or (None, None))[1]


def _part(folder: Path, name: str) -> Path:
    """The folder of a component. Without it the name must not be taken for that of a repository."""
    if not (folder / name).is_dir():
        raise FileNotFoundError(
            f"{folder / name}: expected the folder that DeCoPipeline.save_pretrained writes, found none; copy it again"
        )
    return folder / name


def _read_text_encoder(path_or_id: str | os.PathLike[str], model: Any) -> Qwen3TextEncoder:
    if not isinstance(model, DeCoTextToImage):
        raise TypeError(
            f"text_encoder: expected none for a {type(model).__name__}, which reads classes; leave text_encoder out"
        )
    trunk = model.trunk
    return Qwen3TextEncoder(path_or_id, max_length=trunk.text_length, width=trunk.text_width, dtype=None)
