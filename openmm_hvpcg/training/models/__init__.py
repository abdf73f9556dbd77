"""Energy modules: priors, networks, and their sum. They compute energies only; see ``training.derivatives``."""
