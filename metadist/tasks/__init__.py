"""The task families by name.

A new one is one file and one line in ``TASKS``. A user's own is named by its import path; a package of its own declares
an entry point (``docs/extend.md``).
"""

from metadist.core.task import TaskFamily
from metadist.tasks.cifar import CifarFS
from metadist.tasks.image_folder import ImageFolder
from metadist.tasks.noisy_labels import NoisyLabels
from metadist.tasks.omniglot import Omniglot
from metadist.tasks.sinusoid import Sinusoid
from metadist.tasks.small_images import SmallImages
from metadist.tasks.table import TableClassification, TableRegression

TASKS: dict[str, type[TaskFamily]] = {
    "sinusoid": Sinusoid,
    "omniglot": Omniglot,
    "image_folder": ImageFolder,
    "cifar_fs": CifarFS,
    "small_images": SmallImages,
    "noisy_labels": NoisyLabels,
    "table_regression": TableRegression,
    "table_classification": TableClassification,
}
