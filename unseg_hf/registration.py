"""When transformers gets to know this package: at once where it is loaded, and otherwise as soon as it is.

Registering takes the classes, and with them torch and transformers: seconds that `unseg --help`, or a program that
only reads and writes images, should not wait for.
"""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder


def with_transformers(register: Callable[[], None]) -> None:
    """Call `register` now if transformers is loaded, else after the import that loads it."""
    if "transformers" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterImport(register))


class _AfterImport(MetaPathFinder):
    """Watches imports until one has loaded transformers; then it registers, and leaves.

    Where a module of this package loads transformers, it waits for the end of that module: its classes are needed.
    """

    def __init__(self, register: Callable[[], None]):
        self._register = register
        self._running = 0  # imports of transformers and of this package's modules, one within the other

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname != "transformers" and not fullname.startswith(f"{__package__}."):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module) -> None:
            self._running += 1
            try:
                execute(module)
            finally:
                self._running -= 1
            if not self._running and "transformers" in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                self._register()

        spec.loader.exec_module = execute_and_register
        return spec
