"""The `ds4` command: what a person or a script at a terminal sees.

The only part of the package that prints, reads the environment or decides exit codes. It talks to
`ds4py.Engine` and `Session` and holds token ids and text events, never an array.
"""
