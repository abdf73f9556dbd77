"""The atomistic side: inputs to systems, systems to frames."""
