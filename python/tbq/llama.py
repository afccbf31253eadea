"""llama-cpp-python on the patched llama.cpp: a model in this process, with a tbq cache.

    from tbq.llama import Llama
    model = Llama("model.gguf", kv="tbq4_0", n_ctx=32768)
    model.create_chat_completion([{"role": "user", "content": "Hello"}])

The bindings are those of the release that the libraries were built from, which tbq brings along; an installed
llama-cpp-python of that release is used instead.  Importing this module makes `import llama_cpp` the same thing, so plain
integers work there: llama_cpp.Llama(..., type_k=tbq.types["tbq4_0"].id, flash_attn=True).

Importing it raises TBQError if llama_cpp is another release or was imported before with other libraries.
"""
import importlib.util
import os
import pathlib
import re
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from tbq._types import types
from tbq.errors import TBQError
from tbq.paths import paths
from tbq.server import choose

_OURS = pathlib.Path(__file__).resolve().parent / "_vendor" / "llama_cpp"


def _check_version(version: str | None, wanted: str, where: object) -> None:
    if version != wanted:
        raise TBQError(f"llama-cpp-python {version or 'of an unknown release'} ({where}) does not fit these libraries, which are "
                       f"{wanted}: `pip uninstall llama-cpp-python` (tbq brings the bindings along), or install that release")


def _check_library(module: ModuleType, folder: pathlib.Path) -> None:
    loaded = pathlib.Path(str(module.llama_cpp._lib._name)).resolve().parent
    if loaded != folder.resolve():
        raise TBQError(f"llama_cpp was imported before, with the libraries in {loaded}, which have no tbq types; "
                       "import tbq.llama before llama_cpp, in a new process")


def _spec() -> ModuleSpec:
    """The installed llama_cpp, or ours."""
    found = importlib.util.find_spec("llama_cpp")
    if found is not None and found.origin is not None:
        return found
    if not (_OURS / "__init__.py").is_file():
        raise TBQError("this build of tbq has no bindings (it was made from a llama.cpp tree); install "
                       f"{paths()['llama_cpp_python']} with CMAKE_ARGS=-DLLAMA_BUILD=OFF")
    spec = importlib.util.spec_from_file_location("llama_cpp", _OURS / "__init__.py", submodule_search_locations=[str(_OURS)])
    assert spec is not None
    return spec


def _load() -> ModuleType:
    """llama_cpp, on our libraries."""
    wanted, folder = paths()["llama_cpp_python"].partition("==")[2], pathlib.Path(paths()["lib"])
    if (module := sys.modules.get("llama_cpp")) is not None:
        _check_version(getattr(module, "__version__", None), wanted, getattr(module, "__file__", "?"))
        _check_library(module, folder)
        return module
    spec = _spec()
    assert spec.origin is not None and spec.loader is not None
    version = re.search(r'__version__ = "([^"]*)"', pathlib.Path(spec.origin).read_text(encoding="utf-8"))
    _check_version(version[1] if version else None, wanted, pathlib.Path(spec.origin).parent)
    # The variable is how the bindings take a folder; nobody else shall see it.
    before = os.environ.get("LLAMA_CPP_LIB_PATH")
    os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules["llama_cpp"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        for name in [name for name in sys.modules if name == "llama_cpp" or name.startswith("llama_cpp.")]:
            del sys.modules[name]
        if isinstance(error, ModuleNotFoundError):
            raise TBQError(f"llama_cpp needs {error.name}: pip install 'ggml-tbq[llama]'") from None
        raise
    finally:
        if before is None:
            del os.environ["LLAMA_CPP_LIB_PATH"]
        else:
            os.environ["LLAMA_CPP_LIB_PATH"] = before
    return module


if TYPE_CHECKING:
    _Base = Any
else:
    _Base = _load().Llama


def type_id(name: str | int) -> int:
    """GGML's number of a type: 644 of "tbq4_0", 1 of "f16"; numbers stay.  TBQError for an unknown name."""
    if isinstance(name, int):
        return name
    if name in types:
        return types[name].id
    import gguf

    known = gguf.GGMLQuantizationType.__members__
    if not isinstance(name, str) or name.upper() not in known:
        raise TBQError(f"cache type {name!r} is not one of {', '.join(types)}, f16, q8_0, q4_0, ...")
    return int(known[name.upper()])


class Llama(_Base):  # type: ignore[misc]
    """llama_cpp.Llama with a cache chosen by name, and flash attention on, which quantized values need.

    model_path: a GGUF file.  kv: "auto" (what tbq.plan recommends), a cache type, or "K/V"; type_k and type_v, names or
    GGML's numbers, replace a side of it.  The rest is llama_cpp.Llama's, n_ctx above all: its default is 512 tokens, 0 is what
    the model was trained for.
    Raises TBQError for an unknown type, a pair that llama.cpp refuses for this model, and a model that is no file.
    """

    def __init__(self, model_path: str | os.PathLike[str], kv: str = "tbq4_0", *, type_k: str | int | None = None,
                 type_v: str | int | None = None, n_ctx: int = 512, flash_attn: bool = True, **options: Any) -> None:
        self.plan = None  #: the tbq.Plan of the cache, unless a type was given as a number
        if isinstance(type_k, int) or isinstance(type_v, int):
            k, _, v = kv.partition("/")
        else:
            if type_k or type_v:
                k, _, v = kv.partition("/")
                kv = f"{type_k or k}/{type_v or v or k}"
            k, v, self.plan = choose(model_path, kv, context=n_ctx or None, parallel=1)
        type_k, type_v = type_k or k, type_v or v or k
        super().__init__(os.fspath(model_path), n_ctx=n_ctx, type_k=type_id(type_k), type_v=type_id(type_v), flash_attn=flash_attn, **options)
