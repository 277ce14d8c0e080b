"""A program: one model, one way to mark and call it, and the operations to run, as plain data."""

import dataclasses

from nets import KINDS

DOORS = ("eager", "transform", "compile")
# "class" and "blocks" mark classes, "nested" both, the others instances; in "partial" the last layer is trainable, in
# "unfrozen" everything is.
MARKS = ("instance", "class", "body", "blocks", "nested", "partial", "unfrozen")
# In "Shaped" most kinds of arguments and outputs meet.
NETS = (*KINDS, "Shaped", "Shaped")
# What of the outputs of a whole backbone is stored, and how.
KEPT = (*["whole"] * 5, "output", "output", "bfloat16", "int8")
MEMORY = (1_000_000, 1_000_000, 400, 0)

# How often each operation is drawn.
OPERATIONS = {
    "call": 16,
    "every_form": 4,
    "train_step": 4,
    "bypass": 1,
    "input_gradient": 1,
    "weights": 2,
    "write": 5,
    "load": 2,
    "replace": 2,
    "code": 3,
    "memory_format": 1,
    "dtype": 2,
    "attribute": 3,
    "asking": 1,
    "freezing": 1,
    "settings": 3,
    "mode": 2,
    "autocast": 2,
    "copy": 2,
    "switch": 2,
    "clear": 1,
    "mark_again": 1,
}
NUMBERS = 1000


@dataclasses.dataclass(frozen=True)
class Program:
    """What to run.

    Parameters
    ----------
    net, door, mark : str
        Which backbone, how it is called, how it is marked.
    persistent : bool
        Whether rows are kept on disk.
    memory : int
        Bytes that one region may hold in memory.
    seed : int
        Of the weights, the pool of rows, the forms that calls take, and how ``torch.compile`` is asked.
    steps : tuple of (str, int)
        Operations, each with the number that decides its details.
    kept : str
        What of the output is stored: see ``pair.kept_options``.
    """

    net: str
    door: str
    mark: str
    persistent: bool
    memory: int
    seed: int
    steps: tuple[tuple[str, int], ...]
    kept: str = "whole"

    @classmethod
    def random(cls, draw, doors=DOORS, marks=MARKS, steps=(8, 24)):
        """A program drawn from a ``random.Random``."""
        names = draw.choices(list(OPERATIONS), list(OPERATIONS.values()), k=draw.randint(*steps))
        return cls(
            net=draw.choice(NETS),
            door=draw.choice(doors),
            mark=draw.choice(marks),
            persistent=draw.random() < 0.5,
            memory=draw.choice(MEMORY),
            seed=draw.randrange(NUMBERS),
            steps=tuple((name, draw.randrange(NUMBERS)) for name in names),
            kept=draw.choice(KEPT),
        )


def shorten(program, fails):
    """The program without the steps that it fails without, as long as ``fails`` says so."""
    at = len(program.steps) - 1
    while at >= 0:
        shorter = dataclasses.replace(program, steps=program.steps[:at] + program.steps[at + 1 :])
        if fails(shorter):
            program = shorter
        at = min(at, len(program.steps)) - 1
    return program
