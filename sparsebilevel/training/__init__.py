"""Training runs: what one consists of (`Config`), its course (`train`), and how it is kept on disk and resumed.

The course is loaded at first use: the command line lists the fields of `Config` without torch.
"""

from typing import TYPE_CHECKING, Any

from .config import Config

__all__ = ["Config", "Interrupted", "TrainingError", "train"]

if TYPE_CHECKING:
    from .loop import Interrupted, TrainingError, train
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import loop

        return getattr(loop, name)
