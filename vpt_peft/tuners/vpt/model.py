"""Visual Prompt Tuning on any transformers vision encoder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from vpt_peft.active import mixed_batch
from vpt_peft.encoder import EncoderSpec, find_encoder, read_blocks, submodule
from vpt_peft.heads import (
    Labels,
    build_heads,
    check_heads,
    check_task_type,
    find_task_head,
    fit_head,
    modules_to_wrap,
    unwrap_heads,
    wrap_heads,
)

from .adapter import PromptAdapter
from .adapter_file import file_in_loading
from .check import check_key_values, check_quantized, check_skip_unread
from .config import VPTConfig
from .layer import PromptTunerLayer
from .layout import check_config, make_layout
from .loading import check_fit, check_others, take_saved_biases
from .mixed import check_mixed_batch
from .modes import set_frozen_eval, set_frozen_eval_outside
from .parameters import VPTParameters, find_parameters


class VPTModel(BaseTuner):
    """Visual Prompt Tuning: learnable prompts in the input of some or all blocks of a frozen vision transformer.

    Jia et al., "Visual Prompt Tuning", ECCV 2022 (arXiv 2203.12119). Deep prompts run as keys and values of the
    attention, which is the same function at a fraction of the cost.

    Args:
        model: A transformers model with a vision encoder: a backbone, a model with a head, or one with a vision tower.
        config ([`VPTConfig`]): The configuration.
        adapter_name: The name of the adapter.
        low_cpu_mem_usage: Create the prompts on the meta device, for loading.

    Raises:
        EncoderError: The model has no vision encoder that can do what the configuration asks.
        ValueError: The configuration names blocks the encoder does not have.

    Example:

        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForImageClassification
        >>> from vpt_peft import VPTConfig

        >>> vit = AutoModelForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k", num_labels=10)
        >>> model = get_peft_model(vit, VPTConfig(num_virtual_tokens=50))
        >>> model.print_trainable_parameters()
    """

    prefix: str = "vpt_"
    tuner_layer_cls = PromptTunerLayer
    adapter_cls = PromptAdapter
    target_module_mapping: dict[str, list[str]] = {}

    def _check_new_adapter_config(self, config: Any) -> None:
        """Nothing: unlike PEFT's, biases are an adapter's own, so several adapters may have some."""

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        """Nothing: prompts target no embeddings of words, which some detectors with tied heads cannot even name."""
        return []

    def check_config(self, config: Any, spec: EncoderSpec) -> None:
        """Check what depends on the encoder, before anything is made.

        Raises:
            EncoderError: The encoder lacks what the configuration needs.
            ValueError: An index is out of range.
        """
        check_config(config, spec)

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> VPTConfig:
        """Look at the model, check the configuration against it and find the head; nothing is changed yet."""
        parameters = find_parameters(self.model)
        if parameters is None:
            parameters = self._read_model(peft_config)
        spec, encoder = parameters.spec, parameters.encoder
        path = next(path for path, module in self.model.named_modules() if module is encoder)
        if peft_config.backbone not in (None, path):
            raise ValueError(
                f"backbone={peft_config.backbone!r}: this model's prompts are on the encoder {path!r} already; attach "
                "to one encoder per model."
            )
        self.check_config(peft_config, spec)
        if peft_config.skip_unread:
            check_skip_unread(parameters.root, encoder, spec, list(parameters.configs.values()))
        check_quantized(encoder, spec, peft_config, path)
        layout = make_layout(peft_config, spec, parameters.read)
        # The blocks that have a part in the adapter; the first stands for prompts that are pixels.
        chosen = [index for index, block in enumerate(layout) if block is not None] or [0]
        self._targets = {".".join(filter(None, (path, spec.blocks[index].path))) for index in chosen}
        # Which modules train beside the prompts, and heads of another number of labels
        head = find_task_head(self.model, path, spec)
        paths = modules_to_wrap(self.model, peft_config.given("modules_to_save"), head, peft_config.task_type)
        check_task_type(self.model, paths, peft_config.task_type)
        check_heads(self.model, paths)
        file = file_in_loading.get()
        if file is not None:
            file.check(self.adapter_cls, parameters, peft_config, layout, paths)
        labels, base = peft_config.given("id2label"), parameters.labels.of(None)
        count = None if base is None else base.num_labels
        built = {} if labels is None else build_heads(self.model, paths, len(labels), count)
        if file is not None:
            file.check_heads(parameters, paths, built)
        self._prepared = parameters, paths, built
        # PEFT would look for them by the ends of their paths
        peft_config.modules_to_save = None
        return peft_config

    def _read_model(self, config: Any) -> VPTParameters:
        """Parameters for the encoder of a model that has no prompts; they are not attached yet."""
        root: Any = self.model
        # Another method's `PeftModel` may be around it
        while isinstance(root, PeftModel):
            root = root.get_base_model()
        spec = find_encoder(self.model, config.backbone)
        encoder = submodule(self.model, spec.path)
        self.check_config(config, spec)
        if config.self_check:
            spec = check_key_values(encoder, spec)
        return VPTParameters(spec, encoder, root, read_blocks(root, encoder, spec))

    def _wrap_heads(self, adapter_name: str, config: VPTConfig) -> None:
        parameters, paths, built = self._prepared
        is_active, labels = adapter_name in self.active_adapters, parameters.labels
        wrappers = wrap_heads(
            self.model, paths, adapter_name, active=is_active, inference_mode=config.inference_mode, labels=labels
        )
        parameters.wrappers = parameters.find_wrappers()
        for path, wrapper in zip(paths, wrappers, strict=True):
            if path in built:
                fit_head(wrapper, adapter_name, built[path])
        given = config.given("id2label")
        labels.add(adapter_name, None if given is None else Labels.from_names(given))
        if is_active:
            labels.use(adapter_name)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._targets

    def _check_name(self, adapter_name: str) -> None:
        """Refuse names that are part of a module's path: PEFT tells adapters apart by parts of paths.

        Raises:
            ValueError: The name is one of the model's own, a block index, or one of the containers.
        """
        reserved = {"prompt_tuner", *(f"{self.prefix}{part}" for part in self.adapter_cls.part_names)}
        adapters: list[str] = []
        for path, module in self.model.named_modules():
            if not path.startswith(tuple(adapters)):
                reserved.update(path.split("."))
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                adapters.append(f"{path}.")
        if adapter_name in reserved or adapter_name.isdigit():
            self.peft_config.pop(adapter_name, None)
            raise ValueError(
                f"adapter_name={adapter_name!r} is also the name of a module in this model, and PEFT would take the one "
                "for the other; choose another name."
            )

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Attach an adapter; `state_dict` is not needed, as the configuration says which blocks take part.

        An adapter that is refused leaves the model and its list of adapters as they were. One of the same name that is
        on the model already, by an earlier call, is replaced.
        """
        self._check_name(adapter_name)
        config: Any = self.peft_config[adapter_name]
        parameters, names = find_parameters(self.model), config.modules_to_save
        earlier = None if parameters is None else parameters.configs.get(adapter_name)
        before = None if parameters is None else parameters.take(adapter_name)
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, **kwargs)
            self._wrap_heads(adapter_name, config)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            if earlier is not None:
                self.peft_config[adapter_name] = earlier
            config.modules_to_save = names
            attached = find_parameters(self.model)
            if attached is not None:
                attached.take(adapter_name)
                attached.put_back(before)
                unwrap_heads(self.model, only_empty=True)
            if attached is not None and parameters is None:
                attached.detach()
            if not hasattr(model, "peft_config") and getattr(model, "_hf_peft_config_loaded", False):
                # transformers' add_adapter sets this before it injects, and would fail at the next try.
                model._hf_peft_config_loaded = False  # type: ignore[assignment]
            raise
        config.modules_to_save = names
        self._prepared[0].note_found(adapter_name)
        del self._prepared

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # PEFT would free the backbone's own biases for `bias`, which here are offsets of the adapter
        active, self.active_adapter = self.active_adapter, []
        try:
            super()._mark_only_adapters_as_trainable(model)
        finally:
            self.active_adapter = active

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        parameters, paths, _ = self._prepared
        if find_parameters(self.model) is None:
            parameters.attach()
        # PEFT asks once for each block
        if adapter_name not in parameters.configs:
            parameters.update_layer(adapter_name, peft_config, self.adapter_cls, paths)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Run one batch with an adapter of its own for each image (`adapter_names`), heads included."""
        names, parameters = kwargs.pop("adapter_names", None), find_parameters(self.model)
        if names is None or parameters is None:
            yield
            return
        if parameters.spec.packed:
            raise ValueError(
                "adapter_names: this encoder takes all images as one sequence; run each adapter's images apart."
            )
        checked = check_mixed_batch(names, parameters.configs, list(self.peft_config), self.training, args, kwargs)
        with mixed_batch(checked, parameters):
            yield

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Turn deep prompts into constant keys and values: inference then needs no norm and no maps for them.

        Outputs stay the same; prompts that enter a block as tokens stay as they are. Training needs
        `unmerge_adapter()` first.

        Raises:
            ValueError: An adapter is unknown, merged already, has no prompts that run as keys and values, or
                (`safe_merge`) holds values that are not finite. Nothing is changed then.
        """
        names = adapter_names if adapter_names is not None else self.active_adapters
        parameters = find_parameters(self.model)
        for name in names:
            if parameters is None or name not in parameters.configs:
                raise ValueError(f"adapter_names={names!r}: {name!r} is not an adapter of this model.")
            if any(name in layer.merged_adapters for layer in parameters.layers):
                raise ValueError(f"adapter {name!r} is merged already; call unmerge_adapter() first.")
            blocks = [block for block in parameters.layouts[name] if block is not None]
            if not any(block.mode == "kv" and block.source is not None for block in blocks):
                raise ValueError(
                    f"adapter {name!r} has no deep prompts that run as keys and values, so nothing of it is constant."
                )
            if safe_merge and not all(p.isfinite().all() for p in parameters.parameters_of(name).values()):
                raise ValueError(f"adapter {name!r} holds values that are not finite.")
        for layer in parameters.layers if parameters is not None else ():
            for name in names:
                layer.merge_prompts(layer.owner.adapter(name))

    def unmerge_adapter(self) -> None:
        """Go back from constant keys and values to prompts."""
        parameters = find_parameters(self.model)
        for layer in parameters.layers if parameters is not None else ():
            layer.unmerge_prompts()

    def train(self, mode: bool = True) -> VPTModel:
        """Training mode for the adapters and the head; frozen parts stay in eval mode (`base_in_eval`)."""
        super().train(mode)
        parameters = find_parameters(self.model)
        if mode and parameters is not None and any(config.base_in_eval for config in parameters.configs.values()):
            set_frozen_eval(parameters.encoder)
            set_frozen_eval_outside(parameters.root, parameters.encoder)
        return self

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            raise ValueError(
                "Prompts are inputs, not changes of weights, so merge_and_unload() cannot put them into the model. Use "
                "merge_adapter() to freeze deep prompts into constant keys and values for inference, or unload() to get "
                "the model back without them."
            )
        parameters = find_parameters(self.model)
        if parameters is not None:
            unwrap_heads(self.model)
            parameters.detach()
        return super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a trained module back in its place; unlike a weight's wrapper it has a device of its own."""
        setattr(parent, child_name, new_module)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        """The adapter's own entries, also where sharding has put wrappers into the module paths."""
        parameters = find_parameters(model)
        if parameters is not None and adapter_name in parameters.configs:
            # The object may have been attached to another model since
            parameters.note_found(adapter_name)
        mine = re.compile(rf"prompt_tuner\.{cls.prefix}[a-z_]+\.{re.escape(adapter_name)}\.")
        plain = {key.replace("_fsdp_wrapped_module.", ""): value for key, value in state_dict.items()}
        return {key: value for key, value in plain.items() if mine.search(key)}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """`prompt_tuner.vpt_prompts.default.3` is stored as `prompt_tuner.vpt_prompts.3`."""
        return re.sub(rf"(\.{cls.prefix}[a-z_]+)\.{re.escape(adapter_name)}(?=\.)", r"\1", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Put the adapter's name back and the path of this model's encoder for the one the file was saved under."""
        parameters = find_parameters(model)
        if parameters is None:
            raise ValueError(f"adapter {adapter_name!r}: this model has no prompts that values could be loaded into.")
        root = next(path for path, module in model.named_modules() if module is parameters.root)
        path = ".".join(filter(None, (root, "prompt_tuner")))
        remapped, found = {}, {}
        for key, value in state_dict.items():
            match = re.match(rf"^(?:.*\.)?prompt_tuner\.({cls.prefix}[a-z_]+)\.(.+)$", key)
            if match:
                found[f"{match[1]}.{adapter_name}.{match[2]}"] = value
            else:
                remapped[key] = value
        found |= take_saved_biases(parameters, cls.prefix, adapter_name, remapped, root)
        check_fit(parameters, adapter_name, found)
        check_others(model, parameters, adapter_name, remapped)
        return remapped | {f"{path}.{key}": value for key, value in found.items()}
