"""Check what of the package runs without torch: that it compiles, the members added to PEFT's enumeration, the help."""

from __future__ import annotations

import compileall
import importlib.util
import pickle
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType


ROOT = Path(__file__).parents[1]


def load(name: str, path: Path) -> ModuleType:
    """A module by its file, without the packages it stands in."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Run all checks; the first that fails ends the program."""
    for folder in ("vpt_peft", "tests", "scripts", "benchmarks"):
        assert compileall.compile_dir(ROOT / folder, quiet=1, force=True), folder
    add_member = load("enumeration", ROOT / "vpt_peft" / "enumeration.py").add_member
    found = distribution("peft").locate_file("peft/utils/peft_types.py")
    kinds = load("peft_types", Path(str(found))).PeftType
    before = list(kinds)
    for name in ("VPT", "GATED_PROMPT"):
        member = add_member(kinds, name)
        assert kinds(name) is kinds[name] is getattr(kinds, name) is member is add_member(kinds, name)
        assert (member.value, member.name, str(member), hash(member)) == (name, name, f"PeftType.{name}", hash(name))
        assert pickle.loads(pickle.dumps(member)) is member and member in kinds and member == name
    assert list(kinds) == [*before, kinds.VPT, kinds.GATED_PROMPT] and isinstance(kinds.VPT, str)
    for words in (["--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-m", "vpt_peft", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip(), done.stderr
    print(f"Python {sys.version.split()[0]}: compiled, enumeration extended, help shown")


if __name__ == "__main__":
    main()
