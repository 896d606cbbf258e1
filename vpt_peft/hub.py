"""Upload a trained folder to the Hub."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HTTPError

from .embedded import EMBEDDED_FOLDERS
from .reporting.card import retarget
from .training.checkpoints import BASELINE_CONFIG
from .training.inference import SHARED_FILES, backbone_name


logger = logging.getLogger(__name__)


def push_adapter(
    folder: str | Path,
    repo_id: str,
    token: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> str:
    """Upload weights, configs, results and card of a trained folder in one commit, and return the commit's URL.

    The card's snippet then loads `repo_id`. The local files are only read.

    Args:
        folder: output folder of a training run, or any PEFT adapter folder.
        repo_id: "user/name"; made where it does not exist.
        token: Hub token; by default the one of `hf auth login` or `HF_TOKEN`.
        private: make a new repository private.
        revision: branch to commit to, made where it does not exist; by default main.

    Raises:
        FileNotFoundError: the folder holds nothing to push.
        OSError: the upload failed; the message says how to go on. The local files are whole.
    """
    folder = Path(folder)
    if not any((folder / name).is_file() for name in ("adapter_config.json", BASELINE_CONFIG)):
        raise FileNotFoundError(f"{str(folder)!r} holds no trained adapter (adapter_config.json); train one first.")
    _warn_of_local_backbone(folder)
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
        operations = []
        for path in sorted({path for pattern in SHARED_FILES for path in folder.glob(pattern)}):
            content: str | bytes = str(path)
            if path.name == "README.md":
                content = retarget(ModelCard.load(path).content, repo.repo_id).encode()
            elif path.name == "adapter_config.json":
                content = _portable(path).encode()
            operations.append(CommitOperationAdd(path.name, content))
        commit = api.create_commit(
            repo.repo_id, operations, commit_message="Upload adapter with vpt_peft", revision=revision
        )
    except (OSError, HTTPError) as error:
        raise OSError(
            f"pushing {str(folder)!r} to {repo_id!r} failed: {str(error).strip().splitlines()[0].rstrip('.')}. The local files are "
            f"whole; once the network, the token (hf auth login, or HF_TOKEN) and the name are right, run: "
            f"vpt-peft push {folder} {repo_id}"
        ) from error
    logger.info("Pushed %s to %s.", folder, commit.commit_url)
    return str(commit.commit_url)


def _warn_of_local_backbone(folder: Path) -> None:
    """Say so where the backbone is a folder of this machine, as nobody else can then load the adapter."""
    for name in ("adapter_config.json", BASELINE_CONFIG):
        if (folder / name).is_file():
            recorded = json.loads((folder / name).read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
            backbone = backbone_name(recorded)
            if backbone not in EMBEDDED_FOLDERS and (
                Path(backbone).is_absolute() or Path(backbone).expanduser().exists()
            ):
                logger.warning(
                    "%s and the card name the backbone by a path of this machine, %r, so nobody else can load it. Push "
                    "the backbone too and put its Hub id there in place of the path.",
                    name,
                    backbone,
                )


def _portable(path: Path) -> str:
    """Return an adapter's configuration without the path that an embedded backbone has on this machine."""
    text = path.read_text(encoding="utf-8")
    recorded = json.loads(text).get("base_model_name_or_path") or ""
    return text.replace(json.dumps(recorded), json.dumps(backbone_name(recorded)))
