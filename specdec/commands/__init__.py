"""The commands of `specdec`: a file each, whose `run` is the command."""

COMMANDS = (
    "demo",
    "generate",
    "chat",
    "trace",
    "bench",
    "roofline",
    "replay",
    "distill",
    "train-medusa",
    "tune-tree",
)
"""By name, in the order of the help text; `train-medusa` is `run` of `specdec/commands/train_medusa.py`."""
