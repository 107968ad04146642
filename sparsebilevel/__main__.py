"""``python -m sparsebilevel``, and what torchrun starts: ``torchrun -m sparsebilevel train ...``."""

from .cli import main

if __name__ == "__main__":
    main()
