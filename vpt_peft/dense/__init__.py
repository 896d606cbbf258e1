"""Models of our own for dense tasks: a plain ViT, which has no such model in transformers, with a small head."""

from importlib.util import find_spec


def need_dense() -> None:
    """Check that what the extra `dense` installs is there, before hours of training need it.

    Raises:
        ModuleNotFoundError: something is not; it is named with the remedy.
    """
    missing = [name for name in ("faster_coco_eval", "kornia", "scipy", "supervision") if find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"boxes and masks need {', '.join(missing)}: pip install 'vpt_peft[dense]'.")
