"""A model.py, and the Python files beside it, as modules of one instance alone.

Triton gives each instance a process. Here each instance gets a package: `millrace_model_7`, whose path is the version's
folder and then the model's. model.py is a submodule of it, and so becomes whatever a file of these folders imports from
them: `import net` in one of them is an import of `millrace_model_7.net`. So no instance sees the globals of another,
files of the same name do not meet, and `sys.path` stays as it is. What is not there is imported as ever.

An import that does not come from a file of the model, but on its behalf (an unpickled class that says it is from `net`,
`importlib.import_module("net")`), finds the same module, told by who is on the stack. Python then keeps it in
`sys.modules` as `net`; `forget_aliases` takes it out again. Until then a library that imports `net` for another model
finds it, too.

Source is compiled at each load: bytecode in a model's folder would be a change there, and Python takes a file of the
same second and size for the same file.
"""

import builtins
import importlib
import importlib.util
import itertools
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

# Always the server's own, whatever lies in a model's folder.
PROVIDED = frozenset({"triton_python_backend_utils", "c_python_backend_utils"})

_PREFIX = "millrace_model_"
_numbers = itertools.count(1)
_loaded: dict[str, "PythonModule"] = {}


class PythonModule:
    """The modules of one instance.

    Attributes:
        name: of their package.
        owner: whatever the instance wants to find again from a call of its code, see `caller`.
    """

    def __init__(self, file: Path, owner: Any = None) -> None:
        self.name = f"{_PREFIX}{next(_numbers)}"
        self.owner = owner
        self._file = file
        self._folders = [str(file.parent), str(file.parent.parent)]
        self._is_own: dict[str, bool] = {}
        self._aliases: list[str] = []
        self.builtins = vars(builtins) | {"__import__": self._import}

    def load(self) -> ModuleType:
        """Run the file. Raises what it raises; then nothing of it stays."""
        package = ModuleType(self.name)
        package.__path__ = self._folders
        sys.modules[self.name] = package
        _loaded[self.name] = self
        self._forget_folders()
        name = f"{self.name}.{self._file.stem}"
        loader = _SourceLoader(name, str(self._file), self.builtins)
        module = ModuleType(name)
        module.__spec__ = importlib.util.spec_from_file_location(name, self._file, loader=loader)
        module.__file__, module.__package__, module.__loader__ = str(self._file), self.name, loader
        sys.modules[name] = module
        try:
            loader.exec_module(module)
        except BaseException:
            self.unload()
            raise
        return module

    def unload(self) -> None:
        """Take every module out of the interpreter's tables; whoever still runs one keeps it."""
        self.forget_aliases()
        self._forget_folders()
        _loaded.pop(self.name, None)
        for name in list(sys.modules):  # a copy: other threads import
            if name == self.name or name.startswith(self.name + "."):
                del sys.modules[name]

    def forget_aliases(self) -> None:
        """Take out what was imported on the model's behalf under the plain name, which another model may use too."""
        while self._aliases:
            sys.modules.pop(self._aliases.pop(), None)

    def has(self, name: str) -> bool:
        """Whether `import name` in the model means a file of its own."""
        if name not in self._is_own:
            self._is_own[name] = self._find(name)
        return self._is_own[name]

    def alias(self, name: str, private: str) -> ModuleSpec:
        """How to import the module `private` as `name`."""
        self._aliases.append(name)
        return ModuleSpec(name, _AliasLoader(private))

    def _find(self, name: str) -> bool:
        if name in sys.stdlib_module_names or name in PROVIDED:
            return False
        spec = PathFinder.find_spec(f"{self.name}.{name}", self._folders)
        if spec is None:
            return False
        # A folder without __init__.py may hold weights: it is a package only if nothing else is.
        return spec.origin is not None or PathFinder.find_spec(name) is None

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        """`__import__` of the model's files."""
        first = name.partition(".")[0]
        # A list: C code that imports, like pickle's, on behalf of this file; it looks into sys.modules afterwards.
        if isinstance(fromlist, list) and not level and self.has(first):
            self._forget_foreign(first)
        if level or isinstance(fromlist, list) or not self.has(first):
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        module = importlib.import_module(f"{self.name}.{name}")
        if fromlist:  # which may name submodules
            return builtins.__import__(module.__name__, globals, locals, fromlist)
        return sys.modules[f"{self.name}.{first}"]

    def _forget_foreign(self, first: str) -> None:
        """Take out what another model, which is loaded or runs at this moment, has under that plain name."""
        if not self._is_foreign(sys.modules.get(first)):
            return
        for name, module in list(sys.modules.items()):  # a copy: other threads import
            if name.partition(".")[0] == first and self._is_foreign(module):
                sys.modules.pop(name, None)

    def _is_foreign(self, module: ModuleType | None) -> bool:
        package = getattr(module, "__name__", "").partition(".")[0]
        return package.startswith(_PREFIX) and package != self.name

    def _forget_folders(self) -> None:
        """Python remembers what is in a folder; a model may have changed since."""
        for path in list(sys.path_importer_cache):
            if path.startswith(self._folders[1]):
                sys.path_importer_cache.pop(path, None)


def caller(only: bool = False) -> PythonModule | None:
    """Whose code is on the stack of this thread.

    Args:
        only: where none is there, as in a thread that a library started: the one that is loaded, if there is just one.
    """
    frame = sys._getframe(1)
    while frame is not None:
        found = _loaded.get(str(frame.f_globals.get("__name__")).partition(".")[0])
        if found is not None:
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return next(iter(_loaded.values())) if only and len(_loaded) == 1 else None


class _SourceLoader(SourceFileLoader):
    """Loads a file of a model: fresh from its source, with the model's own `import`."""

    def __init__(self, name: str, path: str, names: dict[str, Any]) -> None:
        super().__init__(name, path)
        self._builtins = names

    def get_code(self, fullname: str) -> CodeType:
        code: CodeType = self.source_to_code(self.get_data(self.path), self.path)
        return code

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = self._builtins
        super().exec_module(module)


class _AliasLoader(Loader):
    """Gives a model's module under another name."""

    def __init__(self, private: str) -> None:
        self._private = private

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._private)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the importer has put the alias's there


class _OwnFiles(MetaPathFinder):
    """Finds `millrace_model_7.net` and, below an alias, `net.layers`."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        owner = _loaded.get(name.partition(".")[0])
        if owner is not None:
            spec = PathFinder.find_spec(name, path)
            if spec is not None and isinstance(spec.loader, SourceFileLoader):
                spec.loader = _SourceLoader(name, spec.loader.path, owner.builtins)
            return spec
        above, _, last = name.rpartition(".")
        package = getattr(sys.modules.get(above), "__name__", "")
        owner = _loaded.get(package.partition(".")[0])
        return owner.alias(name, f"{package}.{last}") if owner is not None else None


class _OnBehalf(MetaPathFinder):
    """Finds what nothing else finds, and a model on the stack has."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        owner = caller() if path is None and _loaded else None
        return owner.alias(name, f"{owner.name}.{name}") if owner is not None and owner.has(name) else None


sys.meta_path.insert(0, _OwnFiles())
sys.meta_path.append(_OnBehalf())
