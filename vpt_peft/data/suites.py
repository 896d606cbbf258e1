"""VTAB-1k and FGVC: the data sets in them, how many classes each has, and where they come from.

VTAB-1k: Zhai et al. 2019, arXiv 1910.04867. FGVC: the five sets of Jia et al. 2022, arXiv 2203.12119.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .images import DataError, DataNotFoundError
from .listed import is_listed, read_listed


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SuiteData:
    """One data set of a suite.

    Args:
        folder (`str`): its name in the layout in circulation.
        group (`str`): the group it counts in.
        num_classes (`int`): labels it must have.
        test_images (`int`, *optional*): images of the published test split.
    """

    folder: str
    group: str
    num_classes: int
    test_images: int | None = None


@dataclass(frozen=True)
class Suite:
    """Data sets that are reported together.

    Args:
        name (`str`): as given to `--suite`.
        sets (`tuple[SuiteData, ...]`): in the order of the papers' tables.
        augmentation (`str`): of the papers' protocol.
        repository (`str`): data set repository on the Hub.
        archive (`str`, *optional*): file in it that holds everything; without one, images come from their makers.
    """

    name: str
    sets: tuple[SuiteData, ...]
    augmentation: str
    repository: str
    archive: str | None = None

    @property
    def groups(self) -> dict[str, str] | None:
        """The group of each data set by its name, or None where there is only one."""
        found = {each.folder: each.group for each in self.sets}
        return found if len(set(found.values())) > 1 else None


_N, _SP, _ST = "natural", "specialized", "structured"
_VTAB = (
    ("cifar", _N, 100, 10_000),
    ("caltech101", _N, 102, 6_084),
    ("dtd", _N, 47, 1_880),
    ("oxford_flowers102", _N, 102, 6_149),
    ("oxford_iiit_pet", _N, 37, 3_669),
    ("svhn", _N, 10, 26_032),
    ("sun397", _N, 397, 21_750),
    ("patch_camelyon", _SP, 2, 32_768),
    ("eurosat", _SP, 10, 5_400),
    ("resisc45", _SP, 45, 6_300),
    ("diabetic_retinopathy", _SP, 5, 42_670),
    ("clevr_count", _ST, 8, 15_000),
    ("clevr_dist", _ST, 6, 15_000),
    ("dmlab", _ST, 6, 22_735),
    ("kitti", _ST, 4, 711),
    ("dsprites_loc", _ST, 16, 73_728),
    ("dsprites_ori", _ST, 16, 73_728),
    ("smallnorb_azi", _ST, 18, 12_150),
    ("smallnorb_ele", _ST, 9, 12_150),
)
_FGVC = (
    ("CUB_200_2011", 200, 5_794),
    ("nabirds", 555, 24_633),
    ("OxfordFlower", 102, 6_149),
    ("StanfordDogs", 120, 8_580),
    ("StanfordCars", 196, 8_041),
)
SUITES = {
    "vtab-1k": Suite("vtab-1k", tuple(SuiteData(*each) for each in _VTAB), "resize", "XiN0919/VTAB-1k", "vtab-1k.zip"),
    "fgvc": Suite(
        "fgvc", tuple(SuiteData(name, "fine", *counts) for name, *counts in _FGVC), "resize_crop_flip", "XiN0919/FGVC"
    ),
}


def suite_folders(suite: Suite, folder: Path | None, token: str | None = None) -> Mapping[str, Path]:
    """Return the folders of a suite's data sets by their names, checked.

    Args:
        suite: one of `SUITES`.
        folder: holds a folder for each data set; without it the suite is downloaded, where it is in one archive.
        token: Hub token.

    Raises:
        DataNotFoundError: a data set is missing, or the suite cannot be downloaded.
        DataError: a data set has another number of classes, or lists that cannot be read.
    """
    if folder is None:
        folder = _download(suite, token)
    if not any((folder / each.folder).is_dir() for each in suite.sets) and (folder / suite.name).is_dir():
        # The archive holds a folder of its own name
        folder = folder / suite.name
    folders = {each.folder: folder / each.folder for each in suite.sets}
    missing = [name for name, path in folders.items() if not is_listed(path)]
    if missing:
        raise DataNotFoundError(
            f"suite={suite.name!r}: {folder} lacks {', '.join(missing)}, each a folder with lists of images; "
            f"https://huggingface.co/datasets/{suite.repository} has them."
        )
    for each in suite.sets:
        _check(suite, each, folders[each.folder])
    return folders


def _check(suite: Suite, wanted: SuiteData, folder: Path) -> None:
    splits = read_listed(folder)
    for name in ("train", "validation", "test"):
        if name not in splits:
            raise DataError(f"suite={suite.name!r}: {folder} has no list of {name} images.")
    found = len(splits["train"].features["label"].names)
    if found != wanted.num_classes:
        raise DataError(
            f"suite={suite.name!r}: {folder} has {found} classes instead of {wanted.num_classes}; these are other data."
        )
    if wanted.test_images is not None and len(splits["test"]) != wanted.test_images:
        logger.warning(
            "%s has %d test images and not the %d of the published split; results cannot be compared.",
            folder,
            len(splits["test"]),
            wanted.test_images,
        )


def _download(suite: Suite, token: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.constants import HF_HOME
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if suite.archive is None:
        raise DataNotFoundError(
            f"suite={suite.name!r}: give its folder with --suite_dir; the lists are at "
            f"https://huggingface.co/datasets/{suite.repository}, the images come from their makers."
        )
    target = Path(HF_HOME) / "vpt_peft" / "suites" / suite.name
    if (target / ".complete").is_file():
        return target
    try:
        path = hf_hub_download(suite.repository, suite.archive, repo_type="dataset", token=token)
        (info,) = HfApi(token=token).get_paths_info(suite.repository, [suite.archive], repo_type="dataset")
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise DataNotFoundError(
            f"suite={suite.name!r} cannot be downloaded ({' '.join(str(error).split())}); give its folder with "
            "--suite_dir."
        ) from error
    expected = info.lfs.sha256 if info.lfs is not None else None  # type: ignore[union-attr]
    found = _sha256(Path(path)) if expected else None
    if found != expected:
        raise DataError(f"suite={suite.name!r}: {path} has SHA-256 {found}, the Hub says {expected}; delete it.")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(target)
    (target / ".complete").touch()
    return target


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
