"""Visual Prompt Tuning on any transformers vision encoder."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from vpt_peft.encoder import find_encoder, submodule
from vpt_peft.encoder.inputs import IMAGE_INPUTS
from vpt_peft.heads import find_task_head, trained_modules

from .check import check_endings, check_heads, check_key_values, check_quantized, check_shortcuts
from .config import VPTConfig
from .layer import PromptTunerLayer
from .loading import check_fit, take_out
from .mixed import MixedBatch, check_names
from .modes import set_frozen_eval, set_frozen_eval_outside
from .plan import check_config, make_roles, prompted_blocks
from .resting import set_others_aside
from .store import VPTPromptStore, find_store


def _name_adapters(names: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    """Forward pre-hook of a trained module (a head): tell it the adapter of each image."""
    return args, {**kwargs, "adapter_names": names}


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
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: Any) -> VPTConfig:
        """Look at the model, check the configuration against it and find the head; nothing is changed yet."""
        store = find_store(self.model)
        if store is not None:
            spec, path = store.spec, self._path_of(store.encoder)
            if peft_config.backbone is not None and peft_config.backbone != path:
                raise ValueError(
                    f"backbone={peft_config.backbone!r}: this model's prompts are on the encoder {path!r} already; attach "
                    "to one encoder per model."
                )
            check_config(peft_config, spec)
        else:
            spec = find_encoder(self.model, peft_config.backbone)
            check_config(peft_config, spec)
            if peft_config.self_check:
                spec = check_key_values(submodule(self.model, spec.path), spec)
                check_config(peft_config, spec)
                spec = check_shortcuts(self._root(), submodule(self.model, spec.path), spec)
            self._found, path = spec, spec.path
        check_quantized(submodule(self.model, path), spec, peft_config, path)
        roles = make_roles(peft_config, spec)
        warm = (index for index, role in enumerate(roles) if role.temperature)
        # The blocks that have a part in the adapter; the first stands for prompts that are pixels.
        chosen = sorted({*prompted_blocks(peft_config, spec), *warm}) or [0]
        self._targets = {".".join(filter(None, (path, spec.blocks[index].path))) for index in chosen}
        peft_config.modules_to_save = self._modules_to_save(peft_config, find_task_head(self.model, path, spec))
        check_endings([*self.peft_config, *(store.configs if store is not None else ())], peft_config.modules_to_save)
        check_heads(self.model, peft_config.modules_to_save)
        return peft_config

    def _modules_to_save(self, config: VPTConfig, head: list[str]) -> list[str]:
        """The head where none is named; names a bare backbone lacks are left out, misspelt ones refused."""
        if config.modules_to_save is None:
            return head
        paths = [path for path, _ in self.model.named_modules()]
        lacking = [n for n in config.modules_to_save if not any(p == n or p.endswith(f".{n}") for p in paths)]
        if lacking and head:
            raise ValueError(
                f"modules_to_save={config.modules_to_save!r}: the model has no module {', '.join(lacking)}; its head is "
                f"{head}."
            )
        if lacking:
            warnings.warn(f"modules_to_save: this backbone has no {', '.join(lacking)}; left out.", stacklevel=2)
        return [name for name in config.modules_to_save if name not in lacking]

    def _root(self) -> nn.Module:
        """The model itself, where another method's `PeftModel` is around it."""
        root: Any = self.model
        while isinstance(root, PeftModel):
            root = root.get_base_model()
        return root

    def _path_of(self, encoder: nn.Module) -> str:
        return next(path for path, module in self.model.named_modules() if module is encoder)

    def _check_target_module_exists(self, peft_config: Any, key: str) -> bool:  # type: ignore[override]
        return key in self._targets

    def _check_name(self, adapter_name: str) -> None:
        """Refuse names that are part of a module's path: PEFT tells adapters apart by parts of paths.

        Raises:
            ValueError: The name is one of the model's own, a block index, or one of the containers.
        """
        reserved = {"prompt_tuner", *VPTPromptStore.adapter_layer_names}
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

        An adapter that is refused leaves the model and its list of adapters as they were.
        """
        # PEFT makes the tuner's active adapters active again at the end, heads included
        with set_others_aside(self.model, [*self.active_adapters, adapter_name]):
            self._inject(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, **kwargs)

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        self._check_name(adapter_name)
        # A copy, since what is found in this model (its head) must not go into the next one with the caller's config.
        self.peft_config[adapter_name] = copy(self.peft_config[adapter_name])
        store = find_store(self.model)
        known = store is not None and adapter_name in store.configs
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            attached = find_store(self.model)
            if attached is not None and store is None:
                attached.detach()
            elif attached is not None and not known and adapter_name in attached.configs:
                for layer in (attached, *attached.layers):
                    layer.delete_adapter(adapter_name)
            if not hasattr(model, "peft_config") and getattr(model, "_hf_peft_config_loaded", False):
                # transformers' add_adapter sets this before it injects, and would fail at the next try.
                model._hf_peft_config_loaded = False  # type: ignore[assignment]
            raise

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones; see `BaseTuner.set_adapter`."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        with set_others_aside(self.model, names, trainable=False):
            super().set_adapter(adapter_name, inference_mode)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        with set_others_aside(self.model, [adapter_name]):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

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
        store = find_store(self.model)
        if store is None:
            store = VPTPromptStore(self._found, submodule(self.model, self._found.path), self._root())
            store.attach()
        if adapter_name in store.configs:
            return
        store.update_layer(adapter_name, peft_config)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Run one batch with an adapter of its own for each image (`adapter_names`), heads included."""
        names, store = kwargs.pop("adapter_names", None), find_store(self.model)
        if names is None or store is None:
            yield
            return
        names = check_names(names, list(self.peft_config), self.training)
        images = next(
            (kwargs[name] for name in IMAGE_INPUTS if kwargs.get(name) is not None), args[0] if args else None
        )
        if images is not None and len(names) != images.shape[0]:
            raise ValueError(f"adapter_names has {len(names)} names for {images.shape[0]} images; give one per image.")
        refused = [
            n for n in set(names) & set(store.configs) if store.configs[n].prompt_location in ("pad", "channel")
        ]
        if refused:
            raise ValueError(
                f"adapter_names: {refused} change the whole image; run their images in a batch of their own."
            )
        mixed = MixedBatch(names)
        layers = (store, *store.layers)
        handles = [
            wrapper.register_forward_pre_hook(partial(_name_adapters, names), with_kwargs=True)
            for wrapper in trained_modules(self.model)
        ]
        for layer in layers:
            layer.mixed = mixed
        try:
            yield
        finally:
            for layer in layers:
                layer.mixed = None
            for handle in handles:
                handle.remove()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Turn deep prompts into constant keys and values: inference then needs no norm and no maps for them.

        Outputs stay the same; prompts that enter a block as tokens stay as they are. Training needs
        `unmerge_adapter()` first.

        Raises:
            ValueError: An adapter is unknown, merged already, has no prompts that run as keys and values, or
                (`safe_merge`) holds values that are not finite. Nothing is changed then.
        """
        names = adapter_names if adapter_names is not None else self.active_adapters
        store = find_store(self.model)
        for name in names:
            if store is None or name not in store.configs:
                raise ValueError(f"adapter_names={names!r}: {name!r} is not an adapter of this model.")
            if any(name in layer.merged_adapters for layer in store.layers):
                raise ValueError(f"adapter {name!r} is merged already; call unmerge_adapter() first.")
            roles = [layer.roles[name] for layer in store.layers]
            if not any(role.mode == "kv" and role.source is not None for role in roles):
                raise ValueError(
                    f"adapter {name!r} has no deep prompts that run as keys and values, so nothing of it is constant."
                )
            if safe_merge and not all(p.isfinite().all() for p in store.parameters_of(name).values()):
                raise ValueError(f"adapter {name!r} holds values that are not finite.")
        for layer in store.layers if store is not None else ():
            layer.merge_prompts(list(names))

    def unmerge_adapter(self) -> None:
        """Go back from constant keys and values to prompts."""
        store = find_store(self.model)
        for layer in store.layers if store is not None else ():
            layer.unmerge_prompts()

    def train(self, mode: bool = True) -> VPTModel:
        """Training mode for the adapters and the head; frozen parts stay in eval mode (`base_in_eval`)."""
        super().train(mode)
        store = find_store(self.model)
        if mode and store is not None and any(config.base_in_eval for config in store.configs.values()):
            set_frozen_eval(store.encoder)
            set_frozen_eval_outside(store.root, store.encoder)
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
        store = find_store(self.model)
        if store is not None:
            store.detach()
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
        mine = re.compile(rf"prompt_tuner\.{cls.prefix}[a-z_]+\.{re.escape(adapter_name)}\.")
        plain = {key.replace("_fsdp_wrapped_module.", ""): value for key, value in state_dict.items()}
        found = {key: value for key, value in plain.items() if mine.search(key)}
        found.update(cls._get_learnable_bias_state_dict(model, plain, config))
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """`prompt_tuner.vpt_prompts.default.3` is stored as `prompt_tuner.vpt_prompts.3`."""
        return re.sub(rf"(\.{cls.prefix}[a-z_]+)\.{re.escape(adapter_name)}(?=\.)", r"\1", key)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Put the adapter's name back and the path of this model's encoder for the one the file was saved under."""
        store = find_store(model)
        if store is None:
            raise ValueError(f"adapter {adapter_name!r}: this model has no prompts that values could be loaded into.")
        root = next(path for path, module in model.named_modules() if module is store.root)
        path = ".".join(filter(None, (root, "prompt_tuner")))
        remapped, found = {}, {}
        for key, value in state_dict.items():
            match = re.match(rf"^(?:.*\.)?prompt_tuner\.({cls.prefix}[a-z_]+)\.(.+)$", key)
            if match:
                found[f"{match[1]}.{adapter_name}.{match[2]}"] = value
            else:
                remapped[key] = value
        try:
            check_fit(store, adapter_name, found)
        except ValueError:
            take_out(model, store, adapter_name)
            raise
        return remapped | {f"{path}.{key}": value for key, value in found.items()}
