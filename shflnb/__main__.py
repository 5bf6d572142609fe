"""`python -m shflnb` is the `shflnb` command."""

from .cli import main

if __name__ == "__main__":
    main()
