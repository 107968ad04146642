"""sparsebilevel: train neural networks whose sparsity mask is learned.

Its names are those of `_api`, which is imported, and torch with it, when one of them is first asked for. Whoever wants
no more than the operators in ``torch.ops.sparsebilevel`` imports `sparsebilevel.kernels`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if find_spec("sparsebilevel.kernels") is None:
    raise ImportError(
        f"this is the source tree of sparsebilevel ({__path__[0]}), which hides the installed package. Start Python in "
        "another folder, use the command `sparsebilevel` (under torchrun: --no-python sparsebilevel), or install with "
        "`pip install -e .`"
    )

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ._api import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        if not name.startswith("__") and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f".{name}", __name__)  # by itself: the names need not be there, or be half there
        if name == "__all__" or not name.startswith("__"):
            api = import_module("._api", __name__)
            globals().update({n: getattr(api, n) for n in api.__all__}, __all__=api.__all__)
        if name in globals():  # the modules behind the names too
            return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
