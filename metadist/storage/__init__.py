"""Store run directories and checkpoints on local disks and fsspec file systems."""
