"""List the task families by name.

A new one needs one file and one line here. A config names a user's own task family by its import path.
"""

from metadist.core.task import TaskFamily
from metadist.tasks.image_folder import ImageFolder
from metadist.tasks.omniglot import Omniglot
from metadist.tasks.sinusoid import Sinusoid

TASKS: dict[str, type[TaskFamily]] = {
    "sinusoid": Sinusoid,
    "omniglot": Omniglot,
    "image_folder": ImageFolder,
}
