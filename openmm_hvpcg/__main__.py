"""``python -m openmm_hvpcg`` is the command line."""

from openmm_hvpcg.cli import main

if __name__ == "__main__":
    main()
