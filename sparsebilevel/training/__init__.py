"""Training runs: what one consists of (`Config`), its course (`train`), and how it is kept on disk and resumed."""

from .config import Config
from .loop import Interrupted, TrainingError, train

__all__ = ["Config", "Interrupted", "TrainingError", "train"]
