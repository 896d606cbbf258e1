"""Two small backbones that travel with the package, so that a first run needs no network.

`embedded` was pre-trained with labels, `embedded-mae` without; each is a plain Hugging Face folder with a card.
"""

from pathlib import Path


EMBEDDED_FOLDERS = {"embedded": "vit", "embedded-mae": "mae"}


def embedded_path(name: str) -> Path:
    """The folder of an embedded backbone, for any `from_pretrained`.

    Args:
        name: "embedded" (supervised ViT) or "embedded-mae" (masked autoencoder).

    Raises:
        ValueError: for any other name.
    """
    if name not in EMBEDDED_FOLDERS:
        raise ValueError(
            f"name={name!r} is no embedded backbone; use one of {sorted(EMBEDDED_FOLDERS)}, or give a Hub id or a "
            "folder as model_name_or_path."
        )
    return Path(__file__).parent / EMBEDDED_FOLDERS[name]
