"""Task families by name. A new one is one file and one line here; a user's own is named by its import path instead."""

from metadist.core.task import TaskFamily
from metadist.tasks.image_folder import ImageFolder
from metadist.tasks.omniglot import Omniglot
from metadist.tasks.sinusoid import Sinusoid

TASKS: dict[str, type[TaskFamily]] = {
    "sinusoid": Sinusoid,
    "omniglot": Omniglot,
    "image_folder": ImageFolder,
}
