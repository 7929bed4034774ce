"""The command `ltood`. It reads its arguments before it imports ltood_fast, because torch takes seconds to import."""

import sys
from importlib.machinery import SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_loader
from pathlib import Path


def main() -> int:
    folder = Path(find_spec("ltood_fast").submodule_search_locations[0])
    for name in ("_signals", "cli"):  # cli needs only _signals until it runs a command, which imports the package
        loader = SourceFileLoader(f"ltood_fast.{name}", str(folder / f"{name}.py"))
        module = module_from_spec(spec_from_loader(loader.name, loader))
        sys.modules[loader.name] = module
        loader.exec_module(module)
    return module.main()
