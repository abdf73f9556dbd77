"""A study: one protocol, one output folder, eight stages. Imports every room; only the command line imports it.

``folder`` knows the layout and is light; ``stages`` imports torch and OpenMM: the command line asks for it last.
"""
