"""Write docs/encoders.md: what every vision encoder of transformers takes, tried on tiny models of the tests.

python scripts/encoders_page.py
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import get_peft_model


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from architectures import ARCHITECTURES  # noqa: E402
from encoder_fixtures import build, inputs_of  # noqa: E402

from vpt_peft import GatedVPTConfig, VPTConfig  # noqa: E402


VARIANTS = {
    "deep": VPTConfig,
    "shallow": lambda: VPTConfig(deep=False),
    "gated": GatedVPTConfig,
    "pooled": lambda: VPTConfig(pooling="image"),
    "biases": lambda: VPTConfig(bias="all"),
}
# What tells architectures of one class apart
FORMS = {
    "beit": "bias of each block",
    "beit_shared_bias": "shared bias",
    "internvl_vision_qk_norm": "normed keys",
    "yolos_mid_pos": "positions in each block",
    "timesformer": "divided space and time",
    "timesformer_joint": "joint space and time",
}


def tensors(outputs: object) -> list[torch.Tensor]:
    """All tensors in a nest of outputs."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    items = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, (tuple, list)) else ()
    return [tensor for item in items for tensor in tensors(item)]


def attempt(name: str, variant: str) -> tuple[bool, str]:
    """Whether a training step runs, and if not the reason."""
    torch.manual_seed(0)
    try:
        model = get_peft_model(build(name), VARIANTS[variant]()).train()
        outputs = model(**inputs_of(name))
        trained = [value for value in tensors(outputs) if value.requires_grad]
        torch.stack([value.float().sum() for value in trained]).sum().backward()
    except Exception as error:
        return False, " ".join(str(error).split())
    return True, ""


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows, reasons, deep = [], [], 0
    for name, architecture in ARCHITECTURES.items():
        tried = {variant: attempt(name, variant) for variant in VARIANTS}
        deep += tried["deep"][0]
        class_name = architecture.model.rsplit(".", 1)[-1]
        form = f" ({FORMS[name]})" if name in FORMS else ""
        rows.append(
            f"| `{class_name}`{form} | " + " | ".join("yes" if ok else "no" for ok, _ in tried.values()) + " |"
        )
        if not tried["deep"][0]:
            reasons.append(f"- `{class_name}`: {tried['deep'][1]}")
        print(name, {variant: ok for variant, (ok, _) in tried.items()}, flush=True)
    version = ".".join(transformers.__version__.split(".")[:2])
    page = [
        "---\nhide: [navigation]\n---",
        "# Encoders",
        "Blocks, norms, key and value projections and class tokens are found by running the model once on a small "
        "random input, not by a table of names. So encoders that are not listed here have good chances too, your own "
        "included; where something is missing, the error says what.",
        f"This table was made by `python scripts/encoders_page.py` with transformers {version}: each encoder in small, "
        f"with random weights, one training step for each variant. {deep} of {len(ARCHITECTURES)} take deep prompts.",
        "| encoder | " + " | ".join(VARIANTS) + " |\n|---|" + "---|" * len(VARIANTS) + "\n" + "\n".join(rows),
        "*deep* is `VPTConfig()`, *shallow* `VPTConfig(deep=False)`, *gated* `GatedVPTConfig()`, *pooled* "
        '`VPTConfig(pooling="image")`, *biases* `VPTConfig(bias="all")`. Shallow and gated prompts need one sequence of '
        "tokens, or Swin's windows; pooling needs a final norm over all tokens.",
        "## Why not",
        "\n".join(reasons),
    ]
    (ROOT / "docs/encoders.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
