"""Run directories and checkpoints on local disks and fsspec stores."""
