"""`python -m dia_lightning`: the same program as the `lightning` and `dia` scripts."""

from dia_lightning.cli import main

if __name__ == "__main__":
    main()
