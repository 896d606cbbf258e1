"""What the package needs of others, by its own metadata, and what of it is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata, requires, version

from packaging.requirements import Requirement


class VersionError(ImportError):
    """A package is installed in a version that this one does not work with."""


def needed(extra: str = "") -> list[Requirement]:
    """Return what the package needs, or what one of its extras needs on top, extras of extras included.

    Empty in a source tree that is not installed.
    """
    try:
        lines = requires("vpt_peft") or []
    except PackageNotFoundError:
        return []
    found: list[Requirement] = []
    for each in map(Requirement, lines):
        always = each.marker is None or each.marker.evaluate({"extra": ""})
        of_extra = each.marker is not None and not always and each.marker.evaluate({"extra": extra})
        wanted = of_extra if extra else always
        if wanted and each.name.replace("-", "_") == "vpt_peft":
            found += [more for name in sorted(each.extras) for more in needed(name)]
        elif wanted:
            found.append(each)
    return found


def known_extras() -> list[str]:
    """Return the extras that the package was installed with the knowledge of."""
    try:
        return metadata("vpt_peft").get_all("Provides-Extra") or []
    except PackageNotFoundError:
        return []


def installed(name: str) -> str | None:
    """Return the version of a package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def lacks(requirement: Requirement) -> bool:
    """Whether a package is missing or in a version outside of the range."""
    found = installed(requirement.name)
    return found is None or not requirement.specifier.contains(found, prereleases=True)


def check_versions() -> None:
    """Check what is installed against the ranges that the package itself was installed with.

    Raises:
        VersionError: a package is outside its range; all that are, are named.
    """
    wrong = [each for each in needed() if lacks(each)]
    if wrong:
        found = ", ".join(f"{each.name} {installed(each.name) or 'missing'}" for each in wrong)
        commands = " ".join(f"'{each}'" for each in wrong)
        raise VersionError(
            f"vpt_peft needs {', '.join(map(str, wrong))}, but found {found}: pip install -U {commands}"
        )
